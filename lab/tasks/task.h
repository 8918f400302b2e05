// The synthetic tasks: sequences with parts that follow from the rest by a rule.
//
// A sample is a sequence of tokens, some of which are the target: what the model is to predict from
// everything before them. Most tasks have the format
//     begin, source (length symbols), separator, target
// and, unless TaskOptions::end asks for one, no end token: the length of the target follows from
// the source. Exact match of the whole target with every earlier token given equals exact match
// under greedy decoding: as long as every prediction is right, the decoded prefix is the given one.

#ifndef FLASH_ENTMAX_LAB_TASKS_TASK_H_
#define FLASH_ENTMAX_LAB_TASKS_TASK_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "flash_entmax/status.h"
#include "random.h"

namespace flash_entmax::lab {

struct Sample {
  std::vector<int32_t> tokens;
  std::vector<uint8_t> target;  // 1 where the token is to be predicted; never the first
};

// The tokens that are to be predicted.
std::vector<int32_t> TargetOf(const Sample& sample);

// A target token that was predicted wrongly.
struct WrongToken {
  int64_t place = 0;  // in the target
  int32_t expected = 0;
  int32_t predicted = 0;
  std::string source;  // where in the sample the answer may come from; empty: nowhere
  // The probability that a random token has a source; below 0 if the task tells no sources.
  double chance = -1.0;
};

// The parameters of every task; each uses the few that its format names.
struct TaskOptions {
  std::string name;
  int64_t symbols = 0;          // size of the alphabet; 0: the task's default
  int64_t modulus = 3;          // counting
  int64_t distance = 2;         // back
  int64_t items = 16;           // selective_copy: how many symbols are to be copied
  double write = 0.1;           // flip_flop: probability of a write instruction
  double read = 0.1;            // flip_flop: probability of a read instruction
  int64_t key_symbols = 2;      // recall: symbols of a key
  int64_t value_symbols = 2;    // recall: symbols of a value
  int64_t vocabulary = 10000;   // recall: how many different keys, and values, there are
  int64_t queries = 4;          // recall
  double few_pairs = 0.0;       // recall: share of the samples that hold only 1 to 3 pairs
  double collisions = 0.0;      // recall: share of the samples whose values begin alike
  double key_collisions = 0.0;  // recall: share of the samples whose keys share symbols
  bool crossed_keys = false;    // recall: they may share them at different places
  int64_t easy_steps = 0;       // recall: training steps in which samples become harder
  double few_symbols = 0.0;     // copy, reverse, sort, back: share of the samples of few symbols,
  int64_t fewest_symbols = 2;   // which have at least so many different ones
  int64_t most_symbols = 0;     // and at most so many; 0: a quarter of all
  double prefix = 0.0;          // the same: share of the samples with other symbols before `begin`
  double shift = 0.0;           // the same: share of those with a shorter source, further back
  double late = 0.0;            // copy, reverse: share of the samples whose target begins later
  // As the published generator (deep-spin/asentmax) makes them:
  bool end = false;             // any task: the target ends with a token of its own
  bool repeat_queries = false;  // recall: queries are drawn with replacement
  bool own_slots = false;  // recall: each pair has its own ⌊length/pairs⌋ tokens of the context
};

class Task {
 public:
  virtual ~Task() = default;

  // Tokens are 0 … vocabulary − 1.
  virtual int64_t vocabulary() const = 0;
  // Lengths below this have no sample.
  virtual int64_t min_length() const { return 1; }
  // No sample of this length has more tokens, and more targets, than this.
  virtual int64_t MaxTokens(int64_t length) const = 0;
  virtual int64_t MaxTargets(int64_t length) const = 0;
  // `length` counts source symbols.
  virtual Sample Generate(int64_t length, Random& random) const = 0;
  // Training may mix in easier or harder samples than those of Generate, and other ones in its
  // first steps, which count from 0.
  virtual Sample GenerateForTraining(int64_t length, int64_t /*step*/, Random& random) const {
    return Generate(length, random);
  }
  // Overwrites the target tokens by what the rule makes of the others.
  virtual void Solve(Sample& sample) const = 0;
  // Fills in the sources, and their chances, of tokens of the sample's target.
  virtual void Explain(const Sample& /*sample*/, std::vector<WrongToken>* /*wrong*/) const {}
};

// Errors name the field of TaskOptions.
Expected<std::unique_ptr<Task>> MakeTask(const TaskOptions& options);

// The names that MakeTask knows.
std::vector<std::string> TaskNames();

// One family of tasks a file.
std::unique_ptr<Task> MakeSequenceTask(const TaskOptions& options);  // copy, reverse, sort, …
std::unique_ptr<Task> MakeStateTask(const TaskOptions& options);     // flip_flop, parity, …
std::unique_ptr<Task> MakeRecallTask(const TaskOptions& options);    // recall

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_TASKS_TASK_H_
