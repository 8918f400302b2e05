// A folder of its own for one test, removed with everything in it at the end.

#ifndef FLASH_ENTMAX_TESTS_IO_TEMPORARY_FOLDER_H_
#define FLASH_ENTMAX_TESTS_IO_TEMPORARY_FOLDER_H_

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <string_view>

namespace flash_entmax {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "flash_entmax.XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  // Not by std::filesystem::remove_all: LibTorch exports a copy of its own, of another compiler's
  // layout, which the linker may choose instead and which then crashes.
  ~TemporaryFolder() {
    const auto remove_one = [](const char* path, const struct stat*, int, FTW*) {
      return ::remove(path);
    };
    nftw(path_.c_str(), remove_one, /*descriptors=*/8, FTW_DEPTH | FTW_PHYS);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string File(const std::string& name) const { return (path_ / name).string(); }

  // How many things the folder holds.
  int Count() const {
    return static_cast<int>(std::distance(std::filesystem::directory_iterator(path_), {}));
  }

 private:
  std::filesystem::path path_;
};

inline std::string ReadAll(const std::string& path) {
  std::ostringstream contents;
  contents << std::ifstream(path, std::ios::binary).rdbuf();
  return contents.str();
}

inline void WriteAll(const std::string& path, std::string_view contents) {
  std::ofstream file(path, std::ios::binary);
  file.write(contents.data(), static_cast<std::streamsize>(contents.size()));
}

}  // namespace flash_entmax

#endif  // FLASH_ENTMAX_TESTS_IO_TEMPORARY_FOLDER_H_
