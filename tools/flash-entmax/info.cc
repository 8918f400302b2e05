// `flash-entmax info`: what this build contains and what this machine would use.

#include <fmt/format.h>

#include <CLI/CLI.hpp>

#include "command.h"
#include "flash_entmax/machine.h"
#include "machine_name.h"
#include "output.h"

namespace flash_entmax::cli {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "Clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "GCC " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

CommandResult Info(const CommonOptions& common) {
  const int threads = common.threads > 0 ? common.threads : DefaultThreads();
  if (common.json) {
    PrintJson({{"command", "info"},
               {"version", Version()},
               {"engines", {"cpu"}},
               {"compiled_instruction_sets", CompiledInstructionSets()},
               {"supported_instruction_sets", SupportedInstructionSets()},
               {"instruction_set", ActiveInstructionSet()},
               {"threads", threads},
               {"processor", ProcessorName()},
               {"compiler", kCompiler},
               {"build_type", FLASH_ENTMAX_BUILD_TYPE}});
    return {};
  }
  fmt::print("flash-entmax                {}\n", Version());
  fmt::print("engines                     cpu\n");
  fmt::print("compiled instruction sets   {}\n", fmt::join(CompiledInstructionSets(), ", "));
  fmt::print("supported instruction sets  {}\n", fmt::join(SupportedInstructionSets(), ", "));
  fmt::print("instruction set in use      {}\n", ActiveInstructionSet());
  fmt::print("threads                     {}\n", threads);
  fmt::print("processor                   {}\n", ProcessorName());
  fmt::print("compiler                    {}\n", kCompiler);
  fmt::print("build type                  {}\n", FLASH_ENTMAX_BUILD_TYPE);
  return {};
}

}  // namespace

void AddInfoCommand(CLI::App& program, Context& context) {
  AddCommand(program, context, "info", "Show version, instruction sets and what would be used",
             [&context] { return Info(context.common); });
}

}  // namespace flash_entmax::cli
