// The subcommands `train`, `eval` and `mistakes` of the command-line program.

#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "command.h"
#include "config.h"
#include "mistakes.h"
#include "output.h"
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
  std::vector<std::string> variants;  // empty: every one
  std::vector<int64_t> seeds;         // empty: every one of the recipe
  std::string device = "cpu";
  double time_limit = 0.0;
  std::string part = "1/1";
  std::vector<std::string> overrides;
  bool no_evaluation = false;
  int64_t jobs = 1;
};

// What a command tells of its runs. While they go on: one line on a terminal's stderr, rewritten at
// most ten times a second; with several runs at a time it shows what each of them said last. Of a
// run that has ended: a line on stdout or, with --json, an entry of the one document.
class Reporter {
 public:
  explicit Reporter(const CommonOptions& common)
      : json_(common.json),
        quiet_(common.quiet),
        shows_(!common.json && !common.quiet && isatty(STDERR_FILENO) == 1) {}
  ~Reporter() { Clear(); }
  Reporter(const Reporter&) = delete;
  Reporter& operator=(const Reporter&) = delete;

  void Show(const std::string& run, const std::string& text) {
    const std::lock_guard<std::mutex> lock(mutex_);
    texts_[run] = text;
    const auto now = std::chrono::steady_clock::now();
    if (!shows_ || (drawn_ && now - last_ < std::chrono::milliseconds(100))) return;
    last_ = now;
    drawn_ = true;
    std::string line;
    for (const auto& [name, said] : texts_) line += (line.empty() ? "" : " │ ") + said;
    std::fputs(("\r\x1B[K" + line).c_str(), stderr);
    std::fflush(stderr);
  }
  // Takes a run's text away.
  void Forget(const std::string& run) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Drop(run);
  }
  // The same, and says for good what has become of the run; `facts` are members of its entry.
  void Finish(const std::string& run, const std::string& outcome, const Json& facts) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Drop(run);
    Json entry = {{"run", run}};
    entry.update(facts);
    runs_.push_back(std::move(entry));
    if (json_ || quiet_) return;
    std::fputs(fmt::format("{}: {}\n", run, outcome).c_str(), stdout);
    std::fflush(stdout);
  }
  // After the last run.
  void End(const std::string& command) const {
    if (json_) PrintJson({{"command", command}, {"runs", runs_}});
  }

 private:
  void Drop(const std::string& run) {
    texts_.erase(run);
    Clear();
  }
  void Clear() {
    if (drawn_) std::fputs("\r\x1B[K", stderr);
    drawn_ = false;
  }

  const bool json_, quiet_, shows_;
  std::mutex mutex_;
  std::map<std::string, std::string> texts_;
  Json runs_ = Json::array();
  bool drawn_ = false;
  std::chrono::steady_clock::time_point last_;
};

std::string Describe(const RunConfig& run) {
  return fmt::format("{}/{}/seed{}", run.recipe, run.variant, run.seed);
}

std::string FolderOf(const LabOptions& options, const RunConfig& run) {
  return (std::filesystem::path(options.folder) / Describe(run)).string();
}

std::string Bar(const std::string& name, const lab::TrainingReport& report, int width) {
  const double share = static_cast<double>(report.step) / static_cast<double>(report.steps);
  std::string bar;
  for (int i = 0; i < width; ++i) bar += static_cast<double>(i) < share * width ? "█" : "░";
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
  std::vector<std::string> names;
  std::map<size_t, std::vector<RunConfig>> rounds;  // every variant once, with its n-th seed
  size_t seed_number = 0;
  for (const RunConfig& run : recipe->runs) {
    const bool first = names.empty() || names.back() != run.variant;
    if (first) names.push_back(run.variant);
    seed_number = first ? 0 : seed_number + 1;
    if (options.seeds.empty()) {
      rounds[seed_number].push_back(run);
    } else if (first) {
      for (size_t i = 0; i < options.seeds.size(); ++i) {
        rounds[i].push_back(run);
        rounds[i].back().seed = static_cast<uint64_t>(options.seeds[i]);
      }
    }
  }
  const auto among = [](const std::string& name, const std::vector<std::string>& all) {
    return std::find(all.begin(), all.end(), name) != all.end();
  };
  for (const std::string& wanted : options.variants) {
    if (among(wanted, names)) continue;
    return Status::InvalidArgument("--variant: got \"" + wanted + "\"; must be one of " +
                                   fmt::format("{}", fmt::join(names, ", ")));
  }
  std::vector<RunConfig> chosen;
  int64_t number = 0;
  for (const auto& [round, runs] : rounds) {
    for (const RunConfig& run : runs) {
      if (!options.variants.empty() && !among(run.variant, options.variants)) continue;
      if (number++ % parts == part - 1) chosen.push_back(run);
    }
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

std::string ResultOf(const LabOptions& options, const RunConfig& run) {
  return FolderOf(options, run) + "/result.json";
}

Status EvaluateRun(const LabOptions& options, const Context& context, const RunConfig& run,
                   Reporter* reporter) {
  const std::string name = Describe(run);
  const Status status =
      lab::Evaluate(run, MakeOptions(options, context, run), [&](int64_t done, int64_t total) {
        reporter->Show(name, fmt::format("{} evaluating, length {} of {}", name, done + 1, total));
      });
  if (!status.ok()) {
    reporter->Forget(name);
    return status;
  }
  const std::string result = ResultOf(options, run);
  reporter->Finish(name, "results in " + result, {{"outcome", "evaluated"}, {"result", result}});
  return status;
}

// Trains a run and evaluates it.
CommandResult TrainRun(const LabOptions& options, const Context& context, const RunConfig& run,
                       double seconds_left, Reporter* reporter) {
  const std::string name = Describe(run);
  lab::TrainingOptions training = MakeOptions(options, context, run);
  if (const std::string result = ResultOf(options, run); std::filesystem::exists(result)) {
    // Of the same recipe with other settings it would be no result of this run.
    const Status status = lab::CheckFolder(run, training.folder);
    if (!status.ok()) return FromStatus(status);
    reporter->Finish(name, "finished before", {{"outcome", "finished before"}, {"result", result}});
    return {};
  }
  training.time_limit = seconds_left;
  training.progress = [&](const lab::TrainingReport& report) {
    reporter->Show(name, Bar(name, report, options.jobs > 1 ? 8 : 20));
  };
  const Expected<lab::TrainingOutcome> outcome = lab::Train(run, training);
  if (!outcome.ok()) {
    reporter->Forget(name);
    return FromStatus(outcome.status());
  }
  reporter->Finish(
      name,
      fmt::format("step {} of {}, loss {:.5f}", outcome->step, run.training.steps, outcome->loss),
      {{"outcome", outcome->finished ? "trained" : "stopped"},
       {"step", outcome->step},
       {"steps", run.training.steps},
       {"loss", JsonNumber(outcome->loss)},
       {"folder", training.folder}});
  if (!outcome->finished) {
    return CommandResult::Failure("stopped before the end; call again to go on");
  }
  if (options.no_evaluation) return {};
  const Status status = EvaluateRun(options, context, run, reporter);
  return status.ok() ? CommandResult() : FromStatus(status);
}

CommandResult RunTrain(const LabOptions& options, const Context& context) {
  const Expected<std::vector<RunConfig>> runs = Choose(options);
  if (!runs.ok()) return runs.status();  // The command line or the recipe: bad input.
  std::signal(SIGINT, OnSignal);
  std::signal(SIGTERM, OnSignal);
  const auto start = std::chrono::steady_clock::now();
  Reporter reporter(context.common);
  std::mutex mutex;
  size_t next = 0;
  CommandResult result;  // of the first run that fails: no other is begun after it
  const auto work = [&] {
    for (;;) {
      const RunConfig* run = nullptr;
      double left = 0.0;
      {
        const std::lock_guard<std::mutex> lock(mutex);
        if (next == runs->size() || result.exit_code() != 0) return;
        const double used =
            std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (options.time_limit > 0 && used >= options.time_limit) {
          result = CommandResult::Failure("the time limit is used up; call again to go on");
          return;
        }
        left = options.time_limit > 0 ? options.time_limit - used : 0.0;
        run = &(*runs)[next++];
      }
      const CommandResult outcome = TrainRun(options, context, *run, left, &reporter);
      const std::lock_guard<std::mutex> lock(mutex);
      if (outcome.exit_code() != 0 && result.exit_code() == 0) result = outcome;
    }
  };
  std::vector<std::thread> others;
  for (int64_t job = 1; job < std::min<int64_t>(options.jobs, std::ssize(*runs)); ++job) {
    others.emplace_back(work);
  }
  work();
  for (std::thread& other : others) other.join();
  if (result.exit_code() != CommandResult::kBadInput) reporter.End("train");
  return result;
}

CommandResult RunEval(const LabOptions& options, const Context& context) {
  const Expected<std::vector<RunConfig>> runs = Choose(options);
  if (!runs.ok()) return runs.status();  // The command line or the recipe: bad input.
  Reporter reporter(context.common);
  for (const RunConfig& run : *runs) {
    const Status status = EvaluateRun(options, context, run, &reporter);
    if (!status.ok()) return FromStatus(status);
  }
  reporter.End("eval");
  return {};
}

CommandResult RunMistakes(const std::string& path, const Context& context) {
  const Expected<std::string> text = lab::ReadFile(path);
  if (!text.ok()) return text.status();
  const Expected<std::vector<lab::ExplainedLength>> lengths = lab::ExplainMistakes(*text);
  if (!lengths.ok()) {
    return Status(lengths.status().code(), path + ": " + lengths.status().message());
  }
  Json document = Json::array();
  std::string lines;
  for (const lab::ExplainedLength& length : *lengths) {
    lines += fmt::format("length {} ({:g} x): ", length.length, length.multiple);
    if (!length.error.empty()) {
      lines += length.error + "\n";
      document.push_back(
          {{"length", length.length}, {"multiple", length.multiple}, {"error", length.error}});
      continue;
    }
    lines += fmt::format("{:.1f} % of the samples right{}\n", 100 * length.exact_match,
                         length.exact_match < 1.0 && length.samples.empty()
                             ? "; the result does not list the others"
                             : "");
    Json samples = Json::array();
    for (const lab::Mistake& sample : length.samples) {
      Json wrong = Json::array();
      for (const lab::WrongToken& token : sample.wrong) {
        lines += fmt::format("  sample {}, place {}: {}, not {}{}\n", sample.sample, token.place,
                             token.predicted, token.expected,
                             token.source.empty() ? "" : ", " + token.source);
        wrong.push_back({{"place", token.place},
                         {"expected", token.expected},
                         {"predicted", token.predicted},
                         {"source", token.source}});
      }
      samples.push_back({{"sample", sample.sample}, {"wrong", wrong}});
    }
    Json entry = {{"length", length.length},
                  {"multiple", length.multiple},
                  {"exact_match", length.exact_match},
                  {"samples", samples}};
    if (length.tokens > 0) {
      lines += fmt::format(
          "  {} of {} wrong symbols are those of other keys, at the same place in their values; by "
          "chance {:.1f} would be\n",
          length.with_source, length.tokens, length.by_chance);
      entry.update({{"tokens", length.tokens},
                    {"with_source", length.with_source},
                    {"by_chance", length.by_chance}});
    }
    document.push_back(std::move(entry));
  }
  if (context.common.json) {
    PrintJson({{"command", "mistakes"}, {"result", path}, {"lengths", document}});
  } else {
    std::fputs(lines.c_str(), stdout);
  }
  return {};
}

void AddLabFlags(CLI::App* command, LabOptions* options) {
  command->add_option("recipe", options->recipe, "Recipe (JSON; docs/lab.md lists its keys)")
      ->required();
  command->add_option("--out", options->folder, "Folder of results: OUT/recipe/variant/seedN")
      ->capture_default_str();
  command
      ->add_option("--variant", options->variants,
                   "Only these variants of the recipe, as in softmax,entmax")
      ->delimiter(',');
  command->add_option("--seed", options->seeds, "These seeds instead of the recipe's, as in 1,2")
      ->delimiter(',')
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
  command
      ->add_option(
          "--jobs", options->jobs,
          "Runs at a time, each on a thread of this program; on a GPU their kernels overlap")
      ->check(CLI::Range(1, 64))
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

void AddMistakesCommand(CLI::App& program, Context& context) {
  const auto path = std::make_shared<std::string>();
  CLI::App* command = AddCommand(program, context, "mistakes",
                                 "Show what a trained model answered wrongly, and what its answers "
                                 "may come from.",
                                 [path, &context] { return RunMistakes(*path, context); });
  command->add_option("result", *path, "result.json of a run; it lists up to 20 samples a length")
      ->required();
}

}  // namespace flash_entmax::cli
