// A task for a test, and what holds of every sample of every task.

#ifndef FLASH_ENTMAX_LAB_TESTS_TASK_CHECKS_H_
#define FLASH_ENTMAX_LAB_TESTS_TASK_CHECKS_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>

#include "tasks/task.h"
#include "testing/status.h"

namespace flash_entmax::lab {

inline std::unique_ptr<Task> Make(const TaskOptions& options) {
  Expected<std::unique_ptr<Task>> task = MakeTask(options);
  EXPECT_TRUE(testing::IsOk(task.status()));
  return *std::move(task);
}

// Its rule makes the target of the sample.
inline void CheckSample(const Task& task, int64_t length, const Sample& sample) {
  ASSERT_EQ(sample.tokens.size(), sample.target.size());
  ASSERT_LE(static_cast<int64_t>(sample.tokens.size()), task.MaxTokens(length));
  const int64_t targets = std::count(sample.target.begin(), sample.target.end(), 1);
  ASSERT_GE(targets, 1);
  ASSERT_LE(targets, task.MaxTargets(length));
  ASSERT_EQ(sample.target[0], 0);
  for (const int32_t token : sample.tokens) {
    ASSERT_GE(token, 0);
    ASSERT_LT(token, task.vocabulary());
  }
  Sample hidden = sample;
  for (size_t i = 0; i < hidden.tokens.size(); ++i) {
    if (hidden.target[i] != 0) hidden.tokens[i] = -1;
  }
  task.Solve(hidden);
  ASSERT_EQ(hidden.tokens, sample.tokens) << "length " << length;
}

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_TESTS_TASK_CHECKS_H_
