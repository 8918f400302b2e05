// The text that the demonstration reads.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_TEXT_SOURCE_H_
#define FLASH_ENTMAX_TOOLS_DEMO_TEXT_SOURCE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "flash_entmax/status.h"

namespace flash_entmax::cli {

struct TextSource {
  std::string bytes;
  std::string description;  // What was read, for people.
  int64_t files = 0;
};

// Where text may be found on a machine.
struct TextPlace {
  std::string folder;                   // May hold `*` as glob(7) reads it.
  std::string name;                     // What lies there, as in "C headers".
  std::vector<std::string> extensions;  // With the dot; empty means any file.
};

// The sources of Python's standard library first, then other large texts.
std::vector<TextPlace> UsualTextPlaces();

// The first `max_bytes` bytes of a file, or all of it.
Expected<TextSource> ReadTextFile(const std::string& path, int64_t max_bytes);

// The files of the first place that holds `max_bytes` bytes of text, or else of the place that
// holds the most: in the order of their paths, one after the other, cut at `max_bytes`. Tests,
// installed packages and files that are no text are left out. Where a pattern matches several
// folders, the one that sorts last (the newest version) is used.
Expected<TextSource> FindText(const std::vector<TextPlace>& places, int64_t max_bytes);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_TEXT_SOURCE_H_
