// Numbers and bytes as people read them.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_WORDING_H_
#define FLASH_ENTMAX_TOOLS_DEMO_WORDING_H_

#include <cstdint>
#include <string>
#include <string_view>

namespace flash_entmax::cli {

// 1234567 as "1,234,567".
std::string Grouped(int64_t value);

// A mean or median count: "18,021", "94.6", "3.42", "4", "1.047M".
std::string GroupedMean(double value);

// 0.71432 as "71.4 %". A share short of 1 is never rounded to 100 %.
std::string Percent(double share, int digits = 1);

// "1 softmax", "1.5", "2 sparsemax".
std::string AlphaName(double alpha);

// "softmax", "α = 1.5": for legends.
std::string ShortAlphaName(double alpha);

// "640 µs", "12.3 ms", "2.75 s", "145 s", "20 min 5 s".
std::string Duration(double seconds);

// "one run", "the median of 3 runs".
std::string RoundsText(int rounds);

// Printable ASCII as it is, all other bytes and the backslash as C writes them: "\n", "\\", "\xE9".
std::string Visible(std::string_view bytes);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_WORDING_H_
