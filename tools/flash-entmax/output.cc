#include "output.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace flash_entmax::cli {
namespace {

// Columns that a UTF-8 text takes, for texts without wide or combining characters.
size_t Width(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  }));
}

}  // namespace

Json JsonNumber(double value) {
  if (std::isfinite(value)) return value;
  if (std::isnan(value)) return "nan";
  return value > 0 ? "inf" : "-inf";
}

void PrintJson(const Json& document) {
  // File names need not be UTF-8; JSON must be.
  fmt::print("{}\n", document.dump(2, ' ', false, Json::error_handler_t::replace));
}

void Table::Print() const {
  std::vector<size_t> widths(rows_[0].size());
  for (const auto& row : rows_) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], Width(row[i]));
  }
  for (size_t r = 0; r < rows_.size(); ++r) {
    std::string line;
    for (size_t i = 0; i < rows_[r].size(); ++i) {
      const std::string padding(widths[i] - Width(rows_[r][i]), ' ');
      line += i == 0 ? rows_[r][i] + padding : "  " + padding + rows_[r][i];
    }
    while (!line.empty() && line.back() == ' ') line.pop_back();
    fmt::print("{}\n", line);
    if (r == 0) {
      size_t total = 0;
      for (const size_t width : widths) total += width + 2;
      fmt::print("{}\n", std::string(total - 2, '-'));
    }
  }
}

std::string FormatBytes(int64_t bytes) {
  const auto value = static_cast<double>(bytes);
  if (value >= 1e12) return fmt::format("{:.3g} TB", value * 1e-12);
  if (value >= 1e9) return fmt::format("{:.3g} GB", value * 1e-9);
  if (value >= 1e6) return fmt::format("{:.3g} MB", value * 1e-6);
  if (value >= 1e3) return fmt::format("{:.3g} kB", value * 1e-3);
  return fmt::format("{} bytes", bytes);
}

std::string FormatShape(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

}  // namespace flash_entmax::cli
