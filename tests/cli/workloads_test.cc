#include "workloads.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace flash_entmax::bench {
namespace {

double StandardDeviation(const std::vector<float>& values) {
  double sum = 0.0;
  double squares = 0.0;
  for (const float x : values) {
    sum += static_cast<double>(x);
    squares += static_cast<double>(x) * static_cast<double>(x);
  }
  const auto n = static_cast<double>(values.size());
  return std::sqrt(squares / n - sum / n * (sum / n));
}

double Score(const Workload& workload, int64_t i, int64_t j) {
  double dot = 0.0;
  for (size_t c = 0; c < 64; ++c) {
    dot += static_cast<double>(workload.query[static_cast<size_t>(i) * 64 + c]) *
           static_cast<double>(workload.key[static_cast<size_t>(j) * 64 + c]);
  }
  return dot / 8.0;
}

TEST(Workloads, NamesRoundTrip) {
  for (const char* name : {"gauss(0.05)", "gauss(4)", "topic(16)", "local", "nape"}) {
    const auto spec = ParseWorkload(name);
    ASSERT_TRUE(spec.ok()) << name;
    EXPECT_EQ(NameOf(*spec), name);
  }
  EXPECT_EQ(NameOf(*ParseWorkload("gauss")), "gauss(1)");
  EXPECT_EQ(NameOf(*ParseWorkload("topic")), "topic(16)");
  for (const char* name : {"", "gaus", "gauss(", "gauss()", "gauss(0)", "gauss(nan)", "gauss(1)x",
                           "gauss(1", "topic(0)", "topic(1.5)", "topic(99999999)", "local(2)"}) {
    EXPECT_FALSE(ParseWorkload(name).ok()) << name;
  }
}

TEST(Workloads, GaussHasTheSpreadItsNameSays) {
  const WorkloadShape shape = {1, 2, 2, 512, 512, 64, 32};
  const Workload workload = MakeWorkload(*ParseWorkload("gauss(2)"), shape, 1);
  EXPECT_EQ(workload.value.size(), 2u * 512 * 32);
  EXPECT_NEAR(StandardDeviation(workload.query), 2.0, 0.05);
  EXPECT_NEAR(StandardDeviation(workload.key), 1.0, 0.02);
  EXPECT_NEAR(StandardDeviation(workload.value), 1.0, 0.03);
  std::vector<float> scores;
  for (int64_t i = 0; i < 512; ++i)
    scores.push_back(static_cast<float>(Score(workload, i, 511 - i)));
  EXPECT_NEAR(StandardDeviation(scores), 2.0, 0.25);
}

TEST(Workloads, AreTheSameEveryTime) {
  const WorkloadShape shape = {2, 2, 1, 40, 40, 64, 64};
  for (const char* name : {"gauss(1)", "topic(4)", "local", "nape"}) {
    const WorkloadSpec spec = *ParseWorkload(name);
    EXPECT_EQ(MakeWorkload(spec, shape, 3).query, MakeWorkload(spec, shape, 3).query);
    EXPECT_NE(MakeWorkload(spec, shape, 3).query, MakeWorkload(spec, shape, 4).query);
    EXPECT_NE(MakeWorkload(spec, shape, 3).query, MakeWorkload(spec, shape, 3).key);
  }
}

TEST(Workloads, TopicsAndNeighboursScoreHigh) {
  const WorkloadShape shape = {1, 1, 1, 512, 512, 64, 64};
  const Workload topic = MakeWorkload(*ParseWorkload("topic(1000)"), shape, 1);
  double same = 0.0;
  double other = 0.0;
  for (int64_t i = 0; i < 256; ++i) {
    same += Score(topic, i, 255 - i) / 256.0;
    other += Score(topic, i, 511 - i) / 256.0;
  }
  EXPECT_NEAR(same, 6.0, 0.5);
  EXPECT_NEAR(other, 0.0, 2.5);
  const Workload local = MakeWorkload(*ParseWorkload("local"), shape, 1);
  double near = 0.0;
  double far = 0.0;
  for (int64_t i = 0; i < 200; ++i) {
    near += Score(local, i + 1, i) / 200.0;
    far += Score(local, i + 300, i) / 200.0;
  }
  EXPECT_GT(near, 4.0);
  EXPECT_LT(std::abs(far), 3.0);
}

TEST(Workloads, NapeHasSlopesOnHalfOfTheHeads) {
  const Workload workload = MakeWorkload(*ParseWorkload("nape"), {1, 4, 4, 8, 8, 16, 16}, 1);
  EXPECT_EQ(workload.alibi_slopes, (std::vector<float>{1.0f, 0.5f, 0.0f, 0.0f}));
}

}  // namespace
}  // namespace flash_entmax::bench
