#include "io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace flash_entmax::io {

Expected<MappedFile> MappedFile::Open(const std::string& path) {
  const auto fail = [&path](const char* action) {
    const int error = errno;
    return Status::Io("file '" + path + "': cannot " + action + ": " + std::strerror(error));
  };
  // Without O_NONBLOCK, opening a named pipe would wait for a writer for ever.
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) return fail("open it");
  struct stat information = {};
  if (fstat(descriptor, &information) != 0) {
    const Status status = fail("read its size");
    close(descriptor);
    return status;
  }
  if (!S_ISREG(information.st_mode)) {
    close(descriptor);
    return Status::Io("file '" + path + "': is " +
                      (S_ISDIR(information.st_mode) ? "a folder" : "not a regular file"));
  }
  MappedFile file;
  file.size_ = static_cast<size_t>(information.st_size);
  if (file.size_ > 0) {
    void* data = mmap(nullptr, file.size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (data == MAP_FAILED) {
      const Status status = fail("map it into memory");
      close(descriptor);
      file.size_ = 0;
      return status;
    }
    file.data_ = static_cast<std::byte*>(data);
  }
  close(descriptor);
  return file;
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(data_, size_);
}

}  // namespace flash_entmax::io
