// Reading and writing tensors in the safetensors layout (see safetensors_header.h).

#ifndef FLASH_ENTMAX_SRC_IO_SAFETENSORS_H_
#define FLASH_ENTMAX_SRC_IO_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "flash_entmax/status.h"
#include "flash_entmax/tensor.h"
#include "io/mapped_file.h"
#include "io/safetensors_header.h"

namespace flash_entmax::io {

// A file opened for reading. Views of its tensors stay valid, wherever the object is moved, until
// it is destroyed or assigned to.
class SafetensorsFile {
 public:
  // Maps the file into memory and checks its header; the data is read only when it is looked at.
  // Errors: kIo for a file that cannot be read, kInvalidArgument for one that is no well-formed
  // safetensors file.
  static Expected<SafetensorsFile> Open(const std::string& path);

  // The same over `size` bytes that the caller keeps alive; `name` stands for them in messages.
  static Expected<SafetensorsFile> FromMemory(const std::byte* data, size_t size,
                                              const std::string& name);

  const std::vector<SafetensorsEntry>& tensors() const { return header_.tensors; }
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }

  // A row-major view of a tensor; BOOL is seen as uint8. The format does not promise alignment, so
  // a tensor that is not aligned for its type is copied the first time it is asked for (not safe
  // from several threads at once). Errors: kInvalidArgument for a name that is not in the file,
  // kUnimplemented for a type that is no DType, kOutOfMemory.
  Expected<TensorView> Tensor(std::string_view name);

 private:
  SafetensorsFile() = default;

  std::string name_;
  std::optional<MappedFile> file_;  // Nothing after FromMemory.
  const std::byte* data_ = nullptr;
  SafetensorsHeader header_;
  // Aligned copies, by position in tensors().
  std::map<size_t, std::unique_ptr<std::byte[]>> copies_;
};

struct NamedTensor {
  std::string name;
  TensorView tensor;  // Any strides.
};

// Writes the tensors to `path`, all or nothing (see atomic_file.h). Data of larger types comes
// first and begins at a multiple of 8 bytes of the file, so that every tensor is aligned.
Status WriteSafetensors(const std::string& path, const std::vector<NamedTensor>& tensors,
                        const std::map<std::string, std::string>& metadata = {});

}  // namespace flash_entmax::io

#endif  // FLASH_ENTMAX_SRC_IO_SAFETENSORS_H_
