#include "checkpoint_values.h"

#include <bit>
#include <cstdint>

#include "io/safetensors.h"

namespace flash_entmax::lab {

::testing::AssertionResult KeepsBfloat16(const std::string& folder) {
  Expected<io::SafetensorsFile> file =
      io::SafetensorsFile::Open(folder + "/checkpoint.safetensors");
  if (!file.ok()) return ::testing::AssertionFailure() << file.status().message();
  if (file->tensors().size() != 3) {
    return ::testing::AssertionFailure() << file->tensors().size() << " tensors";
  }
  for (const io::SafetensorsEntry& entry : file->tensors()) {
    const Expected<TensorView> tensor = file->Tensor(entry.name);
    if (!tensor.ok() || tensor->dtype != DType::kFloat32) {
      return ::testing::AssertionFailure() << entry.name << " is not float32";
    }
    const auto* values = static_cast<const float*>(tensor->data);
    int64_t wide = 0, zeros = 0;
    for (int64_t i = 0; i < tensor->shape[0]; ++i) {
      wide += (std::bit_cast<uint32_t>(values[i]) & 0xFFFFu) != 0;
      zeros += values[i] == 0.0F;
    }
    if (wide > 0 || zeros == tensor->shape[0]) {
      return ::testing::AssertionFailure() << entry.name << ": of " << tensor->shape[0] << ", "
                                           << wide << " are no bfloat16, " << zeros << " are 0";
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace flash_entmax::lab
