// Training one run, and evaluating it, in a folder of its own:
//
//   run.json                 the configuration
//   metrics.jsonl            one JSON object a line: step, loss, gradient norm, rate, seconds
//   checkpoint.safetensors   the last checkpoint
//   result.json              the evaluation, once training has finished
//
// Killed at any moment, the next call goes on from the last checkpoint; on a CPU every loss is then
// bit for bit what it would have been (with the same number of threads and the same machine).

#ifndef FLASH_ENTMAX_LAB_TRAINER_H_
#define FLASH_ENTMAX_LAB_TRAINER_H_

#include <cstdint>
#include <functional>
#include <string>

#include "config.h"
#include "flash_entmax/status.h"

namespace flash_entmax::lab {

struct TrainingReport {
  int64_t step = 0;  // finished steps
  int64_t steps = 0;
  double loss = 0.0;  // of the last step
  double steps_per_second = 0.0;
  double exact_match = -1.0;  // of the last quick evaluation; negative: none yet
};

struct TrainingOptions {
  std::string folder;
  std::string device = "cpu";  // or "cuda"
  int threads = 0;             // 0 means all
  double time_limit = 0.0;     // seconds after which to checkpoint and return; 0: none
  std::function<void(const TrainingReport&)> progress;
  std::function<bool()> stop;  // asked between steps; true: checkpoint and return
  // Told every loss; for tests.
  std::function<void(int64_t step, double loss)> on_step;
};

struct TrainingOutcome {
  int64_t step = 0;
  bool finished = false;
  double loss = 0.0;
};

// Whether a run may use the folder: one that is new, or whose run.json names the same training.
// Errors: kInvalidArgument, kIo.
Status CheckFolder(const RunConfig& run, const std::string& folder);

// Errors: kInvalidArgument for a folder that belongs to another run, a damaged checkpoint, or a
// loss that is not finite; kIo for files; kDevice for a missing GPU; kOutOfMemory.
Expected<TrainingOutcome> Train(const RunConfig& run, const TrainingOptions& options);

// Evaluates the folder's checkpoint by run.evaluation and writes result.json. `progress` is told
// the lengths done and their number. The run may differ from the folder's in `evaluation`.
Status Evaluate(const RunConfig& run, const TrainingOptions& options,
                const std::function<void(int64_t, int64_t)>& progress = nullptr);

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_TRAINER_H_
