#include "command.h"

#include <CLI/CLI.hpp>
#include <cstdint>
#include <utility>

namespace flash_entmax::cli {
namespace {

// More threads than any machine has are a typing error.
constexpr int kMaxThreads = 4096;

}  // namespace

CLI::App* AddCommand(CLI::App& parent, Context& context, const std::string& name,
                     const std::string& description, std::function<CommandResult()> action) {
  CLI::App* command = parent.add_subcommand(name, description);
  CommonOptions& common = context.common;
  command->add_option("--threads", common.threads, "Threads to use; 0 for all that OpenMP offers")
      ->check(CLI::Range(0, kMaxThreads))
      ->capture_default_str()
      ->group("Common options");
  command
      ->add_option("--isa", common.instruction_set,
                   "Instruction set to use, one of those that `flash-entmax info` lists")
      ->envname("FLASH_ENTMAX_ISA")
      ->capture_default_str()
      ->group("Common options");
  command->add_flag("--json", common.json, "Print one JSON document for machines")
      ->group("Common options");
  command->add_flag("--quiet", common.quiet, "Show no progress bar")->group("Common options");
  command->callback([&context, action = std::move(action)] { context.action = action; });
  return command;
}

CLI::Validator SizeRange() { return CLI::Range(int64_t{1}, int64_t{1} << 32); }

void AddSeed(CLI::App& command, uint64_t& seed, const std::string& description) {
  command.add_option("--seed", seed, description)
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 53))
      ->capture_default_str();
}

}  // namespace flash_entmax::cli
