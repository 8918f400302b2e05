// `flash-entmax bench`: how fast this machine is.

#include "bench/bench.h"

#include <CLI/CLI.hpp>

namespace flash_entmax::cli {

void AddBenchCommand(CLI::App& program, Context& context) {
  CLI::App* bench = program.add_subcommand("bench", "Measure speed and memory on this machine");
  bench->require_subcommand(0, 1);  // As the program itself, see main.cc.
  AddBenchMappingCommand(*bench, context);
  AddBenchAttentionCommand(*bench, context);
}

}  // namespace flash_entmax::cli
