// Batches of samples as plain arrays, ready to be copied to a device.

#ifndef FLASH_ENTMAX_LAB_BATCH_H_
#define FLASH_ENTMAX_LAB_BATCH_H_

#include <cstdint>
#include <vector>

#include "config.h"
#include "tasks/task.h"

namespace flash_entmax::lab {

// Rows shorter than the longest are padded at their end, where a causal model never looks from
// before. Only the rows of the hidden state that predict a target reach the output head.
struct Batch {
  static constexpr int64_t kIgnored = -100;  // label of padding

  int64_t rows = 0;
  int64_t tokens_per_row = 0;  // of the model's input
  int64_t targets_per_row = 0;
  std::vector<int64_t> tokens;  // [rows, tokens_per_row]
  std::vector<int64_t> index;   // [rows, targets_per_row]: where the prediction stands in `tokens`
  std::vector<int64_t> labels;  // [rows, targets_per_row]
};

// If `tokens_per_row` and `targets_per_row` are 0, they are what the samples need.
Batch MakeBatch(const std::vector<Sample>& samples, int64_t tokens_per_row = 0,
                int64_t targets_per_row = 0);

// The batch of one training step: a pure function of the run's seed and the step. `fixed_size`
// pads to what the longest possible sample needs.
Batch TrainingBatch(const Task& task, const RunConfig& run, int64_t step, bool fixed_size);

// Evaluation sample number `sample` of a length; the same for every run.
Sample EvaluationSample(const Task& task, int64_t length, int64_t sample);

// Evaluation samples first … first + count − 1 of a length.
Batch EvaluationBatch(const Task& task, int64_t length, int64_t first, int64_t count);

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_BATCH_H_
