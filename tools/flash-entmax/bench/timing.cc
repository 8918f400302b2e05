#include "bench/timing.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "flash_entmax/machine.h"
#include "machine_name.h"
#include "progress.h"

namespace flash_entmax::cli {

Expected<std::vector<Timing>> TimeInTurn(const CommonOptions& common,
                                         const std::vector<std::function<Status()>>& alternatives,
                                         int rounds) {
  std::vector<std::vector<double>> seconds(alternatives.size());
  Progress progress(common, "bench", static_cast<int64_t>(alternatives.size()) * (rounds + 1),
                    "calls");
  for (int round = -1; round < rounds; ++round) {
    for (size_t i = 0; i < alternatives.size(); ++i) {
      const auto start = std::chrono::steady_clock::now();
      if (Status status = alternatives[i](); !status.ok()) return status;
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
      if (round >= 0) seconds[i].push_back(elapsed.count());
      progress.Add();
    }
  }
  std::vector<Timing> timings;
  for (std::vector<double>& times : seconds) {
    std::sort(times.begin(), times.end());
    const size_t middle = times.size() / 2;
    const double median =
        times.size() % 2 == 1 ? times[middle] : 0.5 * (times[middle - 1] + times[middle]);
    timings.push_back({median, times.front(), times.back(), rounds});
  }
  return timings;
}

Json TimingToJson(const Timing& timing) {
  return {{"median_seconds", timing.median},
          {"min_seconds", timing.min},
          {"max_seconds", timing.max},
          {"rounds", timing.rounds}};
}

void PrintSetting(const Context& context) {
  const int threads = context.common.threads > 0 ? context.common.threads : DefaultThreads();
  fmt::print("\n{}, {}, {} threads, peak memory {}, version {}\n", ProcessorName(),
             ActiveInstructionSet(), threads, FormatBytes(PeakMemoryBytes()), Version());
  fmt::print("repeat: {}\n", context.command_line);
}

Json SettingToJson(const Context& context) {
  const int threads = context.common.threads > 0 ? context.common.threads : DefaultThreads();
  return {{"processor", ProcessorName()},
          {"instruction_set", ActiveInstructionSet()},
          {"threads", threads},
          {"peak_memory_bytes", PeakMemoryBytes()},
          {"version", Version()},
          {"build_type", FLASH_ENTMAX_BUILD_TYPE},
          {"command_line", context.command_line}};
}

}  // namespace flash_entmax::cli
