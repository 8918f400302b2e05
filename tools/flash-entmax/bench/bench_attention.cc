// `flash-entmax bench attention`: attention over the shared table of workloads.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "attention_flags.h"
#include "bench/attention_case.h"
#include "bench/bench.h"
#include "bench/timing.h"
#include "command.h"
#include "output.h"
#include "visible_pairs.h"
#include "workloads.h"

namespace flash_entmax::cli {
namespace {

struct BenchAttentionOptions {
  std::vector<std::string> workloads = {"gauss(0.5)", "gauss(1)", "gauss(2)", "topic(16)", "local"};
  std::vector<double> alphas = {1.0, 1.25, 1.5, 2.0};
  bench::WorkloadShape shape = {1, 2, 2, 8192, 8192, 64, 64};
  std::optional<int64_t> kv_heads;  // As many as heads if not given.
  std::string dtype = "float32";
  bool causal = true;
  int rounds = 5;
  uint64_t seed = 1;
};

// Results of one workload, one a α.
struct CaseResult {
  std::vector<Timing> timings;
  std::vector<SupportSummary> supports;
  double dense_operations = 0.0;  // Of QKᵀ over the visible pairs.
};

CommandResult BenchOne(const Context& context, const BenchAttentionOptions& options, DType dtype,
                       const bench::WorkloadSpec& spec, CaseResult& result) {
  Expected<AttentionCase> made = AttentionCase::Make(spec, options.shape, options.seed, dtype);
  if (!made.ok()) return made.status();
  AttentionCase& attention = *made;
  attention.problem.causal = options.causal;
  AttentionOptions run;
  run.num_threads = context.common.threads;
  AttentionOutputs outputs;
  outputs.output = attention.output;

  std::vector<std::function<Status()>> calls;
  for (const double alpha : options.alphas) {
    AttentionProblem variant = attention.problem;
    variant.alpha = alpha;
    if (Status status = CheckAttention(variant); !status.ok()) return status;
    SupportSummary summary;
    const Status verified =
        attention.Verify(variant, options.seed + 1, context.common.threads, summary);
    if (!verified.ok()) {
      return CommandResult::Failure(NameOf(spec) + ": " + verified.message());
    }
    result.supports.push_back(summary);
    calls.push_back([variant, outputs, run] { return AttentionForward(variant, outputs, run); });
  }
  result.dense_operations = 2.0 * static_cast<double>(VisiblePairs(attention.problem)) *
                            static_cast<double>(options.shape.heads * options.shape.head_size);
  Expected<std::vector<Timing>> timings = TimeInTurn(context.common, calls, options.rounds);
  if (!timings.ok()) return CommandResult::Failure(timings.status().message());
  result.timings = std::move(timings).value();
  return {};
}

CommandResult BenchAttention(const Context& context, BenchAttentionOptions options) {
  const Expected<DType> dtype = ParseFloatingType(options.dtype);
  if (!dtype.ok()) return dtype.status();
  bench::WorkloadShape& shape = options.shape;
  shape.query_length = shape.key_length;
  shape.kv_heads = options.kv_heads.value_or(shape.heads);
  if (shape.heads % shape.kv_heads != 0) {
    return Status::InvalidArgument(
        fmt::format("--kv-heads: got {}; must divide --heads {}", shape.kv_heads, shape.heads));
  }
  std::vector<bench::WorkloadSpec> specs;
  for (const std::string& name : options.workloads) {
    const Expected<bench::WorkloadSpec> spec = bench::ParseWorkload(name);
    if (!spec.ok()) return spec.status();
    specs.push_back(*spec);
  }

  Json results = Json::array();
  Table table({"workload", "alpha", "median ms", "min ms", "max ms", "GFLOP/s", "keys a row",
               "empty tiles"});
  for (const bench::WorkloadSpec& spec : specs) {
    CaseResult measured;
    CommandResult ended = BenchOne(context, options, *dtype, spec, measured);
    if (ended.exit_code() != 0) return ended;
    for (size_t i = 0; i < options.alphas.size(); ++i) {
      const Timing& timing = measured.timings[i];
      const SupportSummary& support = measured.supports[i];
      const double speed = measured.dense_operations / timing.median * 1e-9;
      Json result = {{"workload", NameOf(spec)}, {"alpha", options.alphas[i]}};
      result.update(TimingToJson(timing));
      result["dense_gigaflops"] = speed;
      result["mean_keys_a_row"] = support.mean_keys;
      result["empty_tile_share"] = support.empty_tile_share;
      results.push_back(result);
      table.Add({NameOf(spec), fmt::format("{:g}", options.alphas[i]),
                 fmt::format("{:.2f}", timing.median * 1e3),
                 fmt::format("{:.2f}", timing.min * 1e3), fmt::format("{:.2f}", timing.max * 1e3),
                 fmt::format("{:.1f}", speed), fmt::format("{:.1f}", support.mean_keys),
                 fmt::format("{:.1f} %", support.empty_tile_share * 100)});
    }
  }
  if (context.common.json) {
    PrintJson({{"command", "bench attention"},
               {"batch", shape.batch},
               {"heads", shape.heads},
               {"kv_heads", shape.kv_heads},
               {"length", shape.key_length},
               {"head_size", shape.head_size},
               {"value_size", shape.value_size},
               {"dtype", options.dtype},
               {"causal", options.causal},
               {"seed", options.seed},
               {"setting", SettingToJson(context)},
               {"results", results}});
    return {};
  }
  fmt::print(
      "attention forward, batch {}, {} heads ({} of keys), length {}, head size {}, {}, {}, "
      "{} rounds; {} rows of each verified\n",
      shape.batch, shape.heads, shape.kv_heads, shape.key_length, shape.head_size, options.dtype,
      options.causal ? "causal" : "not causal", options.rounds, kVerifiedRows);
  fmt::print("GFLOP/s: operations of one dense QKᵀ over the visible pairs, by the whole time\n\n");
  table.Print();
  PrintSetting(context);
  return {};
}

}  // namespace

void AddBenchAttentionCommand(CLI::App& bench, Context& context) {
  auto options = std::make_shared<BenchAttentionOptions>();
  CLI::App* command = AddCommand(bench, context, "attention", "Attention over the shared workloads",
                                 [&context, options] { return BenchAttention(context, *options); });
  command->footer(
      "Workloads: gauss(SIGMA), scores of that standard deviation; topic(COUNT), segments of 256\n"
      "positions about one of COUNT topics; local, slowly changing positions; nape, gauss(1) with\n"
      "ALiBi on half of the heads. α = 1 is this library's flash softmax. Empty tiles are the\n"
      "128×64 tiles of query-key pairs in which every visible probability is an exact zero.");
  command->add_option("--workload", options->workloads, "Workloads to measure")
      ->capture_default_str();
  command->add_option("--alpha", options->alphas, "α > 0 to measure; several are compared in turn")
      ->delimiter(',')
      ->capture_default_str();
  const CLI::Validator size = SizeRange();
  command->add_option("--batch", options->shape.batch, "Batch entries")
      ->check(size)
      ->capture_default_str();
  command->add_option("--heads", options->shape.heads, "Query heads")
      ->check(size)
      ->capture_default_str();
  command->add_option("--kv-heads", options->kv_heads, "Key and value heads [default: --heads]")
      ->check(size);
  command->add_option("--length", options->shape.key_length, "Query and key positions")
      ->check(size)
      ->capture_default_str();
  command->add_option("--head-size", options->shape.head_size, "Numbers in a query or key")
      ->check(size)
      ->capture_default_str();
  command->add_option("--value-size", options->shape.value_size, "Numbers in a value")
      ->check(size)
      ->capture_default_str();
  command
      ->add_option("--dtype", options->dtype, std::string("Type of numbers: ") + kFloatingTypeNames)
      ->capture_default_str();
  command->add_flag("--causal,!--no-causal", options->causal,
                    "Queries see only keys up to their own position [default: on]");
  command->add_option("--rounds", options->rounds, "Calls that are timed for each α and workload")
      ->check(CLI::Range(1, kMaxRounds))
      ->capture_default_str();
  AddSeed(*command, options->seed, "Which random numbers");
}

}  // namespace flash_entmax::cli
