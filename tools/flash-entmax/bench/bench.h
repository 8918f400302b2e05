// The two benchmarks of `flash-entmax bench`.

#ifndef FLASH_ENTMAX_TOOLS_BENCH_BENCH_H_
#define FLASH_ENTMAX_TOOLS_BENCH_BENCH_H_

#include "command.h"

namespace flash_entmax::cli {

void AddBenchMappingCommand(CLI::App& bench, Context& context);
void AddBenchAttentionCommand(CLI::App& bench, Context& context);

// Rows that are compared with the reference before anything is timed.
inline constexpr int kVerifiedRows = 8;

// More rounds than anybody waits for are a typing error.
inline constexpr int kMaxRounds = 10'000;

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_BENCH_BENCH_H_
