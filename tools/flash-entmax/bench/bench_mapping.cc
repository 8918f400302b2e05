// `flash-entmax bench mapping`: the mapping over the rows of a matrix.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "attention_flags.h"
#include "bench/bench.h"
#include "bench/timing.h"
#include "check/precision.h"
#include "command.h"
#include "flash_entmax/mapping.h"
#include "math/element.h"
#include "output.h"
#include "owned_tensor.h"
#include "random.h"
#include "reference/mapping_reference.h"

namespace flash_entmax::cli {
namespace {

struct BenchMappingOptions {
  int64_t rows = 4096;
  int64_t columns = 4096;
  std::string dtype = "float32";
  std::vector<double> alphas = {1.0, 1.25, 1.5, 2.0};
  double sigma = 1.0;
  int rounds = 15;
  uint64_t seed = 1;
};

// Buffers that calls rotate over, so that no call finds its input in a cache because the call
// before it read the same.
constexpr size_t kBuffers = 2;

struct Buffers {
  std::vector<OwnedTensor> scores;
  std::vector<OwnedTensor> probabilities;
};

Expected<Buffers> MakeBuffers(const BenchMappingOptions& options, DType dtype) {
  Buffers buffers;
  bench::Random random(options.seed);
  for (size_t b = 0; b < kBuffers; ++b) {
    for (auto* list : {&buffers.scores, &buffers.probabilities}) {
      Expected<OwnedTensor> tensor =
          OwnedTensor::Allocate("scores", dtype, {options.rows, options.columns});
      if (!tensor.ok()) return tensor.status();
      const MutableTensorView& view = tensor->mutable_view();
      for (int64_t i = 0; i < view.num_elements(); ++i) {
        WriteElement(view, i, options.sigma * random.Gauss());
      }
      list->push_back(std::move(tensor).value());
    }
  }
  return buffers;
}

// Maps once; compares random rows with the reference by the bound of mapping.h.
Status Verify(const Buffers& buffers, const BenchMappingOptions& options,
              const MappingOptions& mapping, double& mean_support) {
  const TensorView scores = buffers.scores[0].view();
  const MutableTensorView& probabilities = buffers.probabilities[0].mutable_view();
  Expected<OwnedTensor> sizes =
      OwnedTensor::Allocate("support size", DType::kInt64, {options.rows, 1});
  if (!sizes.ok()) return sizes.status();
  MappingExtras extras;
  extras.support_size = sizes->mutable_view();
  if (Status status = MappingForward(scores, mapping, probabilities, extras); !status.ok()) {
    return status;
  }
  double total = 0.0;
  for (int64_t row = 0; row < options.rows; ++row) total += ReadElement(sizes->view(), row);
  mean_support = total / static_cast<double>(options.rows);

  bench::Random random(options.seed + 1);
  const double epsilon = EpsilonOf(scores.dtype);
  for (int i = 0; i < kVerifiedRows; ++i) {
    const int64_t start = random.Integer(0, options.rows - 1) * options.columns;
    std::vector<double> row;
    for (int64_t c = 0; c < options.columns; ++c) row.push_back(ReadElement(scores, start + c));
    const auto expected = reference::MapRow(row, mapping.kind, mapping.alpha).probability;
    // The bound of mapping.h with the spread of all scores, which is at least that of the support.
    const auto [low, high] = std::minmax_element(row.begin(), row.end());
    const double shift = 4.0 * epsilon * std::max(1.0, *high - *low);
    for (int64_t c = 0; c < options.columns; ++c) {
      const double p = expected[static_cast<size_t>(c)];
      const double actual = ReadElement(probabilities.view(), start + c);
      const double relative = p > 0.0 ? 4.0 + 2.0 * std::abs(std::log(p)) : 0.0;
      const double bound = epsilon * relative * p + ProbabilityShift(p, mapping.alpha, shift) +
                           SmallestOf(scores.dtype);
      if (!(std::abs(actual - p) <= bound)) {
        return Status::InvalidArgument(
            fmt::format("alpha {}: row {}, column {}: got {}, the reference says {}", mapping.alpha,
                        start / options.columns, c, actual, p));
      }
    }
  }
  return Status::Ok();
}

CommandResult BenchMapping(const Context& context, const BenchMappingOptions& options) {
  if (!(std::isfinite(options.sigma) && options.sigma >= 0.0)) {
    return Status::InvalidArgument(
        fmt::format("--sigma: got {}; must be finite and ≥ 0", options.sigma));
  }
  const Expected<DType> dtype = ParseFloatingType(options.dtype);
  if (!dtype.ok()) return dtype.status();
  Expected<Buffers> buffers = MakeBuffers(options, *dtype);
  if (!buffers.ok()) return buffers.status();

  std::vector<std::function<Status()>> calls;
  std::vector<double> mean_support;
  size_t turn = 0;
  for (const double alpha : options.alphas) {
    MappingOptions mapping;
    mapping.alpha = alpha;
    mapping.num_threads = context.common.threads;
    // Arguments that the library rejects are the user's; a wrong result is a failure.
    Expected<OwnedTensor> probe = OwnedTensor::Allocate("probe", *dtype, {1, 1});
    if (!probe.ok()) return probe.status();
    WriteElement(probe->mutable_view(), 0, 0.0);
    if (Status status = MappingForward(probe->view(), mapping, probe->mutable_view());
        !status.ok()) {
      return status;
    }
    mean_support.push_back(0.0);
    const Status verified = Verify(*buffers, options, mapping, mean_support.back());
    if (!verified.ok()) return CommandResult::Failure(verified.message());
    calls.push_back([&buffers, &turn, mapping] {
      turn = (turn + 1) % kBuffers;
      return MappingForward(buffers->scores[turn].view(), mapping,
                            buffers->probabilities[turn].mutable_view());
    });
  }
  const Expected<std::vector<Timing>> timings = TimeInTurn(context.common, calls, options.rounds);
  if (!timings.ok()) return CommandResult::Failure(timings.status().message());

  const double bytes = 2.0 * static_cast<double>(options.rows * options.columns) *
                       static_cast<double>(SizeOf(*dtype));
  Json results = Json::array();
  Table table({"alpha", "median ms", "min ms", "max ms", "GB/s", "mean support"});
  for (size_t i = 0; i < options.alphas.size(); ++i) {
    const Timing& timing = (*timings)[i];
    const double speed = bytes / timing.median * 1e-9;
    Json result = {{"alpha", options.alphas[i]}};
    result.update(TimingToJson(timing));
    result["gigabytes_per_second"] = speed;
    result["mean_support"] = mean_support[i];
    results.push_back(result);
    table.Add({fmt::format("{:g}", options.alphas[i]), fmt::format("{:.2f}", timing.median * 1e3),
               fmt::format("{:.2f}", timing.min * 1e3), fmt::format("{:.2f}", timing.max * 1e3),
               fmt::format("{:.1f}", speed), fmt::format("{:.1f}", mean_support[i])});
  }
  if (context.common.json) {
    PrintJson({{"command", "bench mapping"},
               {"rows", options.rows},
               {"columns", options.columns},
               {"dtype", options.dtype},
               {"sigma", options.sigma},
               {"seed", options.seed},
               {"setting", SettingToJson(context)},
               {"results", results}});
    return {};
  }
  fmt::print("mapping of {} x {} {}, scores N(0, {:g}²), {} rounds; {} rows of each verified\n\n",
             options.rows, options.columns, options.dtype, options.sigma, options.rounds,
             kVerifiedRows);
  table.Print();
  PrintSetting(context);
  return {};
}

}  // namespace

void AddBenchMappingCommand(CLI::App& bench, Context& context) {
  auto options = std::make_shared<BenchMappingOptions>();
  CLI::App* command = AddCommand(bench, context, "mapping", "α-entmax over the rows of a matrix",
                                 [&context, options] { return BenchMapping(context, *options); });
  command->footer(
      "α = 1 is this library's softmax. GB/s counts one reading of the scores and one writing of\n"
      "the probabilities.");
  const CLI::Validator size = SizeRange();
  command->add_option("--rows", options->rows, "Rows")->check(size)->capture_default_str();
  command->add_option("--columns", options->columns, "Numbers in a row")
      ->check(size)
      ->capture_default_str();
  command
      ->add_option("--dtype", options->dtype, std::string("Type of numbers: ") + kFloatingTypeNames)
      ->capture_default_str();
  command->add_option("--alpha", options->alphas, "α to measure; several are compared in turn")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--sigma", options->sigma, "Standard deviation of the scores")
      ->capture_default_str();
  command->add_option("--rounds", options->rounds, "Calls that are timed for each α")
      ->check(CLI::Range(1, kMaxRounds))
      ->capture_default_str();
  AddSeed(*command, options->seed, "Which random numbers");
}

}  // namespace flash_entmax::cli
