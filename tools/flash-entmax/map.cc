// `flash-entmax map`: a mapping over rows of numbers.

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "command.h"
#include "flash_entmax/loss.h"
#include "flash_entmax/mapping.h"
#include "map_input.h"
#include "output.h"

namespace flash_entmax::cli {
namespace {

struct MapOptions {
  std::string file = "-";
  std::string mapping = "entmax";
  std::optional<double> alpha;
  std::optional<double> budget;
  std::optional<int64_t> loss_target;
  bool support = false;
};

struct MappedNumbers {
  std::vector<double> probabilities;
  double threshold = 0.0;
  int64_t support_size = 0;
  double loss = 0.0;  // If a target was given.
};

Expected<std::vector<NumberRow>> ReadInput(const std::string& file) {
  if (file == "-") {
    struct stat input = {};
    // A stream takes a closed descriptor or a folder for the end of the input.
    if (fstat(STDIN_FILENO, &input) != 0 || S_ISDIR(input.st_mode)) {
      return Status::Io("standard input: cannot be read");
    }
    return ReadNumberRows(std::cin, "standard input");
  }
  const std::string name = "file '" + file + "'";
  struct stat information = {};
  // Opening a folder as a stream succeeds, and reading it says nothing.
  if (stat(file.c_str(), &information) == 0 && S_ISDIR(information.st_mode)) {
    return Status::Io(name + ": is a folder");
  }
  std::ifstream input(file, std::ios::binary);
  if (!input) return Status::Io(name + ": cannot open it: " + std::strerror(errno));
  return ReadNumberRows(input, name);
}

// The names that --mapping knows are shorthands for these.
Expected<MappingOptions> ToMappingOptions(const MapOptions& options) {
  MappingOptions mapping;
  const bool fixed_alpha =
      options.mapping == "softmax" || options.mapping == "sparsemax" || options.mapping == "budget";
  if (fixed_alpha && options.alpha.has_value()) {
    return Status::InvalidArgument("--alpha: not for --mapping " + options.mapping +
                                   "; only for entmax and normmax");
  }
  if (options.mapping != "budget" && options.budget.has_value()) {
    return Status::InvalidArgument("--budget: only for --mapping budget");
  }
  if (options.loss_target.has_value() && options.mapping == "budget") {
    return Status::InvalidArgument(
        "--loss: not for --mapping budget; only for entmax, softmax, sparsemax and normmax");
  }
  if (options.mapping == "softmax") mapping.alpha = 1.0;
  if (options.mapping == "sparsemax") mapping.alpha = 2.0;
  if (options.mapping == "normmax") {
    mapping.kind = MappingKind::kNormmax;
    mapping.alpha = 2.0;
  }
  if (options.mapping == "budget") {
    mapping.kind = MappingKind::kBudget;
    if (!options.budget.has_value()) {
      return Status::InvalidArgument("--budget: must be given with --mapping budget");
    }
    mapping.budget = *options.budget;
  }
  if (options.alpha.has_value()) mapping.alpha = *options.alpha;
  return mapping;
}

Expected<MappedNumbers> MapOneRow(const std::vector<double>& scores, const MappingOptions& mapping,
                                  const std::optional<int64_t>& target) {
  const auto size = static_cast<int64_t>(scores.size());
  MappedNumbers result;
  result.probabilities.assign(scores.size(), 0.0);
  const TensorView view = TensorView::Contiguous(scores.data(), DType::kFloat64, {size});
  MappingExtras extras;
  extras.threshold = MutableTensorView::Contiguous(&result.threshold, DType::kFloat64, {1});
  extras.support_size = MutableTensorView::Contiguous(&result.support_size, DType::kInt64, {1});
  const Status status = MappingForward(
      view, mapping,
      MutableTensorView::Contiguous(result.probabilities.data(), DType::kFloat64, {size}), extras);
  if (!status.ok()) return status;
  if (target.has_value()) {
    LossOptions loss;
    loss.kind = mapping.kind;
    loss.alpha = mapping.alpha;
    loss.reduction = Reduction::kNone;
    loss.num_threads = mapping.num_threads;
    // Here every row has a target, and none of them means that there is none.
    if (*target < 0 || *target >= size) {
      return Status::InvalidArgument(
          fmt::format("--loss: got {}; must be in [0, {}]", *target, size - 1));
    }
    const Status loss_status =
        FenchelYoungLoss(TensorView::Contiguous(scores.data(), DType::kFloat64, {1, size}),
                         TensorView::Contiguous(&*target, DType::kInt64, {1}), loss,
                         MutableTensorView::Contiguous(&result.loss, DType::kFloat64, {1}));
    if (!loss_status.ok()) return loss_status;
  }
  return result;
}

void PrintRow(const MappedNumbers& row, const MapOptions& options) {
  std::string line;
  if (options.loss_target.has_value()) {
    line = fmt::format("{}", row.loss);
  } else {
    for (size_t i = 0; i < row.probabilities.size(); ++i) {
      const double p = row.probabilities[i];
      if (!options.support) {
        line += fmt::format("{}{}", line.empty() ? "" : " ", p);
      } else if (!(p <= 0.0)) {  // NaN is worth showing.
        line += fmt::format("{}{}:{}", line.empty() ? "" : " ", i, p);
      }
    }
  }
  fmt::print("{}\n", line);
}

Json RowToJson(const MappedNumbers& row, int64_t line, const MapOptions& options) {
  Json result = {{"line", line}};
  if (options.support) {
    Json index = Json::array();
    Json probability = Json::array();
    for (size_t i = 0; i < row.probabilities.size(); ++i) {
      if (row.probabilities[i] <= 0.0) continue;
      index.push_back(i);
      probability.push_back(JsonNumber(row.probabilities[i]));
    }
    result["support_index"] = index;
    result["support_probability"] = probability;
  } else {
    Json probabilities = Json::array();
    for (const double p : row.probabilities) probabilities.push_back(JsonNumber(p));
    result["probabilities"] = probabilities;
  }
  result["threshold"] = JsonNumber(row.threshold);
  result["support_size"] = row.support_size;
  if (options.loss_target.has_value()) result["loss"] = JsonNumber(row.loss);
  return result;
}

CommandResult Map(const CommonOptions& common, const MapOptions& options) {
  Expected<MappingOptions> mapping = ToMappingOptions(options);
  if (!mapping.ok()) return mapping.status();
  mapping->num_threads = common.threads;
  const Expected<std::vector<NumberRow>> rows = ReadInput(options.file);
  if (!rows.ok()) return rows.status();
  // All rows are mapped before any is printed, so that bad input prints nothing but its error.
  std::vector<MappedNumbers> mapped;
  for (const NumberRow& row : *rows) {
    Expected<MappedNumbers> result = MapOneRow(row.numbers, *mapping, options.loss_target);
    if (!result.ok()) {
      return Status::InvalidArgument(
          fmt::format("line {}: {}", row.line, result.status().message()));
    }
    mapped.push_back(std::move(result).value());
  }
  if (!common.json) {
    for (const MappedNumbers& row : mapped) PrintRow(row, options);
    return {};
  }
  Json document = {{"command", "map"}, {"mapping", options.mapping}, {"alpha", mapping->alpha}};
  if (options.mapping == "budget") {
    document.erase("alpha");
    document["budget"] = mapping->budget;
  }
  if (options.loss_target.has_value()) document["target"] = *options.loss_target;
  document["rows"] = Json::array();
  for (size_t i = 0; i < mapped.size(); ++i) {
    document["rows"].push_back(RowToJson(mapped[i], (*rows)[i].line, options));
  }
  PrintJson(document);
  return {};
}

}  // namespace

void AddMapCommand(CLI::App& program, Context& context) {
  auto options = std::make_shared<MapOptions>();
  CLI::App* command =
      AddCommand(program, context, "map", "Map rows of numbers from a file or standard input",
                 [&context, options] { return Map(context.common, *options); });
  command->footer(
      "Input: one row a line, numbers separated by spaces, tabs, commas or semicolons; nan, inf\n"
      "and -inf are numbers, -inf hides an entry; # starts a comment. Rows may differ in length.\n"
      "Example: echo '1 2 0.5' | flash-entmax map --alpha 2");
  command->add_option("file", options->file, "Text file to read; - for standard input")
      ->capture_default_str();
  command
      ->add_option("--mapping", options->mapping,
                   "entmax, softmax (α = 1), sparsemax (α = 2), normmax or budget")
      ->check(CLI::IsMember({"entmax", "softmax", "sparsemax", "normmax", "budget"}))
      ->capture_default_str();
  command->add_option("--alpha", options->alpha,
                      "α > 0 of entmax, > 1 of normmax [default: 1.5 for entmax, 2 for normmax]");
  command->add_option("--budget", options->budget,
                      "Sum of the probabilities, each at most 1, for --mapping budget");
  auto* support = command->add_flag("--support", options->support,
                                    "Print only positive entries, as index:value; indices from 0");
  command
      ->add_option("--loss", options->loss_target,
                   "Print each row's Fenchel–Young loss for this target (index from 0) instead")
      ->excludes(support);
}

}  // namespace flash_entmax::cli
