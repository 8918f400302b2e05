// `flash-entmax run`: attention over the tensors of a safetensors file.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "attention_flags.h"
#include "attention_slices.h"
#include "command.h"
#include "flash_entmax/attention.h"
#include "io/atomic_file.h"
#include "io/safetensors.h"
#include "output.h"
#include "owned_tensor.h"
#include "progress.h"
#include "visible_pairs.h"

namespace flash_entmax::cli {
namespace {

// Query-key pairs of one call. Enough work to keep every thread busy and little enough that the
// support of a call without any zero (8 bytes a pair) stays below a gigabyte.
constexpr int64_t kPairsPerCall = int64_t{1} << 26;

struct RunOptions {
  std::string file;
  std::string query = "q";
  std::string key = "k";
  std::string value = "v";
  std::string alibi;
  std::string query_scale;
  std::string key_mask;
  std::string bias;
  std::string key_lengths;
  std::string cu_query;
  std::string cu_key;
  AttentionFlags attention;
  std::string output;
  bool support = false;
};

// Reads a tensor of 2 to 4 dimensions and adds those of size 1 that it lacks in front.
Expected<TensorView> LoadMain(io::SafetensorsFile& file, const char* flag,
                              const std::string& name) {
  const Expected<TensorView> loaded = file.Tensor(name);
  if (!loaded.ok()) {
    return Status(loaded.status().code(), fmt::format("{}: {}", flag, loaded.status().message()));
  }
  const TensorView& tensor = *loaded;
  if (tensor.rank < 2 || tensor.rank > 4) {
    return Status::InvalidArgument(
        fmt::format("{} {}: got shape {}; must be [batch, heads, length, size], [heads, length, "
                    "size] or [length, size]",
                    flag, io::Quoted(name), ShapeToString(tensor)));
  }
  TensorView full = tensor;
  const int missing = 4 - tensor.rank;
  full.rank = 4;
  for (int i = 0; i < 4; ++i) {
    full.shape[i] = i < missing ? 1 : tensor.shape[i - missing];
    full.strides[i] = i < missing ? 0 : tensor.strides[i - missing];
  }
  return full;
}

Expected<AttentionProblem> LoadProblem(io::SafetensorsFile& file, const RunOptions& options,
                                       int& query_rank) {
  AttentionProblem problem;
  options.attention.ApplyTo(problem);
  struct Main {
    const char* flag;
    const std::string& name;
    TensorView& view;
  };
  for (const Main& main :
       {Main{"--q", options.query, problem.query}, Main{"--k", options.key, problem.key},
        Main{"--v", options.value, problem.value}}) {
    Expected<TensorView> view = LoadMain(file, main.flag, main.name);
    if (!view.ok()) return view.status();
    main.view = *view;
  }
  query_rank = file.Tensor(options.query)->rank;
  for (const Main& extra : {Main{"--alibi", options.alibi, problem.alibi_slopes},
                            Main{"--query-scale", options.query_scale, problem.query_scale},
                            Main{"--key-mask", options.key_mask, problem.key_mask},
                            Main{"--bias", options.bias, problem.bias},
                            Main{"--key-lengths", options.key_lengths, problem.key_lengths},
                            Main{"--cu-query", options.cu_query, problem.cu_query},
                            Main{"--cu-key", options.cu_key, problem.cu_key}}) {
    if (extra.name.empty()) continue;
    Expected<TensorView> view = file.Tensor(extra.name);
    if (!view.ok()) {
      return Status(view.status().code(),
                    fmt::format("{}: {}", extra.flag, view.status().message()));
    }
    extra.view = *view;
  }
  if (Status status = CheckAttention(problem); !status.ok()) return status;
  return problem;
}

struct RunStatistics {
  double seconds = 0.0;
  int64_t rows = 0;
  int64_t entries = 0;  // Positive probabilities.
  int64_t pairs = 0;    // Visible query-key pairs.

  double mean_support() const { return rows > 0 ? double(entries) / double(rows) : 0.0; }
  double zero_share() const { return pairs > 0 ? 1.0 - double(entries) / double(pairs) : 0.0; }
};

// Runs all slices. Keeps the support in `support` if not null.
Status Compute(const CommonOptions& common, const AttentionProblem& problem,
               const AttentionOutputs& outputs, AttentionSupport* support,
               RunStatistics& statistics) {
  AttentionOptions run;
  run.num_threads = common.threads;
  statistics.rows = problem.query.shape[0] * problem.query.shape[1] * problem.query.shape[2];
  statistics.pairs = VisiblePairs(problem) * problem.query.shape[1];
  // Up to α = 1 every key is kept, which needs no list to count.
  const bool count = problem.alpha > 1.0;
  if (!count) statistics.entries = statistics.pairs;

  Progress progress(common, "attention", statistics.rows, "rows");
  const auto start = std::chrono::steady_clock::now();
  for (const AttentionSlice& slice : CutAttention(problem, kPairsPerCall)) {
    AttentionSupport part;
    AttentionOutputs part_outputs = SliceOutputs(outputs, slice);
    if (count || support != nullptr) part_outputs.support = &part;
    Status status = AttentionForward(SliceProblem(problem, slice), part_outputs, run);
    if (!status.ok()) return status;
    if (count) statistics.entries += static_cast<int64_t>(part.key_index.size());
    if (support != nullptr) AppendSupport(part, *support);
    progress.Add(slice.rows());
  }
  statistics.seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return Status::Ok();
}

// The shape without the leading ones that the query's file did not have.
std::vector<int64_t> ShapeInFile(const TensorView& full, int rank) {
  return {full.shape.begin() + (4 - rank), full.shape.begin() + 4};
}

Status WriteResult(const RunOptions& options, const AttentionOutputs& outputs,
                   const AttentionSupport* support, int query_rank) {
  const TensorView output = outputs.output.view();
  std::vector<int64_t> threshold_shape = ShapeInFile(output, query_rank);
  threshold_shape.pop_back();
  std::vector<io::NamedTensor> tensors = {
      {"output", RowMajor(output.data, output.dtype, ShapeInFile(output, query_rank))},
      {"threshold",
       RowMajor(outputs.threshold.view().data, outputs.threshold.dtype, threshold_shape)}};
  if (support != nullptr) {
    const auto entries = static_cast<int64_t>(support->key_index.size());
    tensors.push_back(
        {"support_row_offsets", RowMajor(support->row_offsets.data(), DType::kInt64,
                                         {static_cast<int64_t>(support->row_offsets.size())})});
    tensors.push_back(
        {"support_key_index", RowMajor(support->key_index.data(), DType::kInt32, {entries})});
    tensors.push_back(
        {"support_probability", RowMajor(support->probability.data(), DType::kFloat32, {entries})});
  }
  return io::WriteSafetensors(options.output, tensors,
                              {{"alpha", fmt::format("{}", options.attention.alpha)}});
}

void Report(const CommonOptions& common, const RunOptions& options, const AttentionProblem& problem,
            const AttentionPlan& plan, const RunStatistics& statistics) {
  const auto shape = [](const TensorView& view) {
    return std::vector<int64_t>(view.shape.begin(), view.shape.begin() + view.rank);
  };
  if (common.json) {
    Json document = {{"command", "run"},
                     {"dtype", NameOf(problem.query.dtype)},
                     {"query", shape(problem.query)},
                     {"key", shape(problem.key)},
                     {"value", shape(problem.value)},
                     {"alpha", problem.alpha},
                     {"plan", PlanToJson(plan)},
                     {"seconds", statistics.seconds},
                     {"mean_support", statistics.mean_support()},
                     {"exact_zero_share", statistics.zero_share()},
                     {"output", nullptr}};
    if (!options.output.empty()) document["output"] = options.output;
    PrintJson(document);
    return;
  }
  fmt::print("query            {} {}\n", ShapeToString(problem.query), NameOf(problem.query.dtype));
  fmt::print("key              {}\n", ShapeToString(problem.key));
  fmt::print("value            {}\n", ShapeToString(problem.value));
  fmt::print("alpha            {}\n", problem.alpha);
  PrintPlan(plan);
  fmt::print("time             {:.4g} s\n", statistics.seconds);
  fmt::print("mean support     {:.4g} keys a row\n", statistics.mean_support());
  fmt::print("exact zeros      {:.2f} % of the pairs that masks leave\n",
             statistics.zero_share() * 100);
  if (!options.output.empty()) fmt::print("written          {}\n", options.output);
}

CommandResult Run(const CommonOptions& common, const RunOptions& options) {
  if (options.support && options.output.empty()) {
    return Status::InvalidArgument("--support: needs --output, where the support is written");
  }
  if (!options.output.empty()) {
    std::error_code ignored;
    if (std::filesystem::equivalent(options.file, options.output, ignored)) {
      return Status::InvalidArgument("--output: got the input file, '" + options.output +
                                     "'; must be another");
    }
    // A path that cannot be written is better known now than after the work.
    const Expected<io::AtomicFile> probe = io::AtomicFile::Create(options.output);
    if (!probe.ok()) return probe.status();
  }
  Expected<io::SafetensorsFile> file = io::SafetensorsFile::Open(options.file);
  if (!file.ok()) return file.status();
  int query_rank = 0;
  const Expected<AttentionProblem> problem = LoadProblem(*file, options, query_rank);
  if (!problem.ok()) return problem.status();
  AttentionOptions run;
  run.num_threads = common.threads;
  const Expected<AttentionPlan> plan = PlanAttention(*problem, run);
  if (!plan.ok()) return plan.status();
  if (Status status = CheckMemory("workspace", plan->workspace_bytes); !status.ok()) return status;

  const TensorView& query = problem->query;
  const std::vector<int64_t> rows = {query.shape[0], query.shape[1], query.shape[2]};
  std::vector<int64_t> output_shape = rows;
  output_shape.push_back(problem->value.shape[3]);
  Expected<OwnedTensor> output = OwnedTensor::Allocate("output", query.dtype, output_shape);
  if (!output.ok()) return output.status();
  const DType threshold_type = query.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  Expected<OwnedTensor> threshold = OwnedTensor::Allocate("threshold", threshold_type, rows);
  if (!threshold.ok()) return threshold.status();
  AttentionOutputs outputs;
  outputs.output = output->mutable_view();
  outputs.threshold = threshold->mutable_view();

  AttentionSupport support;
  AttentionSupport* kept = options.support ? &support : nullptr;
  RunStatistics statistics;
  if (Status status = Compute(common, *problem, outputs, kept, statistics); !status.ok()) {
    return status;
  }
  if (!options.output.empty()) {
    const Status status = WriteResult(options, outputs, kept, query_rank);
    if (!status.ok()) return CommandResult::Failure(status.message());
  }
  Report(common, options, *problem, *plan, statistics);
  return {};
}

}  // namespace

void AddRunCommand(CLI::App& program, Context& context) {
  auto options = std::make_shared<RunOptions>();
  CLI::App* command =
      AddCommand(program, context, "run", "Attention over the tensors of a safetensors file",
                 [&context, options] { return Run(context.common, *options); });
  command->footer(
      "q, k and v are [batch, heads, length, size] of one floating-point type; leading dimensions\n"
      "of size 1 may be missing. k and v may have fewer heads, a divisor of q's.\n"
      "--output writes output and threshold (τ of each row; log Σ exp for α = 1), and with\n"
      "--support also support_row_offsets, support_key_index and support_probability: row r's\n"
      "positive probabilities are entries row_offsets[r] to row_offsets[r+1] − 1.");
  command->add_option("file", options->file, "safetensors file to read")->required();
  command->add_option("--q", options->query, "Name of the queries")->capture_default_str();
  command->add_option("--k", options->key, "Name of the keys")->capture_default_str();
  command->add_option("--v", options->value, "Name of the values")->capture_default_str();
  options->attention.AddAlphaTo(*command);
  options->attention.AddCausalTo(*command);
  options->attention.AddTo(*command);
  command->add_option("--alibi", options->alibi, "Name of ALiBi slopes ≥ 0: [heads], float");
  command->add_option("--query-scale", options->query_scale,
                      "Name of factors of the scores: [batch, heads, query length], float");
  command->add_option("--key-mask", options->key_mask,
                      "Name of a mask, 0 hides the key: [batch, key length], bool or uint8");
  command->add_option("--bias", options->bias,
                      "Name of what is added to the scores: [batch, heads, queries, keys], float");
  command->add_option("--key-lengths", options->key_lengths,
                      "Name of the number of keys of each batch entry: [batch], int32 or int64");
  auto* cu_query = command->add_option(
      "--cu-query", options->cu_query,
      "Name of the packed sequences' first query rows: [sequences + 1], int32 or int64");
  auto* cu_key = command->add_option("--cu-key", options->cu_key, "The same for key rows");
  cu_query->needs(cu_key);
  cu_key->needs(cu_query);
  command->add_option("--output", options->output, "safetensors file to write");
  command->add_flag("--support", options->support, "Write the positive probabilities as well");
}

}  // namespace flash_entmax::cli
