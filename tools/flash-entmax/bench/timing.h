// Timing of alternatives against each other.

#ifndef FLASH_ENTMAX_TOOLS_BENCH_TIMING_H_
#define FLASH_ENTMAX_TOOLS_BENCH_TIMING_H_

#include <functional>
#include <string>
#include <vector>

#include "command.h"
#include "flash_entmax/status.h"
#include "output.h"

namespace flash_entmax::cli {

// Seconds of one alternative's rounds.
struct Timing {
  double median = 0.0;
  double min = 0.0;
  double max = 0.0;
  int rounds = 0;
};

// Runs every alternative once to warm up, then `rounds` times in turn, so that whatever slows the
// machine for a while slows all of them.
Expected<std::vector<Timing>> TimeInTurn(const CommonOptions& common,
                                         const std::vector<std::function<Status()>>& alternatives,
                                         int rounds);

Json TimingToJson(const Timing& timing);

// What makes a measurement repeatable: machine, instruction set, threads, command.
void PrintSetting(const Context& context);
Json SettingToJson(const Context& context);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_BENCH_TIMING_H_
