#include "map_input.h"

#include <fmt/format.h>

#include <charconv>
#include <istream>
#include <string_view>
#include <system_error>
#include <utility>

#include "io/safetensors_header.h"

namespace flash_entmax::cli {
namespace {

constexpr std::string_view kSeparators = " \t\r,;";

}  // namespace

Expected<std::vector<NumberRow>> ReadNumberRows(std::istream& input, const std::string& name) {
  std::vector<NumberRow> rows;
  std::string line;
  for (int64_t number = 1; std::getline(input, line); ++number) {
    std::string_view text = line;
    text = text.substr(0, text.find('#'));
    NumberRow row;
    row.line = number;
    for (size_t begin = text.find_first_not_of(kSeparators); begin != std::string_view::npos;
         begin = text.find_first_not_of(kSeparators, begin)) {
      const size_t end = std::min(text.find_first_of(kSeparators, begin), text.size());
      std::string_view word = text.substr(begin, end - begin);
      const std::string_view whole = word;
      // from_chars knows no plus sign, and must not be shown "+-1".
      if (word.size() > 1 && word[0] == '+' && word[1] != '-') word.remove_prefix(1);
      double value = 0.0;
      const auto [rest, error] = std::from_chars(word.data(), word.data() + word.size(), value);
      if (error != std::errc() || rest != word.data() + word.size()) {
        return Status::InvalidArgument(fmt::format(
            "{}: line {}, column {}: got {}; must be a number{}, nan, inf or -inf", name, number,
            begin + 1, io::Quoted(whole),
            error == std::errc::result_out_of_range ? " within the range of float64" : ""));
      }
      row.numbers.push_back(value);
      begin = end;
    }
    if (!row.numbers.empty()) rows.push_back(std::move(row));
  }
  if (input.bad()) return Status::Io(fmt::format("{}: cannot be read", name));
  return rows;
}

}  // namespace flash_entmax::cli
