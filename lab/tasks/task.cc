#include "tasks/task.h"

#include <algorithm>
#include <cmath>

namespace flash_entmax::lab {
namespace {

Status CheckRange(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return Status::Ok();
  return Status::InvalidArgument("task." + std::string(name) + ": got " + std::to_string(value) +
                                 "; must be in [" + std::to_string(low) + ", " +
                                 std::to_string(high) + "]");
}

Status CheckShare(const char* name, double value) {
  if (value >= 0.0 && value <= 1.0) return Status::Ok();
  return Status::InvalidArgument("task." + std::string(name) + ": got " + std::to_string(value) +
                                 "; must be in [0, 1]");
}

// Default size of the alphabet; 0 for an unknown task.
int64_t DefaultSymbols(const std::string& name) {
  if (name == "recall") return 256;
  if (name == "copy" || name == "reverse" || name == "sort") return 32;
  if (name == "local_count" || name == "back" || name == "selective_copy" || name == "induction") {
    return 16;
  }
  if (name == "flip_flop" || name == "parity" || name == "counting") return 2;
  return 0;
}

// Another task whose samples end with one more token, to be predicted as well.
class EndedTask final : public Task {
 public:
  explicit EndedTask(std::unique_ptr<Task> task) : task_(std::move(task)) {}

  int64_t vocabulary() const override { return task_->vocabulary() + 1; }
  int64_t min_length() const override { return task_->min_length(); }
  int64_t MaxTokens(int64_t length) const override { return task_->MaxTokens(length) + 1; }
  int64_t MaxTargets(int64_t length) const override { return task_->MaxTargets(length) + 1; }
  Sample Generate(int64_t length, Random& random) const override {
    return Ended(task_->Generate(length, random));
  }
  Sample GenerateForTraining(int64_t length, int64_t step, Random& random) const override {
    return Ended(task_->GenerateForTraining(length, step, random));
  }
  // The token at the end is one more target, which the task takes for none of its own.
  void Explain(const Sample& sample, std::vector<WrongToken>* wrong) const override {
    task_->Explain(sample, wrong);
  }
  void Solve(Sample& sample) const override {
    sample.tokens.pop_back();
    sample.target.pop_back();
    task_->Solve(sample);
    sample = Ended(std::move(sample));
  }

 private:
  Sample Ended(Sample sample) const {
    sample.tokens.push_back(static_cast<int32_t>(task_->vocabulary()));
    sample.target.push_back(1);
    return sample;
  }

  const std::unique_ptr<Task> task_;
};

}  // namespace

std::vector<std::string> TaskNames() {
  return {"recall", "copy",           "reverse",   "sort",      "local_count", "back",
          "parity", "selective_copy", "induction", "flip_flop", "counting"};
}

std::vector<int32_t> TargetOf(const Sample& sample) {
  std::vector<int32_t> target;
  for (size_t i = 0; i < sample.tokens.size(); ++i) {
    if (sample.target[i] != 0) target.push_back(sample.tokens[i]);
  }
  return target;
}

Expected<std::unique_ptr<Task>> MakeTask(const TaskOptions& given) {
  TaskOptions options = given;
  const int64_t symbols = DefaultSymbols(options.name);
  if (symbols == 0) {
    std::string names;
    for (const std::string& name : TaskNames()) names += (names.empty() ? "" : ", ") + name;
    return Status::InvalidArgument("task.name: got \"" + options.name + "\"; must be one of " +
                                   names);
  }
  if (options.symbols == 0) options.symbols = symbols;
  if (options.most_symbols == 0) {
    options.most_symbols = std::max(options.fewest_symbols, options.symbols / 4);
  }
  const int64_t most = 65536;
  for (const Status& status :
       {CheckRange("symbols", options.symbols, 2, most),
        CheckRange("modulus", options.modulus, 2, 1024),
        CheckRange("distance", options.distance, 1, 1024),
        CheckRange("items", options.items, 1, most), CheckShare("write", options.write),
        CheckShare("read", options.read), CheckShare("few_pairs", options.few_pairs),
        CheckShare("collisions", options.collisions),
        CheckShare("key_collisions", options.key_collisions),
        CheckShare("few_symbols", options.few_symbols), CheckShare("prefix", options.prefix),
        CheckShare("shift", options.shift), CheckShare("late", options.late),
        CheckRange("fewest_symbols", options.fewest_symbols, 2, options.symbols),
        CheckRange("most_symbols", options.most_symbols, options.fewest_symbols, options.symbols),
        CheckRange("key_symbols", options.key_symbols, 1, 8),
        CheckRange("value_symbols", options.value_symbols, 1, 8),
        CheckRange("vocabulary", options.vocabulary, 2, 1 << 20),
        CheckRange("queries", options.queries, 1, 64)}) {
    if (!status.ok()) return status;
  }
  if (!(options.write + options.read <= 1.0)) {
    return Status::InvalidArgument("task.write + task.read: got " +
                                   std::to_string(options.write + options.read) +
                                   "; must be at most 1");
  }
  if (options.name == "recall") {
    const double words =
        std::pow(static_cast<double>(options.symbols),
                 static_cast<double>(std::min(options.key_symbols, options.value_symbols)));
    if (!(static_cast<double>(options.vocabulary) <= words)) {
      return Status::InvalidArgument("task.vocabulary: got " + std::to_string(options.vocabulary) +
                                     "; must be at most the number of words of the shorter of "
                                     "keys and values, " +
                                     std::to_string(static_cast<int64_t>(words)));
    }
  }
  std::unique_ptr<Task> task = MakeSequenceTask(options);
  if (!task) task = MakeStateTask(options);
  if (!task) task = MakeRecallTask(options);
  if (options.end) task = std::make_unique<EndedTask>(std::move(task));
  return task;
}

}  // namespace flash_entmax::lab
