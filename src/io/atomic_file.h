// Writing a file so that its path holds either what it held before or all of the new contents,
// whatever happens in between.

#ifndef FLASH_ENTMAX_SRC_IO_ATOMIC_FILE_H_
#define FLASH_ENTMAX_SRC_IO_ATOMIC_FILE_H_

#include <cstddef>
#include <string>
#include <string_view>

#include "flash_entmax/status.h"

namespace flash_entmax::io {

// A file that is being written. Its contents live in a temporary file of the same folder until
// Commit() moves them over the target; without a Commit() nothing remains.
class AtomicFile {
 public:
  // A temporary without a name vanishes even when the process is killed. File systems that have no
  // such thing get a named one, `.flash-entmax.XXXXXXXXXXXXXXXX.tmp`, which the destructor removes.
  enum class Temporary { kUnnamedIfPossible, kNamed };

  // Begins to write `path`, which must not exist or be a regular file. A symbolic link is followed.
  // An existing target keeps its permissions.
  static Expected<AtomicFile> Create(const std::string& path,
                                     Temporary temporary = Temporary::kUnnamedIfPossible);

  AtomicFile(AtomicFile&& other) noexcept;
  AtomicFile& operator=(AtomicFile&& other) noexcept;
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  Status Write(const void* data, size_t bytes);
  Status Write(std::string_view text) { return Write(text.data(), text.size()); }

  // Brings the contents to the disk and puts them at the path. Call it once, last.
  Status Commit();

 private:
  AtomicFile() = default;
  Status OpenTemporary(Temporary temporary, unsigned mode);
  Status Fail(std::string_view action) const;
  void Discard();

  std::string path_;       // As the caller wrote it, for messages.
  std::string target_;     // With symbolic links followed.
  std::string temporary_;  // Empty while the temporary file has no name.
  int descriptor_ = -1;
};

// Replaces the contents of `path` by `contents`.
Status WriteFileAtomically(const std::string& path, std::string_view contents);

}  // namespace flash_entmax::io

#endif  // FLASH_ENTMAX_SRC_IO_ATOMIC_FILE_H_
