#include "io/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>

namespace flash_entmax::io {
namespace {

// read() and write() take at most this much at once on Linux and less elsewhere; one gibibyte is
// safe everywhere.
constexpr size_t kMaxWrite = size_t{1} << 30;

// Names tried before giving up. A clash of one 64-bit random name is already a wonder.
constexpr int kMaxNameAttempts = 16;

std::string FolderOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

std::string RandomTemporaryName(const std::string& target) {
  const size_t slash = target.rfind('/');
  const size_t name = slash == std::string::npos ? 0 : slash + 1;
  std::random_device random;
  uint64_t bits = (uint64_t{random()} << 32) | random();
  std::string suffix;
  for (int i = 0; i < 16; ++i, bits >>= 4) suffix += "0123456789abcdef"[bits & 15];
  // The target's own name is left out: with it the temporary name could be too long for the system.
  return target.substr(0, name) + ".flash-entmax." + suffix + ".tmp";
}

}  // namespace

Status AtomicFile::Fail(std::string_view action) const {
  const int error = errno;
  return Status::Io("output file '" + path_ + "': cannot " + std::string(action) + ": " +
                    std::strerror(error));
}

Expected<AtomicFile> AtomicFile::Create(const std::string& path, Temporary temporary) {
  AtomicFile file;
  file.path_ = path;
  file.target_ = path;
  if (path.empty()) return Status::InvalidArgument("output file: the path is empty");

  // What open() would give a new file, before the process's mask.
  unsigned mode = 0666;
  bool exists = false;
  struct stat information = {};
  if (stat(path.c_str(), &information) == 0) {
    // Renaming over a device or a pipe would replace it, which nobody means.
    if (!S_ISREG(information.st_mode)) {
      return Status::InvalidArgument("output file '" + path +
                                     "': exists and is not a regular file");
    }
    exists = true;
    mode = information.st_mode & 0777;
    if (char* resolved = realpath(path.c_str(), nullptr)) {
      file.target_ = resolved;
      std::free(resolved);
    }
  } else if (errno != ENOENT) {
    return file.Fail("write");
  } else if (path.back() == '/') {
    return Status::InvalidArgument("output file '" + path + "': names a folder");
  }

  if (Status status = file.OpenTemporary(temporary, mode); !status.ok()) return status;
  // The process's mask may have cleared bits that the target had.
  if (exists && fchmod(file.descriptor_, mode) != 0) return file.Fail("set the permissions");
  return file;
}

Status AtomicFile::OpenTemporary(Temporary temporary, unsigned mode) {
#ifdef O_TMPFILE
  // Commit() can name an unnamed file only through /proc.
  if (temporary == Temporary::kUnnamedIfPossible && access("/proc/self/fd", X_OK) == 0) {
    descriptor_ = open(FolderOf(target_).c_str(), O_TMPFILE | O_WRONLY | O_CLOEXEC, mode);
    if (descriptor_ >= 0) return Status::Ok();
  }
#else
  (void)temporary;
#endif
  for (int attempt = 0; attempt < kMaxNameAttempts; ++attempt) {
    std::string name = RandomTemporaryName(target_);
    descriptor_ = open(name.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, mode);
    if (descriptor_ >= 0) {
      temporary_ = std::move(name);
      return Status::Ok();
    }
    if (errno != EEXIST) break;
  }
  return Fail("create a temporary file beside it");
}

Status AtomicFile::Write(const void* data, size_t bytes) {
  const char* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = write(descriptor_, next, std::min(bytes, kMaxWrite));
    if (written < 0) {
      if (errno == EINTR) continue;
      return Fail("write");
    }
    next += written;
    bytes -= static_cast<size_t>(written);
  }
  return Status::Ok();
}

Status AtomicFile::Commit() {
  if (fsync(descriptor_) != 0) return Fail("bring it to the disk");
  if (temporary_.empty()) {
    // An unnamed file can only be linked to a name that is free, so it gets one just before the
    // rename.
    std::string name = RandomTemporaryName(target_);
    const std::string source = "/proc/self/fd/" + std::to_string(descriptor_);
    if (linkat(AT_FDCWD, source.c_str(), AT_FDCWD, name.c_str(), AT_SYMLINK_FOLLOW) != 0) {
      return Fail("name the temporary file");
    }
    temporary_ = std::move(name);
  }
  if (rename(temporary_.c_str(), target_.c_str()) != 0) return Fail("replace it");
  temporary_.clear();
  const int error = close(std::exchange(descriptor_, -1));
  if (error != 0) return Fail("close it");

  // The rename itself survives a power cut only once the folder is on the disk too. Some file
  // systems refuse to sync a folder; the file is in place all the same.
  const int folder = open(FolderOf(target_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder >= 0) {
    (void)fsync(folder);
    close(folder);
  }
  return Status::Ok();
}

void AtomicFile::Discard() {
  if (descriptor_ >= 0) close(descriptor_);
  if (!temporary_.empty()) unlink(temporary_.c_str());
  descriptor_ = -1;
  temporary_.clear();
}

AtomicFile::AtomicFile(AtomicFile&& other) noexcept
    : path_(std::move(other.path_)),
      target_(std::move(other.target_)),
      temporary_(std::exchange(other.temporary_, {})),
      descriptor_(std::exchange(other.descriptor_, -1)) {}

AtomicFile& AtomicFile::operator=(AtomicFile&& other) noexcept {
  if (this != &other) {
    Discard();
    path_ = std::move(other.path_);
    target_ = std::move(other.target_);
    temporary_ = std::exchange(other.temporary_, {});
    descriptor_ = std::exchange(other.descriptor_, -1);
  }
  return *this;
}

AtomicFile::~AtomicFile() { Discard(); }

Status WriteFileAtomically(const std::string& path, std::string_view contents) {
  Expected<AtomicFile> file = AtomicFile::Create(path);
  if (!file.ok()) return file.status();
  if (Status status = file->Write(contents); !status.ok()) return status;
  return file->Commit();
}

}  // namespace flash_entmax::io
