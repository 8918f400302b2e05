// Every task's rule solves what its generator makes.

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "batch.h"
#include "random.h"
#include "task_checks.h"
#include "tasks/task.h"
#include "testing/random.h"
#include "testing/status.h"

namespace flash_entmax::lab {
namespace {

TEST(Tasks, TheRuleSolvesEverySample) {
  SCOPED_TRACE(testing::SeedMessage());
  for (const std::string& name : TaskNames()) {
    SCOPED_TRACE(name);
    TaskOptions options;
    options.name = name;
    options.few_pairs = 0.3;
    options.collisions = 0.3;
    options.key_collisions = 0.3;
    options.crossed_keys = name == "recall";
    options.late = 0.5;
    options.few_symbols = 0.3;
    options.prefix = 0.3;
    const std::unique_ptr<Task> task = Make(options);
    ASSERT_TRUE(task);
    Random random(testing::TestSeed());
    for (const int64_t extra : {0, 1, 2, 3, 7, 30, 61, 200, 1000}) {
      const int64_t length = task->min_length() + extra;
      for (int i = 0; i < 20; ++i) {
        CheckSample(*task, length, task->Generate(length, random));
        CheckSample(*task, length, task->GenerateForTraining(length, 0, random));
      }
    }
  }
}

TEST(Tasks, ParametersAreUsed) {
  SCOPED_TRACE(testing::SeedMessage());
  Random random(testing::TestSeed());
  TaskOptions options;
  options.name = "recall";
  options.symbols = 20;
  options.key_symbols = 1;
  options.value_symbols = 3;
  options.vocabulary = 20;
  options.queries = 2;
  const std::unique_ptr<Task> recall = Make(options);
  for (int i = 0; i < 50; ++i) CheckSample(*recall, 40, recall->Generate(40, random));
  EXPECT_EQ(recall->MaxTargets(40), 8);

  options = {};
  options.name = "flip_flop";
  options.write = 0.8;
  options.read = 0.2;
  const std::unique_ptr<Task> dense = Make(options);
  const Sample sample = dense->Generate(400, random);
  EXPECT_EQ(std::count(sample.tokens.begin(), sample.tokens.end(), 3), 0);  // nothing ignored

  options = {};
  options.name = "back";
  options.distance = 5;
  const Sample back = Make(options)->Generate(9, random);
  for (size_t i = 5; i < 9; ++i) EXPECT_EQ(back.tokens[11 + i], back.tokens[1 + i - 5]);
}

TEST(Tasks, RecallHasTheStatedDensity) {
  SCOPED_TRACE(testing::SeedMessage());
  Random random(testing::TestSeed());
  TaskOptions options;
  options.name = "recall";
  const std::unique_ptr<Task> task = Make(options);
  for (const int64_t length : {32, 48, 64, 1024}) {
    const Sample sample = task->Generate(length, random);
    const auto pairs = std::count(sample.tokens.begin(), sample.tokens.end(), 257);
    EXPECT_EQ(pairs, length * 8 / 10 / 6);
    EXPECT_EQ(static_cast<int64_t>(sample.tokens.size()), length + 2 + 4 * 6);
  }
}

// What the published generator does differently: every sample obeys the rule, slots keep pairs
// apart, queries repeat, and the target ends with a token of its own.
TEST(Tasks, RecallAsPublished) {
  SCOPED_TRACE(testing::SeedMessage());
  Random random(testing::TestSeed());
  TaskOptions options;
  options.name = "recall";
  const int64_t plain = Make(options)->vocabulary();
  options.end = options.repeat_queries = options.own_slots = true;
  const std::unique_ptr<Task> task = Make(options);
  EXPECT_EQ(task->vocabulary(), plain + 1);
  int repeated = 0;
  for (const int64_t length : {32, 47, 48, 64, 1000}) {
    const int64_t pairs = length * 8 / 10 / 6, slot = length / pairs;
    for (int i = 0; i < 50; ++i) {
      const Sample sample = task->Generate(length, random);
      CheckSample(*task, length, sample);
      ASSERT_EQ(static_cast<int64_t>(sample.tokens.size()), pairs * slot + 2 + 4 * 6 + 1);
      ASSERT_EQ(sample.tokens.back(), plain);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const auto start = sample.tokens.begin() + 1 + pair * slot;
        ASSERT_EQ(std::count(start, start + slot, 257), 1) << "slot " << pair << " of " << length;
      }
      std::set<std::pair<int32_t, int32_t>> keys;
      for (int64_t query = 0; query < 4; ++query) {
        const auto at = static_cast<size_t>(1 + pairs * slot + 3 * query);
        ASSERT_EQ(sample.tokens[at], 258);
        keys.insert({sample.tokens[at + 1], sample.tokens[at + 2]});
      }
      repeated += keys.size() < 4 ? 1 : 0;
    }
  }
  // With 4 pairs 91 % of the samples repeat one; none do without replacement.
  EXPECT_GT(repeated, 30);
}

using Key = std::pair<int32_t, int32_t>;

// The keys of a context: what stands before `pair`.
std::vector<Key> Keys(const Sample& sample) {
  std::vector<Key> keys;
  for (size_t i = 2; i < sample.tokens.size(); ++i) {
    if (sample.tokens[i] == 257) keys.push_back({sample.tokens[i - 2], sample.tokens[i - 1]});
  }
  return keys;
}

// Whether all of them share their first or their last symbol with one of them.
bool AreAlike(const std::vector<Key>& keys) {
  return std::any_of(keys.begin(), keys.end(), [&](const Key& one) {
    return std::all_of(keys.begin(), keys.end(), [&](const Key& other) {
      return one.first == other.first || one.second == other.second;
    });
  });
}

// All keys of such a sample share their first or last symbol with one of them, and evaluation never
// sees such samples.
TEST(Tasks, RecallKeysCanCollide) {
  SCOPED_TRACE(testing::SeedMessage());
  Random random(testing::TestSeed());
  TaskOptions options;
  options.name = "recall";
  options.key_collisions = 1.0;
  const std::unique_ptr<Task> task = Make(options);
  int by_chance = 0;
  for (int i = 0; i < 100; ++i) {
    const Sample sample = task->GenerateForTraining(64, 0, random);
    CheckSample(*task, 64, sample);
    ASSERT_TRUE(AreAlike(Keys(sample)));
    by_chance += AreAlike(Keys(task->Generate(64, random))) ? 1 : 0;
  }
  EXPECT_EQ(by_chance, 0);
  // Too few words to choose from: samples are made all the same.
  options.key_symbols = 1;
  options.vocabulary = 100;
  const std::unique_ptr<Task> single = Make(options);
  for (int i = 0; i < 20; ++i) CheckSample(*single, 64, single->GenerateForTraining(64, 0, random));
}

// With crossed_keys one key shares a symbol with every other, at the same place or at the other
// one, and now and then stands there backwards too.
TEST(Tasks, RecallKeysCanCollideCrosswise) {
  SCOPED_TRACE(testing::SeedMessage());
  Random random(testing::TestSeed());
  TaskOptions options;
  options.name = "recall";
  options.key_collisions = 1.0;
  options.crossed_keys = true;
  const std::unique_ptr<Task> task = Make(options);
  // By how a key is like the one that all are like: in order the four lists it may come from.
  int64_t first = 0, last = 0, first_is_last = 0, last_is_first = 0, backwards = 0;
  for (int i = 0; i < 1000; ++i) {
    const Sample sample = task->GenerateForTraining(64, 0, random);
    CheckSample(*task, 64, sample);
    const std::vector<Key> keys = Keys(sample);
    EXPECT_EQ(std::set<Key>(keys.begin(), keys.end()).size(), keys.size());
    const auto like = [](const Key& one, const Key& other) {
      return one.first == other.first || one.second == other.second || one.first == other.second ||
             one.second == other.first;
    };
    const auto center = std::find_if(keys.begin(), keys.end(), [&](const Key& one) {
      return std::all_of(keys.begin(), keys.end(),
                         [&](const Key& other) { return like(one, other); });
    });
    ASSERT_NE(center, keys.end());
    for (const Key& key : keys) {
      if (key == *center) continue;
      first += key.first == center->first ? 1 : 0;
      last += key.second == center->second ? 1 : 0;
      first_is_last += key.first == center->second && key.second != center->first ? 1 : 0;
      last_is_first += key.second == center->first && key.first != center->second ? 1 : 0;
    }
    backwards += std::any_of(keys.begin(), keys.end(),
                             [&](const Key& key) {
                               return key.first != key.second &&
                                      std::find(keys.begin(), keys.end(),
                                                Key(key.second, key.first)) != keys.end();
                             })
                     ? 1
                     : 0;
  }
  // Seven other keys a sample, from four lists of about the same length.
  for (const int64_t count : {first, last, first_is_last, last_is_first}) {
    EXPECT_NEAR(static_cast<double>(count), 1750.0, 250.0);
  }
  // 15 % of the words are keys backwards, and half of those are there; by chance 1 to 2 % are.
  EXPECT_NEAR(static_cast<double>(backwards), 85.0, 40.0);
}

// Samples become harder: first those of few pairs and no keys alike, in the end the opposite.
// Through a batch, since the step has to reach the task there, behind the token at the end.
TEST(Tasks, RecallSamplesBecomeHarder) {
  SCOPED_TRACE(testing::SeedMessage());
  RunConfig run;
  run.seed = testing::TestSeed();
  run.task.name = "recall";
  run.task.end = true;
  run.task.few_pairs = 1.0;
  run.task.key_collisions = 1.0;
  run.task.easy_steps = 1000;
  run.training.batch = 200;
  run.training.min_length = run.training.max_length = 64;
  const std::unique_ptr<Task> task = Make(run.task);
  const auto count = [&](int64_t step) {
    const Batch batch = TrainingBatch(*task, run, step, false);
    std::pair<int64_t, int64_t> seen;  // samples of few pairs, samples of keys alike
    for (int64_t row = 0; row < batch.rows; ++row) {
      Sample sample;
      const auto start = batch.tokens.begin() + row * batch.tokens_per_row;
      sample.tokens.assign(start, start + batch.tokens_per_row);
      const std::vector<Key> keys = Keys(sample);
      seen.first += keys.size() <= 3 ? 1 : 0;
      seen.second += AreAlike(keys) ? 1 : 0;
    }
    return seen;
  };
  const auto [few_first, alike_first] = count(0);
  EXPECT_EQ(few_first, 200);
  EXPECT_LE(alike_first, 90);  // those of one pair, and by chance
  EXPECT_NEAR(static_cast<double>(count(500).first), 100.0, 40.0);
  const auto [few_last, alike_last] = count(5000);
  EXPECT_EQ(few_last, 0);
  EXPECT_EQ(alike_last, 200);
}

TEST(Tasks, AnyTaskCanEndWithAToken) {
  SCOPED_TRACE(testing::SeedMessage());
  Random random(testing::TestSeed());
  for (const std::string& name : TaskNames()) {
    SCOPED_TRACE(name);
    TaskOptions options;
    options.name = name;
    options.end = true;
    const std::unique_ptr<Task> task = Make(options);
    for (int i = 0; i < 20; ++i) {
      const Sample sample = task->Generate(task->min_length() + i, random);
      CheckSample(*task, task->min_length() + i, sample);
      ASSERT_EQ(sample.tokens.back(), task->vocabulary() - 1);
      ASSERT_EQ(std::count(sample.tokens.begin(), sample.tokens.end(), task->vocabulary() - 1), 1);
    }
  }
}

TEST(Tasks, BadParametersAreNamed) {
  TaskOptions options;
  options.name = "juggle";
  EXPECT_TRUE(testing::Rejects(MakeTask(options).status(), "task.name"));
  options.name = "sort";
  options.symbols = 1;
  EXPECT_TRUE(testing::Rejects(MakeTask(options).status(), "task.symbols"));
  options.symbols = 0;
  options.write = std::nan("");
  EXPECT_TRUE(testing::Rejects(MakeTask(options).status(), "task.write"));
  options.write = 0.1;
  options.name = "recall";
  options.symbols = 10;
  EXPECT_TRUE(testing::Rejects(MakeTask(options).status(), "task.vocabulary"));
}

TEST(Tasks, TrainingBatchesAreAFunctionOfSeedAndStep) {
  RunConfig run;
  run.task.name = "sort";
  run.training.batch = 4;
  const std::unique_ptr<Task> task = Make(run.task);
  const Batch first = TrainingBatch(*task, run, 5, false);
  EXPECT_EQ(first.tokens, TrainingBatch(*task, run, 5, false).tokens);
  EXPECT_NE(first.tokens, TrainingBatch(*task, run, 6, false).tokens);
  run.seed = 2;
  EXPECT_NE(first.tokens, TrainingBatch(*task, run, 5, false).tokens);
}

TEST(Tasks, BatchesPointAtWhatPredictsTheTargets) {
  RunConfig run;
  run.task.name = "reverse";
  run.training.batch = 8;
  const std::unique_ptr<Task> task = Make(run.task);
  for (const bool fixed_size : {false, true}) {
    const Batch batch = TrainingBatch(*task, run, 0, fixed_size);
    ASSERT_EQ(batch.tokens.size(), static_cast<size_t>(batch.rows * batch.tokens_per_row));
    int64_t labels = 0;
    for (size_t slot = 0; slot < batch.labels.size(); ++slot) {
      ASSERT_GE(batch.index[slot], 0);
      ASSERT_LT(batch.index[slot], batch.rows * batch.tokens_per_row);
      if (batch.labels[slot] == Batch::kIgnored) continue;
      ++labels;
      // The token after the index is the label, wherever it is part of the input.
      const auto next = static_cast<size_t>(batch.index[slot] + 1);
      if (next % static_cast<size_t>(batch.tokens_per_row) != 0 && slot + 1 < batch.labels.size() &&
          batch.labels[slot + 1] != Batch::kIgnored) {
        EXPECT_EQ(batch.tokens[next], batch.labels[slot]);
      }
    }
    EXPECT_GE(labels, batch.rows * run.training.min_length);
  }
}

TEST(Random, IsUniformAndDistinct) {
  SCOPED_TRACE(testing::SeedMessage());
  Random random(testing::TestSeed());
  std::map<int64_t, int> counts;
  for (int i = 0; i < 60000; ++i) ++counts[random.Integer(-1, 4)];
  ASSERT_EQ(counts.size(), 6u);
  for (const auto& [value, count] : counts) {
    EXPECT_NEAR(count, 10000, 500) << value;  // five standard deviations
  }
  for (const int64_t count : {0, 1, 5, 60, 100}) {
    const std::vector<int32_t> chosen = random.Distinct(count, 100);
    const std::set<int32_t> distinct(chosen.begin(), chosen.end());
    EXPECT_EQ(static_cast<int64_t>(distinct.size()), count);
    for (const int32_t value : chosen) EXPECT_TRUE(value >= 0 && value < 100);
  }
  double sum = 0, squares = 0;
  for (int i = 0; i < 20000; ++i) {
    const double x = random.Gauss();
    sum += x;
    squares += x * x;
  }
  EXPECT_NEAR(sum / 20000, 0.0, 0.04);
  EXPECT_NEAR(squares / 20000, 1.0, 0.06);
}

}  // namespace
}  // namespace flash_entmax::lab
