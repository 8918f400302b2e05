// The command-line program `flash-entmax`.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <new>
#include <string>
#include <system_error>
#include <vector>

#include "command.h"
#include "flash_entmax/machine.h"

namespace flash_entmax::cli {
namespace {

// Ends the program with one line on stderr, whatever the message holds.
int Complain(int exit_code, std::string message) {
  for (char& c : message) {
    if (c == '\n' || c == '\r') c = ' ';
  }
  while (!message.empty() && message.back() == ' ') message.pop_back();
  // Not fmt::print, which throws if stderr is closed or full; the exit code still tells then.
  if (!message.empty()) std::fputs(fmt::format("flash-entmax: {}\n", message).c_str(), stderr);
  return exit_code;
}

// The arguments as a shell would need them.
std::string CommandLine(int argc, char** argv) {
  std::string line = "flash-entmax";
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool plain = !argument.empty() && argument.find_first_not_of(
                                                "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW"
                                                "XYZ0123456789-_=.,:/+@%") == std::string::npos;
    line += plain ? " " + argument : " '" + argument + "'";
  }
  return line;
}

std::string SubcommandNames(const CLI::App& command) {
  std::string names;
  for (const CLI::App* subcommand : command.get_subcommands({})) {
    names += (names.empty() ? "" : ", ") + subcommand->get_name();
  }
  return names;
}

// What to say instead of the parser's complaint about an argument it does not know.
std::string Explain(const CLI::App& program, const std::string& complaint, int argc, char** argv) {
  if (argc < 2) return complaint;
  const std::string first = argv[1];
  const std::vector<const CLI::App*> known = program.get_subcommands({});
  const bool named = std::any_of(known.begin(), known.end(), [&](const CLI::App* subcommand) {
    return subcommand->get_name() == first;
  });
  if (named || first[0] == '-') return complaint + " (see --help)";
  if (first == "train" || first == "eval") {
    return first + ": this program was built without the lab; ./dev lab builds one that has it";
  }
  return "got \"" + first + "\"; must be one of " + SubcommandNames(program);
}

// The innermost (sub)command that was named.
const CLI::App& Chosen(const CLI::App& program) {
  const std::vector<CLI::App*> named = program.get_subcommands();
  return named.empty() ? program : Chosen(*named[0]);
}

int Main(int argc, char** argv) {
  CLI::App program("Exact alpha-entmax attention.", "flash-entmax");
  // Not more than one. That there is one is asked for below: the parser would say so even when the
  // name of the subcommand was misspelt.
  program.require_subcommand(0, 1);
  program.set_version_flag("--version", std::string("flash-entmax ") + Version());
  program.footer(
      "Exit codes: 0 success, 1 failure, 2 bad input.\n"
      "Each subcommand has its own --help.");
  Context context;
  context.command_line = CommandLine(argc, argv);
#ifdef FLASH_ENTMAX_HAS_DEMO
  AddDemoCommand(program, context);
#endif
#ifdef FLASH_ENTMAX_HAS_LAB
  AddTrainCommand(program, context);
  AddEvalCommand(program, context);
  AddMistakesCommand(program, context);
#endif
  AddRunCommand(program, context);
  AddMapCommand(program, context);
  AddPlanCommand(program, context);
  AddCheckCommand(program, context);
  AddBenchCommand(program, context);
  AddInfoCommand(program, context);
  for (int i = 1; i < argc; ++i) {
    // Typically a shell variable that is not set; the parser would take it for 0 or for no value.
    if (argv[i][0] == '\0') {
      return Complain(CommandResult::kBadInput,
                      fmt::format("argument {} is empty; give a value or leave its flag out", i));
    }
  }
  try {
    program.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    // Help and version arrive here as well.
    if (error.get_exit_code() == 0) return program.exit(error);
    return Complain(CommandResult::kBadInput, Explain(program, error.what(), argc, argv));
  }
  if (!context.action) {
    return Complain(CommandResult::kBadInput,
                    "a subcommand is required: " + SubcommandNames(Chosen(program)));
  }
  if (const Status status = SelectInstructionSet(context.common.instruction_set); !status.ok()) {
    return Complain(CommandResult::kBadInput, "--isa or FLASH_ENTMAX_ISA: " + status.message());
  }
  try {
    const CommandResult result = context.action();
    if (std::fflush(stdout) != 0) {
      return Complain(CommandResult::kFailure, "cannot write to standard output");
    }
    return Complain(result.exit_code(), result.message());
  } catch (const std::bad_alloc&) {
    return Complain(CommandResult::kBadInput, "the input needs more memory than there is");
  } catch (const std::system_error& error) {  // What fmt::print throws.
    return Complain(CommandResult::kFailure,
                    std::string("cannot write to standard output: ") + error.what());
  }
}

}  // namespace
}  // namespace flash_entmax::cli

int main(int argc, char** argv) { return flash_entmax::cli::Main(argc, argv); }
