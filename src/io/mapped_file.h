// A file's bytes, mapped read-only into memory.

#ifndef FLASH_ENTMAX_SRC_IO_MAPPED_FILE_H_
#define FLASH_ENTMAX_SRC_IO_MAPPED_FILE_H_

#include <cstddef>
#include <string>

#include "flash_entmax/status.h"

namespace flash_entmax::io {

// Lives until destroyed or moved from. As with every mapping, a file that another process shortens
// meanwhile ends this process with SIGBUS on the next access; replacing a file by renaming another
// over it, as AtomicFile does, is harmless.
class MappedFile {
 public:
  static Expected<MappedFile> Open(const std::string& path);

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  const std::byte* data() const { return data_; }  // Null if the file is empty.
  size_t size() const { return size_; }

 private:
  MappedFile() = default;

  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace flash_entmax::io

#endif  // FLASH_ENTMAX_SRC_IO_MAPPED_FILE_H_
