// Any bytes as a safetensors file: an error, or tensors that lie inside it.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "io/safetensors.h"
#include "math/element.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using flash_entmax::io::SafetensorsFile;
  // Just as large as the file, so that the address sanitizer sees the first byte beyond; at every
  // alignment, as a file's data may have.
  const size_t shift = size % 8;
  const std::unique_ptr<std::byte[]> memory(new std::byte[size + shift]);
  if (size > 0) std::memcpy(memory.get() + shift, data, size);
  auto file = SafetensorsFile::FromMemory(memory.get() + shift, size, "input");
  if (!file.ok()) {
    if (file.status().message().empty()) std::abort();
    return 0;
  }
  double sum = 0.0;
  for (const auto& entry : file->tensors()) {
    const auto tensor = file->Tensor(entry.name);
    if (!tensor.ok()) continue;
    const int64_t count = tensor->num_elements();
    if (count * flash_entmax::SizeOf(tensor->dtype) != entry.end - entry.begin) std::abort();
    for (int64_t i = 0; i < count; ++i) sum += flash_entmax::ReadElement(*tensor, i);
  }
  return sum == 0.1 ? 1 : 0;  // Uses the sum, so that the reads stay.
}
