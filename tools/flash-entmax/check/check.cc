// `flash-entmax check`: the library against its reference, on the user's own machine.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "check/attention_problem.h"
#include "check/error_table.h"
#include "check/mapping_problem.h"
#include "command.h"
#include "flash_entmax/machine.h"
#include "machine_name.h"
#include "output.h"
#include "progress.h"

namespace flash_entmax::cli {
namespace {

struct CheckOptions {
  uint64_t seed = 1;
  int64_t problems = 400;
  std::optional<int64_t> problem;  // This one only.
};

// Every problem of this many is one of attention, which costs more than one of rows.
constexpr int64_t kAttentionEvery = 4;

// More than anybody waits for are a typing error.
constexpr int64_t kMaxProblems = 1'000'000'000;

// With no instruction set chosen, all that the machine has.
std::vector<std::string> ChosenInstructionSets(const CommonOptions& common) {
  if (common.instruction_set != "best") return {ActiveInstructionSet()};
  return SupportedInstructionSets();
}

using ErrorTables = std::vector<std::pair<std::string, ErrorTable>>;

// Makes one problem and compares it under every instruction set; the reference is computed once.
template <typename Problem>
Status CompareAll(const Expected<Problem>& problem, int threads, ErrorTables& tables) {
  if (!problem.ok()) return problem.status();
  for (auto& [instruction_set, errors] : tables) {
    if (Status status = SelectInstructionSet(instruction_set); !status.ok()) return status;
    if (Status status = problem->Compare(threads, errors); !status.ok()) return status;
  }
  return Status::Ok();
}

bool IsAttention(int64_t number) { return number % kAttentionEvery == 0; }

Status CompareProblem(uint64_t seed, int64_t number, int threads, ErrorTables& tables) {
  if (IsAttention(number)) {
    return CompareAll(RandomAttention::Make(seed, number, threads), threads, tables);
  }
  return CompareAll(MappingProblem::Make(seed, number), threads, tables);
}

// What the problem was, for a report of its failure.
std::string DescribeProblem(uint64_t seed, int64_t number, int threads) {
  if (IsAttention(number)) {
    const auto problem = RandomAttention::Make(seed, number, threads);
    return problem.ok() ? problem->Describe() : problem.status().message();
  }
  const auto problem = MappingProblem::Make(seed, number);
  return problem.ok() ? problem->Describe() : problem.status().message();
}

CommandResult Check(const CommonOptions& common, const CheckOptions& options) {
  const int threads = common.threads > 0 ? common.threads : DefaultThreads();
  ErrorTables tables;
  for (const std::string& name : ChosenInstructionSets(common)) {
    tables.emplace_back(name, ErrorTable());
  }

  const int64_t first = options.problem.value_or(0);
  const int64_t end = options.problem.has_value() ? first + 1 : options.problems;
  const auto start = std::chrono::steady_clock::now();
  {
    Progress progress(common, "check", end - first, "problems");
    for (int64_t number = first; number < end; ++number) {
      const Status status = CompareProblem(options.seed, number, threads, tables);
      if (!status.ok()) {
        // The problems are valid, so an error is the library's.
        return CommandResult::Failure(
            fmt::format("problem {} of seed {}: {}", number, options.seed, status.message()));
      }
      progress.Add();
    }
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  bool passed = true;
  Json sets = Json::array();
  for (const auto& [name, errors] : tables) {
    passed = passed && errors.passed();
    if (common.json) {
      sets.push_back(
          {{"instruction_set", name}, {"passed", errors.passed()}, {"errors", errors.ToJson()}});
      continue;
    }
    fmt::print("{}\n", name);
    errors.Print();
    if (const int64_t worst = errors.worst_problem(); worst >= 0) {
      fmt::print("worst: problem {}: {}\n", worst, DescribeProblem(options.seed, worst, threads));
    }
    fmt::print("\n");
  }
  if (common.json) {
    PrintJson({{"command", "check"},
               {"seed", options.seed},
               {"first_problem", first},
               {"problems", end - first},
               {"threads", threads},
               {"processor", ProcessorName()},
               {"seconds", seconds},
               {"passed", passed},
               {"instruction_sets", sets}});
  } else {
    fmt::print("{}: {} problems of seed {}, {} threads, {:.1f} s, {}\n", passed ? "PASS" : "FAIL",
               end - first, options.seed, threads, seconds, ProcessorName());
  }
  if (!passed) {
    return CommandResult::Failure(fmt::format(
        "check failed; repeat one problem by `flash-entmax check --seed {} --problem N`",
        options.seed));
  }
  return {};
}

}  // namespace

void AddCheckCommand(CLI::App& program, Context& context) {
  auto options = std::make_shared<CheckOptions>();
  CLI::App* command = AddCommand(program, context, "check", "Test this library on this machine",
                                 [&context, options] { return Check(context.common, *options); });
  command->footer(
      "Random problems over types, shapes and masks are compared with plain double loops, for\n"
      "every instruction set that this machine has, or the one that --isa names. Each line of the\n"
      "table shows the comparison that came nearest to its bound. An attention output may be off\n"
      "by twice the error of a plain computation in the same precision plus (2ε + "
      "ε·max|s|)·max|v|\n"
      "with s the scores; in float64, where the reference itself is no more precise, and for α > "
      "2,\n"
      "where probabilities have no bounded derivative, also by what rounding of the scores can "
      "do.\n"
      "A key may be in or out of a support against the reference only within rounding of the\n"
      "threshold. NaN where there should be a number is a failure.");
  AddSeed(*command, options->seed, "Which random problems");
  command->add_option("--problems", options->problems, "How many random problems")
      ->check(CLI::Range(int64_t{1}, kMaxProblems))
      ->capture_default_str();
  command->add_option("--problem", options->problem, "Run this problem only, to repeat a failure")
      ->check(CLI::Range(int64_t{0}, kMaxProblems));
}

}  // namespace flash_entmax::cli
