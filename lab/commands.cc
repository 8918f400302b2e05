// The subcommands `train` and `eval` of the command-line program.

#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "command.h"
#include "config.h"
#include "trainer.h"

namespace flash_entmax::cli {
namespace {

using lab::RunConfig;

volatile std::sig_atomic_t interrupted = 0;

// The first signal asks for a checkpoint and a clean end, the second ends at once.
void OnSignal(int signal) {
  interrupted = 1;
  std::signal(signal, SIG_DFL);
}

struct LabOptions {
  std::string recipe;
  std::string folder = "out/lab";
  std::string variant;  // empty: every one
  int64_t seed = -1;    // negative: every one of the recipe
  std::string device = "cpu";
  double time_limit = 0.0;
  std::string part = "1/1";
  std::vector<std::string> overrides;
  bool no_evaluation = false;
};

// One line on a terminal's stderr, rewritten at most ten times a second.
class StatusLine {
 public:
  explicit StatusLine(const CommonOptions& common)
      : enabled_(!common.json && !common.quiet && isatty(STDERR_FILENO) == 1) {}
  ~StatusLine() { Clear(); }
  StatusLine(const StatusLine&) = delete;
  StatusLine& operator=(const StatusLine&) = delete;

  void Show(const std::string& text) {
    const auto now = std::chrono::steady_clock::now();
    if (!enabled_ || (drawn_ && now - last_ < std::chrono::milliseconds(100))) return;
    last_ = now;
    drawn_ = true;
    std::fputs(("\r\x1B[K" + text).c_str(), stderr);
    std::fflush(stderr);
  }
  void Clear() {
    if (drawn_) std::fputs("\r\x1B[K", stderr);
    drawn_ = false;
  }

 private:
  const bool enabled_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point last_;
};

std::string Describe(const RunConfig& run) {
  return fmt::format("{}/{}/seed{}", run.recipe, run.variant, run.seed);
}

std::string FolderOf(const LabOptions& options, const RunConfig& run) {
  return (std::filesystem::path(options.folder) / Describe(run)).string();
}

std::string Bar(const std::string& name, const lab::TrainingReport& report) {
  constexpr int kWidth = 20;
  const double share = static_cast<double>(report.step) / static_cast<double>(report.steps);
  std::string bar;
  for (int i = 0; i < kWidth; ++i) bar += static_cast<double>(i) < share * kWidth ? "█" : "░";
  const double left =
      static_cast<double>(report.steps - report.step) / std::max(report.steps_per_second, 1e-9);
  std::string line =
      fmt::format("{} {} {:3.0f} %  loss {:.4f}  {:.3g} steps/s  {:.0f} s left", name, bar,
                  share * 100, report.loss, report.steps_per_second, left);
  if (report.exact_match >= 0) line += fmt::format("  exact {:.1f} %", 100 * report.exact_match);
  return line;
}

// The runs of the recipe that were asked for.
Expected<std::vector<RunConfig>> Choose(const LabOptions& options) {
  const Expected<lab::Recipe> recipe = lab::ReadRecipe(options.recipe, options.overrides);
  if (!recipe.ok()) return recipe.status();
  int64_t part = 0, parts = 0;
  char rest = 0;
  if (std::sscanf(options.part.c_str(), "%ld/%ld%c", &part, &parts, &rest) != 2 || part < 1 ||
      part > parts) {
    return Status::InvalidArgument("--part: got \"" + options.part +
                                   "\"; must be K/N with 1 ≤ K ≤ N");
  }
  std::vector<RunConfig> chosen;
  std::string variants;
  bool known = options.variant.empty();
  int64_t number = 0;
  for (const RunConfig& run : recipe->runs) {
    if (variants.find(run.variant) == std::string::npos) {
      variants += (variants.empty() ? "" : ", ") + run.variant;
    }
    if (!options.variant.empty() && run.variant != options.variant) continue;
    known = true;
    RunConfig wanted = run;
    if (options.seed >= 0) {
      wanted.seed = static_cast<uint64_t>(options.seed);
      if (!chosen.empty() && chosen.back().variant == run.variant) continue;
    }
    if (options.seed >= 0 || number++ % parts == part - 1) chosen.push_back(std::move(wanted));
  }
  if (!known) {
    return Status::InvalidArgument("--variant: got \"" + options.variant + "\"; must be one of " +
                                   variants);
  }
  return chosen;
}

CommandResult FromStatus(const Status& status) {
  const bool failure = status.code() == StatusCode::kIo || status.code() == StatusCode::kDevice ||
                       status.code() == StatusCode::kOutOfMemory;
  return failure ? CommandResult::Failure(status.message()) : CommandResult(status);
}

lab::TrainingOptions MakeOptions(const LabOptions& options, const Context& context,
                                 const RunConfig& run) {
  lab::TrainingOptions training;
  training.folder = FolderOf(options, run);
  training.device = options.device;
  training.threads = context.common.threads;
  training.stop = [] { return interrupted != 0; };
  return training;
}

Status EvaluateRun(const LabOptions& options, const Context& context, const RunConfig& run) {
  StatusLine line(context.common);
  const Status status =
      lab::Evaluate(run, MakeOptions(options, context, run), [&](int64_t done, int64_t total) {
        line.Show(fmt::format("{} evaluating, length {} of {}", Describe(run), done + 1, total));
      });
  line.Clear();
  if (status.ok() && !context.common.quiet) {
    fmt::print("{}: results in {}/result.json\n", Describe(run), FolderOf(options, run));
  }
  return status;
}

CommandResult RunTrain(const LabOptions& options, const Context& context) {
  const Expected<std::vector<RunConfig>> runs = Choose(options);
  if (!runs.ok()) return FromStatus(runs.status());
  std::signal(SIGINT, OnSignal);
  std::signal(SIGTERM, OnSignal);
  const auto start = std::chrono::steady_clock::now();
  for (const RunConfig& run : *runs) {
    const double used =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (options.time_limit > 0 && used >= options.time_limit) {
      return CommandResult::Failure("the time limit is used up; call again to go on");
    }
    lab::TrainingOptions training = MakeOptions(options, context, run);
    if (std::filesystem::exists(std::filesystem::path(training.folder) / "result.json")) {
      if (!context.common.quiet) fmt::print("{}: finished before\n", Describe(run));
      continue;
    }
    if (options.time_limit > 0) training.time_limit = options.time_limit - used;
    StatusLine line(context.common);
    training.progress = [&](const lab::TrainingReport& report) {
      line.Show(Bar(Describe(run), report));
    };
    const Expected<lab::TrainingOutcome> outcome = lab::Train(run, training);
    line.Clear();
    if (!outcome.ok()) return FromStatus(outcome.status());
    if (!context.common.quiet) {
      fmt::print("{}: step {} of {}, loss {:.5f}\n", Describe(run), outcome->step,
                 run.training.steps, outcome->loss);
      std::fflush(stdout);
    }
    if (!outcome->finished) {
      return CommandResult::Failure("stopped before the end; call again to go on");
    }
    if (options.no_evaluation) continue;
    const Status status = EvaluateRun(options, context, run);
    if (!status.ok()) return FromStatus(status);
  }
  return {};
}

CommandResult RunEval(const LabOptions& options, const Context& context) {
  const Expected<std::vector<RunConfig>> runs = Choose(options);
  if (!runs.ok()) return FromStatus(runs.status());
  for (const RunConfig& run : *runs) {
    const Status status = EvaluateRun(options, context, run);
    if (!status.ok()) return FromStatus(status);
  }
  return {};
}

void AddLabFlags(CLI::App* command, LabOptions* options) {
  command->add_option("recipe", options->recipe, "Recipe (JSON; docs/lab.md lists its keys)")
      ->required();
  command->add_option("--out", options->folder, "Folder of results: OUT/recipe/variant/seedN")
      ->capture_default_str();
  command->add_option("--variant", options->variant, "Only this variant of the recipe");
  command->add_option("--seed", options->seed, "This seed instead of the recipe's")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
  command->add_option("--part", options->part, "K/N: only every N-th run, from the K-th")
      ->capture_default_str();
  command->add_option("--device", options->device, "cpu or cuda")->capture_default_str();
  command->add_option("--set", options->overrides,
                      "Override a key of the recipe, as in training.steps=100; may be repeated");
}

}  // namespace

void AddTrainCommand(CLI::App& program, Context& context) {
  const auto options = std::make_shared<LabOptions>();
  CLI::App* command = AddCommand(
      program, context, "train",
      "Train the runs of a recipe and evaluate each; goes on where an earlier call stopped.",
      [options, &context] { return RunTrain(*options, context); });
  AddLabFlags(command, options.get());
  command
      ->add_option("--time-limit", options->time_limit,
                   "Seconds after which to write a checkpoint and end; 0 for none")
      ->check(CLI::Range(0.0, 1e9))
      ->capture_default_str();
  command->add_flag("--no-eval", options->no_evaluation, "Leave the evaluation to `eval`");
}

void AddEvalCommand(CLI::App& program, Context& context) {
  const auto options = std::make_shared<LabOptions>();
  CLI::App* command =
      AddCommand(program, context, "eval",
                 "Evaluate the checkpoints of a recipe's runs at multiples of the training length.",
                 [options, &context] { return RunEval(*options, context); });
  AddLabFlags(command, options.get());
}

}  // namespace flash_entmax::cli
