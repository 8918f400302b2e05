#include "batch.h"

#include <algorithm>

#include "random.h"

namespace flash_entmax::lab {
namespace {

// Streams of random numbers that never meet.
constexpr uint64_t kTrainingStream = 0x7472;
constexpr uint64_t kEvaluationStream = 0x6576;

}  // namespace

Batch MakeBatch(const std::vector<Sample>& samples, int64_t tokens_per_row,
                int64_t targets_per_row) {
  Batch batch;
  batch.rows = static_cast<int64_t>(samples.size());
  for (const Sample& sample : samples) {
    // The last token is only predicted.
    tokens_per_row = std::max(tokens_per_row, static_cast<int64_t>(sample.tokens.size()) - 1);
    targets_per_row = std::max<int64_t>(targets_per_row,
                                        std::count(sample.target.begin(), sample.target.end(), 1));
  }
  batch.tokens_per_row = tokens_per_row;
  batch.targets_per_row = targets_per_row;
  batch.tokens.assign(static_cast<size_t>(batch.rows * tokens_per_row), 0);
  batch.index.assign(static_cast<size_t>(batch.rows * targets_per_row), 0);
  batch.labels.assign(static_cast<size_t>(batch.rows * targets_per_row), Batch::kIgnored);
  for (int64_t row = 0; row < batch.rows; ++row) {
    const Sample& sample = samples[static_cast<size_t>(row)];
    auto slot = static_cast<size_t>(row * targets_per_row);
    const int64_t start = row * tokens_per_row;
    for (size_t i = 0; i < sample.tokens.size(); ++i) {
      if (i + 1 < sample.tokens.size()) {
        batch.tokens[static_cast<size_t>(start) + i] = sample.tokens[i];
      }
      if (sample.target[i] != 0) {
        batch.index[slot] = start + static_cast<int64_t>(i) - 1;
        batch.labels[slot++] = sample.tokens[i];
      }
    }
    // Padding reads some row of its own sample, and its label says to forget the answer.
    for (; slot < static_cast<size_t>((row + 1) * targets_per_row); ++slot) {
      batch.index[slot] = start;
    }
  }
  return batch;
}

Batch TrainingBatch(const Task& task, const RunConfig& run, int64_t step, bool fixed_size) {
  const TrainingConfig& training = run.training;
  std::vector<Sample> samples;
  samples.reserve(static_cast<size_t>(training.batch));
  Random random(run.seed, kTrainingStream, static_cast<uint64_t>(step));
  for (int64_t i = 0; i < training.batch; ++i) {
    const int64_t length = random.Integer(training.min_length, training.max_length);
    samples.push_back(task.GenerateForTraining(length, step, random));
  }
  if (!fixed_size) return MakeBatch(samples);
  return MakeBatch(samples, task.MaxTokens(training.max_length) - 1,
                   task.MaxTargets(training.max_length));
}

Sample EvaluationSample(const Task& task, int64_t length, int64_t sample) {
  Random random(kEvaluationStream, static_cast<uint64_t>(length), static_cast<uint64_t>(sample));
  return task.Generate(length, random);
}

Batch EvaluationBatch(const Task& task, int64_t length, int64_t first, int64_t count) {
  std::vector<Sample> samples;
  for (int64_t i = first; i < first + count; ++i) {
    samples.push_back(EvaluationSample(task, length, i));
  }
  return MakeBatch(samples);
}

}  // namespace flash_entmax::lab
