// The CPU engine's attention against the reference.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "flash_entmax/attention.h"
#include "flash_entmax/machine.h"
#include "testing/attention_case.h"
#include "testing/attention_results.h"
#include "testing/random.h"
#include "testing/status.h"
#include "testing/stored_tensor.h"

namespace flash_entmax {
namespace {

using testing::AttentionCase;
using testing::AttentionFeatures;
using testing::AttentionResults;
using testing::IsOk;
using testing::Random;
using testing::RunAndCompare;
using testing::SeedMessage;
using testing::StoredTensor;

TEST(Attention, EveryCombinationOfMasksAndModifiers) {
  SCOPED_TRACE(SeedMessage());
  Random random(1);
  const std::vector<DType> dtypes = {DType::kFloat32, DType::kFloat64, DType::kBFloat16,
                                     DType::kFloat16};
  const std::vector<double> alphas = {1.5, 2.0, 1.25, 1.0, 3.0, 0.5, 0.9};
  for (uint32_t bits = 0; bits < (1u << AttentionFeatures::kCount); ++bits) {
    const AttentionFeatures features = AttentionFeatures::FromBits(bits);
    if (!features.IsValid()) continue;
    testing::AttentionShape shape{random.Integer(1, 2),
                                  4,
                                  random.Pick<int64_t>({1, 2, 4}),
                                  random.Integer(1, 40),
                                  random.Integer(1, 60),
                                  random.Integer(1, 20),
                                  random.Integer(1, 20)};
    const DType dtype = dtypes[bits % dtypes.size()];
    const double alpha = alphas[(bits / 4) % alphas.size()];
    std::ostringstream trace;
    trace << "bits " << bits << ": " << features << NameOf(dtype) << " alpha " << alpha << " Nq "
          << shape.queries << " Nk " << shape.keys << " d " << shape.head_size << " dv "
          << shape.value_size;
    SCOPED_TRACE(trace.str());
    const AttentionCase data(shape, features, dtype, alpha, &random, &random);
    RunAndCompare(data, dtype, bits % 3 != 0, &random, static_cast<int>(bits % 4));
    if (HasFatalFailure()) return;
  }
}

// Sizes around the tile's, for every type.
TEST(Attention, OddSizes) {
  SCOPED_TRACE(SeedMessage());
  Random random(2);
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (const double alpha : {0.5, 1.0, 1.5, 2.0}) {
      for (const int64_t queries : {1, 5, 6, 7, 11, 12, 13, 47, 48, 49}) {
        for (const int64_t keys : {1, 15, 16, 17, 31, 32, 33, 127, 128, 129}) {
          AttentionFeatures features;
          features.causal = queries % 2 == 1;
          const AttentionCase data(
              {1, 1, 1, queries, keys, random.Integer(1, 70), random.Integer(1, 70)}, features,
              dtype, alpha, &random);
          SCOPED_TRACE(std::to_string(queries) + " x " + std::to_string(keys));
          RunAndCompare(data, dtype, false, nullptr);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// Rows of a realistic length, where bounds, pruning and refinement all happen many times.
TEST(Attention, LongRows) {
  SCOPED_TRACE(SeedMessage());
  Random random(3);
  for (const double alpha : {0.5, 1.0, 1.1, 1.3, 1.5, 1.75, 2.0, 4.0}) {
    for (const double deviation : {0.05, 1.0, 4.0}) {
      AttentionFeatures features;
      features.causal = true;
      AttentionCase data({1, 1, 1, 50, 1500, 32, 24}, features, DType::kFloat32, alpha, &random);
      data.query.SetValues(random.GaussVector(static_cast<size_t>(data.query.size()), deviation));
      SCOPED_TRACE("alpha " + std::to_string(alpha) + " deviation " + std::to_string(deviation));
      RunAndCompare(data, DType::kFloat32, true, nullptr);
      if (HasFatalFailure()) return;
    }
  }
}

// Scores set one by one through a head of size 1.
void ExpectRowMatches(const std::vector<double>& scores, double alpha) {
  const auto keys = static_cast<int64_t>(scores.size());
  Random random(4);
  AttentionCase data({1, 1, 1, 3, keys, 1, 2}, {}, DType::kFloat32, alpha, &random);
  data.query.SetValues({1.0, 1.0, 1.0});
  data.key.SetValues(scores);
  RunAndCompare(data, DType::kFloat32, true, nullptr);
}

TEST(Attention, AdversarialOrders) {
  const int64_t n = 3000;
  std::vector<std::pair<std::string, std::function<double(int64_t)>>> orders = {
      {"all equal", [](int64_t) { return 0.7; }},
      {"all zero", [](int64_t) { return 0.0; }},
      {"rising", [](int64_t i) { return 1e-3 * static_cast<double>(i); }},
      {"falling", [](int64_t i) { return -1e-3 * static_cast<double>(i); }},
      {"one giant first", [](int64_t i) { return i == 0 ? 1e6 : 0.0; }},
      {"one giant last", [](int64_t i) { return i == n - 1 ? 1e6 : 0.0; }},
      {"alternating", [](int64_t i) { return i % 2 == 0 ? 1.0 : -1.0; }},
      {"denormals", [](int64_t i) { return 1e-42 * static_cast<double>(i % 7); }},
      {"huge", [](int64_t i) { return 1e37 * static_cast<double>(i % 5); }},
      {"two levels at the edge", [](int64_t i) { return i < 4 ? 0.0 : -0.9999; }},
      {"masked tail", [](int64_t i) { return i > 5 ? -HUGE_VAL : 0.1 * static_cast<double>(i); }}};
  for (const auto& [name, score] : orders) {
    for (const double alpha : {0.3, 1.0, 1.25, 1.5, 2.0, 5.0}) {
      SCOPED_TRACE(name + " alpha " + std::to_string(alpha));
      std::vector<double> scores(n);
      for (int64_t i = 0; i < n; ++i) scores[static_cast<size_t>(i)] = score(i);
      ExpectRowMatches(scores, alpha);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Attention, NotANumberStaysInItsRow) {
  Random random(5);
  for (const double alpha : {0.5, 1.0, 1.5, 3.0}) {
    for (const bool bad_key : {false, true}) {
      AttentionFeatures features;
      features.causal = true;
      AttentionCase data({1, 1, 1, 100, 100, 8, 8}, features, DType::kFloat32, alpha, &random);
      (bad_key ? data.key : data.query).Set({0, 0, 60, 3}, std::nan(""));
      AttentionResults results(data.shape(), DType::kFloat32, nullptr);
      ASSERT_TRUE(IsOk(AttentionForward(data.problem(), results.views(false))));
      for (int64_t i = 0; i < 100; ++i) {
        const bool touched = bad_key ? i >= 60 : i == 60;
        for (int64_t e = 0; e < 8; ++e) {
          ASSERT_EQ(std::isnan(results.output.Get({0, 0, i, e})), touched) << i;
        }
      }
    }
  }
}

TEST(Attention, HiddenValuesDoNotMatter) {
  Random random(6);
  for (const double alpha : {0.5, 1.0, 1.5, 3.0}) {
    AttentionFeatures features;
    features.causal = true;
    AttentionCase data({1, 1, 1, 50, 50, 8, 8}, features, DType::kFloat32, alpha, &random);
    for (int64_t e = 0; e < 8; ++e) data.value.Set({0, 0, 49, e}, std::nan(""));
    AttentionResults results(data.shape(), DType::kFloat32, nullptr);
    ASSERT_TRUE(IsOk(AttentionForward(data.problem(), results.views(false))));
    for (int64_t i = 0; i < 49; ++i) {
      ASSERT_FALSE(std::isnan(results.output.Get({0, 0, i, 0}))) << i;
    }
  }
}

TEST(Attention, SameBitsForAnyNumberOfThreads) {
  SCOPED_TRACE(SeedMessage());
  Random random(7);
  for (const double alpha : {0.5, 1.0, 1.3, 1.5, 3.0}) {
    AttentionFeatures features;
    features.causal = true;
    const AttentionCase data({2, 4, 2, 150, 300, 16, 16}, features, DType::kFloat32, alpha,
                             &random);
    AttentionResults one(data.shape(), DType::kFloat32, nullptr);
    ASSERT_TRUE(IsOk(AttentionForward(data.problem(), one.views(true), {1})));
    for (const int threads : {2, 3, 7}) {
      AttentionResults many(data.shape(), DType::kFloat32, nullptr);
      ASSERT_TRUE(IsOk(AttentionForward(data.problem(), many.views(true), {threads})));
      EXPECT_EQ(one.output.bytes(), many.output.bytes());
      EXPECT_EQ(one.threshold.bytes(), many.threshold.bytes());
      EXPECT_EQ(one.support.key_index, many.support.key_index);
      EXPECT_EQ(one.support.probability, many.support.probability);
    }
  }
}

// Heads below, at and above α = 1 in one call.
TEST(Attention, AlphaOfEveryKindInOneCall) {
  SCOPED_TRACE(SeedMessage());
  Random random(10);
  for (const int64_t keys : {40, 900}) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
      AttentionFeatures features;
      features.causal = true;
      features.alpha_per_head = true;
      AttentionCase data({1, 6, 2, 20, keys, 16, 12}, features, dtype, 1.5, &random);
      data.alpha_per_head.SetValues({1e-3, 0.5, 1.0, 1.3, 2.0, 3.0});
      SCOPED_TRACE(std::to_string(keys) + " keys " + NameOf(dtype));
      for (const bool with_support : {false, true}) {
        RunAndCompare(data, dtype, with_support, nullptr);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Attention, PlanSaysHowEveryHeadRuns) {
  Random random(11);
  const auto path = [&](const std::vector<double>& alphas) {
    AttentionFeatures features;
    features.alpha_per_head = true;
    AttentionCase data({1, static_cast<int64_t>(alphas.size()), 1, 3, 5, 4, 4}, features,
                       DType::kFloat64, 1.5, &random);
    data.alpha_per_head.SetValues(alphas);
    return PlanAttention(data.problem()).value().path;
  };
  EXPECT_EQ(path({1.5, 3.0}), "one-pass candidates");
  EXPECT_EQ(path({1.0, 1.0}), "online softmax");
  EXPECT_EQ(path({0.5, 0.9}), "dense products");
  EXPECT_EQ(path({1.0, 0.9}), "online softmax; dense products for heads with alpha below 1");
  EXPECT_EQ(path({0.5, 1.0, 2.0}),
            "one-pass candidates; online softmax for heads with alpha 1; dense products for heads "
            "with alpha below 1");
}

TEST(Attention, EmptyDimensions) {
  Random random(8);
  for (const int64_t queries : {0, 3}) {
    for (const int64_t keys : {0, 3}) {
      for (const int64_t batch : {0, 2}) {
        AttentionCase data({batch, 2, 1, queries, keys, 4, 5}, {}, DType::kFloat32, 1.5, &random);
        RunAndCompare(data, DType::kFloat32, true, nullptr);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// ---- Bad input ----------------------------------------------------------------------------------

class BadAttentionInput : public ::testing::Test {
 protected:
  BadAttentionInput()
      : random_(9), data_({2, 4, 2, 6, 7, 8, 5}, {}, DType::kFloat32, 1.5, &random_) {
    problem_ = data_.problem();
  }

  void ExpectRejected(const std::string& argument) {
    EXPECT_TRUE(testing::Rejects(CheckAttention(problem_), argument));
    AttentionResults results(data_.shape(), DType::kFloat32, nullptr);
    EXPECT_TRUE(testing::Rejects(AttentionForward(problem_, results.views(true)), argument));
    EXPECT_TRUE(testing::Rejects(PlanAttention(problem_).status(), argument));
    for (const uint8_t byte : results.output.bytes()) ASSERT_EQ(byte, 0xFF);
  }

  Random random_;
  AttentionCase data_;
  AttentionProblem problem_;
};

TEST_F(BadAttentionInput, Numbers) {
  for (const double alpha : {0.0, -0.5, static_cast<double>(std::nan("")), HUGE_VAL}) {
    problem_.alpha = alpha;
    ExpectRejected("alpha");
  }
  problem_ = data_.problem();
  problem_.scale = std::nan("");
  ExpectRejected("scale");
  problem_ = data_.problem();
  problem_.softcap = -1.0;
  ExpectRejected("softcap");
  for (const double softcap : {4e38, 1e-46}) {  // Out of float32's range, in which it computes.
    problem_ = data_.problem();
    problem_.softcap = softcap;
    ExpectRejected("softcap");
  }
  problem_ = data_.problem();
  problem_.scale = 1e39;
  ExpectRejected("scale");
  problem_ = data_.problem();
  problem_.window_left = -1;
  ExpectRejected("window_left");
  problem_ = data_.problem();
  problem_.window_right = -5;
  ExpectRejected("window_right");
}

TEST_F(BadAttentionInput, ShapesAndTypes) {
  problem_.query.rank = 3;
  ExpectRejected("query");
  problem_ = data_.problem();
  problem_.query.shape[1] = 3;
  ExpectRejected("key");
  problem_ = data_.problem();
  problem_.key.dtype = DType::kFloat64;
  ExpectRejected("key");
  problem_ = data_.problem();
  problem_.query.dtype = DType::kInt32;
  ExpectRejected("query");
  problem_ = data_.problem();
  problem_.key.shape[3] = 4;
  ExpectRejected("key");
  problem_ = data_.problem();
  problem_.value.shape[2] = 6;
  ExpectRejected("value");
  problem_ = data_.problem();
  problem_.value.shape[0] = 1;
  ExpectRejected("value");
  problem_ = data_.problem();
  problem_.key.data = nullptr;
  ExpectRejected("key");
  problem_ = data_.problem();
  problem_.query.shape[2] = -1;
  ExpectRejected("query");
  problem_ = data_.problem();
  problem_.query.shape[2] = int64_t{1} << 62;
  ExpectRejected("query");
  problem_ = AttentionProblem{};
  ExpectRejected("query");
}

TEST_F(BadAttentionInput, OptionalTensors) {
  const StoredTensor wrong(DType::kFloat32, {3, 3, 3, 3});
  const StoredTensor integers(DType::kInt64, {3});
  problem_.bias = wrong.view();
  ExpectRejected("bias");
  problem_ = data_.problem();
  problem_.query_scale = wrong.view();
  ExpectRejected("query_scale");
  problem_ = data_.problem();
  problem_.key_mask = wrong.view();
  ExpectRejected("key_mask");
  problem_ = data_.problem();
  problem_.key_lengths = integers.view();
  ExpectRejected("key_lengths");
  problem_ = data_.problem();
  problem_.alibi_slopes = wrong.view();
  ExpectRejected("alibi_slopes");
  problem_ = data_.problem();
  problem_.alpha_per_head = wrong.view();
  ExpectRejected("alpha_per_head");
  StoredTensor alphas(DType::kFloat32, {4});
  alphas.SetValues({1.5, 0.5, 0.0, 1.0});
  problem_ = data_.problem();
  problem_.alpha_per_head = alphas.view();
  ExpectRejected("alpha_per_head");
  problem_ = data_.problem();
  problem_.cu_query = integers.view();
  ExpectRejected("cu_key");
  problem_.cu_key = integers.view();
  ExpectRejected("query");  // Packed sequences need batch 1.
}

TEST_F(BadAttentionInput, Outputs) {
  AttentionResults results(data_.shape(), DType::kFloat32, nullptr);
  AttentionOutputs outputs = results.views(false);
  outputs.output = {};
  EXPECT_TRUE(testing::Rejects(AttentionForward(problem_, outputs), "output"));
  outputs = results.views(false);
  outputs.output.dtype = DType::kBFloat16;
  EXPECT_TRUE(testing::Rejects(AttentionForward(problem_, outputs), "output"));
  outputs = results.views(false);
  outputs.output.shape[3] = 4;
  EXPECT_TRUE(testing::Rejects(AttentionForward(problem_, outputs), "output"));
  outputs = results.views(false);
  outputs.output.strides[2] = 0;
  EXPECT_TRUE(testing::Rejects(AttentionForward(problem_, outputs), "output"));
  outputs = results.views(false);
  problem_.query.data = outputs.output.data;
  EXPECT_TRUE(testing::Rejects(AttentionForward(problem_, outputs), "output"));
  problem_ = data_.problem();
  outputs = results.views(false);
  outputs.threshold.rank = 2;
  EXPECT_TRUE(testing::Rejects(AttentionForward(problem_, outputs), "threshold"));
  EXPECT_TRUE(
      testing::Rejects(AttentionForward(problem_, results.views(false), {-1}), "num_threads"));
}

}  // namespace
}  // namespace flash_entmax
