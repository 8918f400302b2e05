// Printing results: tables for people, JSON for machines.

#ifndef FLASH_ENTMAX_TOOLS_OUTPUT_H_
#define FLASH_ENTMAX_TOOLS_OUTPUT_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace flash_entmax::cli {

// Keeps the order in which members were added.
using Json = nlohmann::ordered_json;

// A number, or the texts "nan", "inf" and "-inf", for which JSON has no numbers.
Json JsonNumber(double value);

// Prints the document and a newline to stdout.
void PrintJson(const Json& document);

// Columns as wide as they need to be: the first aligned to the left, the others to the right.
class Table {
 public:
  explicit Table(std::vector<std::string> header) : rows_{std::move(header)} {}
  // As many cells as the header has.
  void Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  // Prints to stdout, with a rule below the header.
  void Print() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

// "12.3 MB"; powers of ten, as disks and networks count.
std::string FormatBytes(int64_t bytes);

// "[1, 2, 3]".
std::string FormatShape(const std::vector<int64_t>& shape);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_OUTPUT_H_
