#include "demo/text_source.h"

#include <fmt/format.h>
#include <glob.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string_view>
#include <system_error>

namespace flash_entmax::cli {
namespace {

namespace fs = std::filesystem;

// Folders that hold tests or what users installed, in Python's library and elsewhere.
constexpr std::array<std::string_view, 6> kSkippedFolders = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"};

// "python3.9" before "python3.11": runs of digits compare as numbers.
bool VersionLess(const std::string& a, const std::string& b) {
  return strverscmp(a.c_str(), b.c_str()) < 0;
}

// The existing folders that match, newest version first.
std::vector<std::string> MatchingFolders(const std::string& pattern) {
  std::vector<std::string> folders;
  glob_t found = {};
  if (glob(pattern.c_str(), 0, nullptr, &found) == 0) {
    for (size_t i = 0; i < found.gl_pathc; ++i) {
      std::error_code error;
      if (fs::is_directory(found.gl_pathv[i], error)) folders.emplace_back(found.gl_pathv[i]);
    }
  }
  globfree(&found);
  std::sort(folders.rbegin(), folders.rend(), VersionLess);
  return folders;
}

bool HasExtension(const fs::path& path, const std::vector<std::string>& extensions) {
  return extensions.empty() || std::find(extensions.begin(), extensions.end(),
                                         path.extension().string()) != extensions.end();
}

// Regular files below `folder`, sorted. What cannot be read is passed over.
std::vector<std::string> ListFiles(const std::string& folder, const TextPlace& place) {
  std::vector<std::string> files;
  std::error_code error;
  fs::recursive_directory_iterator iterator(folder, fs::directory_options::skip_permission_denied,
                                            error);
  for (; !error && iterator != fs::recursive_directory_iterator(); iterator.increment(error)) {
    const fs::path& path = iterator->path();
    std::error_code ignored;
    if (iterator->is_directory(ignored)) {
      const std::string name = path.filename().string();
      if (std::find(kSkippedFolders.begin(), kSkippedFolders.end(), name) !=
          kSkippedFolders.end()) {
        iterator.disable_recursion_pending();
      }
    } else if (iterator->is_regular_file(ignored) && HasExtension(path, place.extensions)) {
      files.push_back(path.string());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

// Up to `max_bytes` bytes; fewer if the file ends or a read fails.
std::string ReadStart(std::ifstream& file, int64_t max_bytes) {
  std::string bytes;
  std::array<char, 65536> buffer;
  while (static_cast<int64_t>(bytes.size()) < max_bytes) {
    const int64_t wanted =
        std::min<int64_t>(buffer.size(), max_bytes - static_cast<int64_t>(bytes.size()));
    file.read(buffer.data(), wanted);
    bytes.append(buffer.data(), static_cast<size_t>(file.gcount()));
    if (file.gcount() < wanted) break;
  }
  return bytes;
}

TextSource ReadFolder(const std::string& folder, const TextPlace& place, int64_t max_bytes) {
  TextSource source;
  for (const std::string& path : ListFiles(folder, place)) {
    const int64_t left = max_bytes - static_cast<int64_t>(source.bytes.size());
    if (left <= 0) break;
    std::ifstream file(path, std::ios::binary);
    const std::string bytes = ReadStart(file, left);
    if (bytes.empty() || bytes.find('\0') != std::string::npos) continue;
    source.bytes += bytes;
    ++source.files;
  }
  source.description = fmt::format("{}, {}", place.name, folder);
  return source;
}

}  // namespace

std::vector<TextPlace> UsualTextPlaces() {
  constexpr const char* kPython = "Python standard library";
  std::vector<TextPlace> places = {{"/usr/lib/python3*", kPython, {".py"}},
                                   {"/usr/local/lib/python3*", kPython, {".py"}},
                                   {"/opt/*/lib/python3*", kPython, {".py"}}};
  if (const char* home = std::getenv("HOME")) {
    places.push_back({std::string(home) + "/.pyenv/versions/*/lib/python3*", kPython, {".py"}});
  }
  places.push_back({"/usr/include/c++/*", "C++ standard library", {}});
  places.push_back({"/usr/include", "C and C++ headers", {".h", ".hpp"}});
  places.push_back({"/usr/share/common-licenses", "licences", {}});
  places.push_back({"/usr/share/doc", "documentation", {".txt", ".html", ".md"}});
  return places;
}

Expected<TextSource> ReadTextFile(const std::string& path, int64_t max_bytes) {
  std::error_code error;
  if (fs::is_directory(path, error)) {
    return Status::InvalidArgument(fmt::format("--text: {} is a folder; must be a file", path));
  }
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    return Status::Io(fmt::format("--text: cannot read {}: {}", path, std::strerror(errno)));
  }
  TextSource source;
  source.bytes = ReadStart(file, max_bytes);
  if (file.bad()) {
    return Status::Io(fmt::format("--text: cannot read {}: {}", path, std::strerror(errno)));
  }
  source.description = path;
  source.files = 1;
  return source;
}

Expected<TextSource> FindText(const std::vector<TextPlace>& places, int64_t max_bytes) {
  TextSource most;
  for (const TextPlace& place : places) {
    for (const std::string& folder : MatchingFolders(place.folder)) {
      TextSource source = ReadFolder(folder, place, max_bytes);
      if (source.bytes.size() > most.bytes.size()) most = std::move(source);
      if (static_cast<int64_t>(most.bytes.size()) >= max_bytes) return most;
    }
  }
  if (most.bytes.empty()) {
    return Status::InvalidArgument(
        "--text: no text was found in the usual places; name a file with --text FILE");
  }
  return most;
}

}  // namespace flash_entmax::cli
