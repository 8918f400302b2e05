// The text that `flash-entmax map` reads: one row of numbers a line.

#ifndef FLASH_ENTMAX_TOOLS_MAP_INPUT_H_
#define FLASH_ENTMAX_TOOLS_MAP_INPUT_H_

#include <iosfwd>
#include <string>
#include <vector>

#include "flash_entmax/status.h"

namespace flash_entmax::cli {

struct NumberRow {
  int64_t line = 0;  // Counted from 1.
  std::vector<double> numbers;
};

// Numbers are separated by spaces, tabs, commas or semicolons, and may be nan, inf and -inf. What
// follows a # is a comment; lines without numbers are left out. `name` stands for the input in
// errors, which name line and column, both counted from 1, columns in bytes.
Expected<std::vector<NumberRow>> ReadNumberRows(std::istream& input, const std::string& name);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_MAP_INPUT_H_
