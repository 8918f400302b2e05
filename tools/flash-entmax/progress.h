// A progress bar on stderr for work that takes longer than a second.

#ifndef FLASH_ENTMAX_TOOLS_PROGRESS_H_
#define FLASH_ENTMAX_TOOLS_PROGRESS_H_

#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>

#include "command.h"

namespace flash_entmax::cli {

// Shows nothing at all in the first second, with --json or --quiet, and when stderr is no terminal.
// Removes itself from the line when destroyed.
class Progress {
 public:
  // `unit` names what is counted, as in "rows".
  Progress(const CommonOptions& common, std::string label, int64_t total, std::string unit);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // Reports `amount` more done. May be called from several threads.
  void Add(int64_t amount = 1);

 private:
  using Clock = std::chrono::steady_clock;

  void Draw(Clock::time_point now);

  const std::string label_;
  const std::string unit_;
  const int64_t total_;
  const bool enabled_;
  const Clock::time_point start_;
  std::mutex mutex_;  // Guards what follows.
  int64_t done_ = 0;
  Clock::time_point next_draw_;
  bool drawn_ = false;
};

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_PROGRESS_H_
