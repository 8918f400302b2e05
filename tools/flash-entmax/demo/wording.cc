#include "demo/wording.h"

#include <fmt/format.h>

#include <cmath>

namespace flash_entmax::cli {

std::string Grouped(int64_t value) {
  std::string digits = fmt::format("{}", value);
  const size_t sign = value < 0 ? 1 : 0;
  for (size_t at = digits.size(); at > sign + 3;) {
    at -= 3;
    digits.insert(at, ",");
  }
  return digits;
}

std::string GroupedMean(double value) {
  if (value >= 1e6) return fmt::format("{:.3f}M", value * 1e-6);
  if (value >= 1000 || value == std::round(value)) return Grouped(std::llround(value));
  return value >= 10 ? fmt::format("{:.1f}", value) : fmt::format("{:.2f}", value);
}

std::string Percent(double share, int digits) {
  const double unit = std::pow(10.0, digits);
  double percent = std::round(share * 100.0 * unit) / unit;
  if (share < 1.0 && percent >= 100.0) percent = 100.0 - 1.0 / unit;
  return fmt::format("{:.{}f} %", percent, digits);
}

std::string AlphaName(double alpha) {
  if (alpha == 1.0) return "1 softmax";
  if (alpha == 2.0) return "2 sparsemax";
  return fmt::format("{:g}", alpha);
}

std::string ShortAlphaName(double alpha) {
  return alpha == 1.0 ? "softmax" : fmt::format("α = {:g}", alpha);
}

std::string Duration(double seconds) {
  if (seconds < 1e-3) return fmt::format("{:.3g} µs", seconds * 1e6);
  if (seconds < 1.0) return fmt::format("{:.3g} ms", seconds * 1e3);
  if (seconds < 100.0) return fmt::format("{:.3g} s", seconds);
  if (seconds < 1000.0) return fmt::format("{:.0f} s", seconds);
  const auto whole = static_cast<int64_t>(std::llround(seconds));
  return fmt::format("{} min {} s", whole / 60, whole % 60);
}

std::string Visible(std::string_view bytes) {
  std::string text;
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n') {
      text += "\\n";
    } else if (c == '\t') {
      text += "\\t";
    } else if (c == '\r') {
      text += "\\r";
    } else if (c == '\\') {
      text += "\\\\";
    } else if (byte >= 0x20 && byte < 0x7F) {
      text += c;
    } else {
      text += fmt::format("\\x{:02X}", byte);
    }
  }
  return text;
}

std::string RoundsText(int rounds) {
  return rounds == 1 ? "one run" : fmt::format("the median of {} runs", rounds);
}

}  // namespace flash_entmax::cli
