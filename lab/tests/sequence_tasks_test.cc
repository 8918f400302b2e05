// What the training samples of the sequence tasks can be told to be.

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "random.h"
#include "task_checks.h"
#include "tasks/task.h"
#include "testing/random.h"
#include "testing/status.h"

namespace flash_entmax::lab {
namespace {

// Training samples have 2 to 8 of the 32 symbols, or as many as they are told to have, every number
// of them now and then; evaluation samples have them all.
TEST(SequenceTasks, TrainingSamplesCanHaveFewSymbols) {
  SCOPED_TRACE(testing::SeedMessage());
  Random random(testing::TestSeed());
  TaskOptions options;
  options.few_symbols = 1.0;
  const auto check = [&](const std::set<size_t>& expected) {
    const std::unique_ptr<Task> task = Make(options);
    const auto symbols = [](const Sample& sample) {
      return std::set<int32_t>(sample.tokens.begin() + 1, sample.tokens.begin() + 201).size();
    };
    std::set<size_t> seen;
    for (int i = 0; i < 200; ++i) {
      const Sample sample = task->GenerateForTraining(200, 0, random);
      CheckSample(*task, 200, sample);
      seen.insert(symbols(sample));
      ASSERT_GT(symbols(task->Generate(200, random)), 20u);
    }
    EXPECT_EQ(seen, expected) << options.name;
  };
  for (const char* name : {"copy", "reverse", "sort"}) {
    options.name = name;
    check({2, 3, 4, 5, 6, 7, 8});
  }
  options.fewest_symbols = 5;
  check({5, 6, 7, 8});
  options.most_symbols = 6;
  check({5, 6});
  options.fewest_symbols = 10;
  options.most_symbols = 0;  // a quarter of all would be fewer
  check({10});
}

// In training, symbols that are no part of the source can stand before `begin`, as many as half of
// all; in evaluation there are none.
TEST(SequenceTasks, TrainingSamplesCanHaveAPrefix) {
  SCOPED_TRACE(testing::SeedMessage());
  Random random(testing::TestSeed());
  TaskOptions options;
  options.prefix = 0.5;
  for (const char* name : {"copy", "reverse", "sort", "back"}) {
    SCOPED_TRACE(name);
    options.name = name;
    const std::unique_ptr<Task> task = Make(options);
    const int64_t length = 40, begin = task->vocabulary() - 3;
    const auto before = [&](const Sample& sample) {
      return std::find(sample.tokens.begin(), sample.tokens.end(), begin) - sample.tokens.begin();
    };
    std::map<int64_t, int> seen;
    for (int i = 0; i < 1000; ++i) {
      const Sample sample = task->GenerateForTraining(length, 0, random);
      CheckSample(*task, length, sample);
      ++seen[before(sample)];
      ASSERT_EQ(std::count(sample.target.begin(), sample.target.end(), 1), length - before(sample));
      ASSERT_EQ(before(task->Generate(length, random)), 0);
    }
    EXPECT_NEAR(seen[0], 524, 100);
    EXPECT_EQ(seen.size(), 21u);
    EXPECT_EQ(seen.rbegin()->first, 20);
  }
}

// In training the source can be shorter and stand further back in a sample of as many tokens.
TEST(SequenceTasks, TrainingSamplesCanBeShifted) {
  SCOPED_TRACE(testing::SeedMessage());
  Random random(testing::TestSeed());
  for (const char* name : {"copy", "reverse", "sort", "back"}) {
    SCOPED_TRACE(name);
    TaskOptions options;
    options.name = name;
    options.shift = 0.5;
    const int64_t length = 41;
    const std::unique_ptr<Task> task = Make(options);
    const int64_t begin = task->vocabulary() - 3;
    std::map<int64_t, int> seen;
    for (int i = 0; i < 2000; ++i) {
      const Sample sample = task->GenerateForTraining(length, 0, random);
      CheckSample(*task, length, sample);
      ASSERT_EQ(std::ssize(sample.tokens), 2 * length + 2);
      const int64_t targets = std::count(sample.target.begin(), sample.target.end(), 1);
      ASSERT_EQ(sample.tokens[static_cast<size_t>(2 * (length - targets))], begin);
      ++seen[targets];
      const Sample plain = task->Generate(length, random);
      ASSERT_EQ(std::ssize(plain.tokens), 2 * length + 2);
      ASSERT_EQ(plain.tokens.front(), begin);
    }
    EXPECT_NEAR(seen[length], 1032, 150);
    EXPECT_EQ(seen.size(), 31u);
    EXPECT_EQ(seen.begin()->first, 11);
  }
}

// Checks a sample, of a task of 32 symbols; how many symbols of its target are left out. Where any
// are, the four after them are given.
int64_t LeftOut(const Task& task, int64_t length, const Sample& sample, bool end) {
  CheckSample(task, length, sample);
  constexpr int64_t kBegin = 32, kSeparator = 33;
  const auto begin = std::find(sample.tokens.begin(), sample.tokens.end(), kBegin);
  const auto separator = std::find(begin, sample.tokens.end(), kSeparator);
  const int64_t source = separator - begin - 1;
  const int64_t target = sample.tokens.end() - separator - 1 - (end ? 1 : 0);
  const int64_t asked = std::count(sample.target.begin(), sample.target.end(), 1);
  EXPECT_EQ(target + (end ? 1 : 0) - asked, target < source ? 4 : 0);
  return source - target;
}

// Calls check(task, end) for the tasks whose targets can begin late, with and without an end token.
template <typename Check>
void ForLateTasks(TaskOptions options, const Check& check) {
  for (const char* name : {"copy", "reverse"}) {
    for (const bool end : {false, true}) {
      SCOPED_TRACE(name);
      options.name = name;
      options.end = end;
      check(*Make(options), end);
    }
  }
}

// In training up to half of the target can be left out.
TEST(SequenceTasks, TrainingTargetsCanBeginLate) {
  SCOPED_TRACE(testing::SeedMessage());
  Random random(testing::TestSeed());
  TaskOptions options;
  options.late = 0.25;
  ForLateTasks(options, [&](const Task& task, bool end) {
    const int64_t length = 40;
    std::map<int64_t, int> seen;
    for (int i = 0; i < 2000; ++i) {
      ++seen[LeftOut(task, length, task.GenerateForTraining(length, 0, random), end)];
      ASSERT_EQ(LeftOut(task, length, task.Generate(length, random), end), 0);
    }
    ASSERT_EQ(seen.size(), 21u);  // 0 to 20, in a quarter of the samples alike
    ASSERT_EQ(seen.begin()->first, 0);
    EXPECT_NEAR(seen[0], 1524, 110);
    double sum = 0.0;
    for (const auto& [symbols, samples] : seen) sum += static_cast<double>(symbols) * samples;
    EXPECT_NEAR(sum / (2000 - seen[0]), 10.5, 1.5);
  });
}

// Together with other options, and where less is left than half: four are given, one is asked.
TEST(SequenceTasks, ShortTargetsBeginLateOnlyWhereSomethingIsLeft) {
  SCOPED_TRACE(testing::SeedMessage());
  Random random(testing::TestSeed());
  TaskOptions options;
  options.late = 1.0;
  options.prefix = 0.3;
  options.shift = 0.3;
  ForLateTasks(options, [&](const Task& task, bool end) {
    for (int64_t length = 1; length <= 12; ++length) {
      int64_t most = 0;
      for (int i = 0; i < 200; ++i) {
        const Sample sample = task.GenerateForTraining(length, 0, random);
        most = std::max(most, LeftOut(task, length, sample, end));
      }
      EXPECT_EQ(most, std::max<int64_t>(std::min(length / 2, length - 5), 0)) << length;
    }
  });
}

// Where no target begins late no number is drawn for it, so that old samples stay what they were;
// in a sorted target four symbols do not tell how many stand before them.
TEST(SequenceTasks, OtherTargetsBeginAtTheirBeginning) {
  SCOPED_TRACE(testing::SeedMessage());
  TaskOptions options;
  options.name = "copy";
  const std::unique_ptr<Task> plain = Make(options);
  Random one(testing::TestSeed()), other(testing::TestSeed());
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(plain->GenerateForTraining(40, 0, one).tokens, plain->Generate(40, other).tokens);
  }
  options.name = "sort";
  options.late = 1.0;
  const std::unique_ptr<Task> sort = Make(options);
  for (int i = 0; i < 100; ++i) {
    const Sample sample = sort->GenerateForTraining(40, 0, one);
    ASSERT_EQ(std::count(sample.target.begin(), sample.target.end(), 1), 40);
  }
}

TEST(SequenceTasks, NumbersOfSymbolsThatCannotBeAreRefused) {
  const auto status = [](int64_t fewest, int64_t most) {
    TaskOptions options;
    options.name = "copy";
    options.fewest_symbols = fewest;
    options.most_symbols = most;
    return MakeTask(options).status();
  };
  EXPECT_TRUE(testing::IsOk(status(2, 32)));
  EXPECT_TRUE(testing::Rejects(status(33, 0), "task.fewest_symbols"));
  EXPECT_TRUE(testing::Rejects(status(1, 8), "task.fewest_symbols"));
  EXPECT_TRUE(testing::Rejects(status(8, 7), "task.most_symbols"));
  EXPECT_TRUE(testing::Rejects(status(2, 33), "task.most_symbols"));
}

}  // namespace
}  // namespace flash_entmax::lab
