// What every subcommand shares: its common flags, how it ends, and how it is hooked into the
// program.

#ifndef FLASH_ENTMAX_TOOLS_COMMAND_H_
#define FLASH_ENTMAX_TOOLS_COMMAND_H_

#include <cstdint>
#include <functional>
#include <string>
#include <utility>

#include "flash_entmax/status.h"

namespace CLI {
class App;
class Validator;
}  // namespace CLI

namespace flash_entmax::cli {

// How a subcommand ended. main() prints the message to stderr and exits with the code.
class CommandResult {
 public:
  static constexpr int kFailure = 1;
  static constexpr int kBadInput = 2;

  CommandResult() = default;  // Success.
  // Every error of the library speaks of what the user gave it.
  CommandResult(const Status& status)  // NOLINT(google-explicit-constructor)
      : exit_code_(status.ok() ? 0 : kBadInput), message_(status.message()) {}
  // The input was fine and the work failed all the same.
  static CommandResult Failure(std::string message) {
    CommandResult result;
    result.exit_code_ = kFailure;
    result.message_ = std::move(message);
    return result;
  }

  int exit_code() const { return exit_code_; }
  const std::string& message() const { return message_; }

 private:
  int exit_code_ = 0;
  std::string message_;
};

// Flags that every subcommand has.
struct CommonOptions {
  int threads = 0;                       // --threads; 0 means the OpenMP default.
  std::string instruction_set = "best";  // --isa, or the environment's FLASH_ENTMAX_ISA.
  bool json = false;                     // --json: one JSON document on stdout, nothing else.
  bool quiet = false;                    // --quiet: no progress bar.
};

// What parsing the command line leaves behind.
struct Context {
  CommonOptions common;
  std::function<CommandResult()> action;  // Of the chosen subcommand.
  std::string command_line;               // As typed, to repeat a run.
};

// Adds a subcommand with the common flags. `action` runs after parsing, with the instruction set
// selected; what it needs must outlive the parsing, so capture a shared_ptr to the options.
CLI::App* AddCommand(CLI::App& parent, Context& context, const std::string& name,
                     const std::string& description, std::function<CommandResult()> action);

// The check of options that are sizes: at least 1.
CLI::Validator SizeRange();

// --seed, from 0 to 2^53: what every program that reads the JSON can hold.
void AddSeed(CLI::App& command, uint64_t& seed, const std::string& description);

// One function a subcommand, each in the file of its name.
void AddRunCommand(CLI::App& program, Context& context);
void AddMapCommand(CLI::App& program, Context& context);
void AddPlanCommand(CLI::App& program, Context& context);
void AddCheckCommand(CLI::App& program, Context& context);
void AddBenchCommand(CLI::App& program, Context& context);
void AddInfoCommand(CLI::App& program, Context& context);
void AddDemoCommand(CLI::App& program, Context& context);   // demo/, if it was built in.
void AddTrainCommand(CLI::App& program, Context& context);  // lab/, if it was built in.
void AddEvalCommand(CLI::App& program, Context& context);
void AddMistakesCommand(CLI::App& program, Context& context);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_COMMAND_H_
