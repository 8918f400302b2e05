// The CPU engine's attention against the reference.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "flash_entmax/attention.h"
#include "flash_entmax/machine.h"
#include "reference/attention_reference.h"
#include "testing/attention_case.h"
#include "testing/compare.h"
#include "testing/random.h"
#include "testing/status.h"
#include "testing/stored_tensor.h"

namespace flash_entmax {
namespace {

using testing::AttentionCase;
using testing::AttentionFeatures;
using testing::EpsilonOf;
using testing::Error;
using testing::IsOk;
using testing::Random;
using testing::SeedMessage;
using testing::StoredTensor;

// Storage of what a call produces, poisoned.
struct Results {
  StoredTensor output;
  StoredTensor threshold;
  AttentionSupport support;

  Results(const testing::AttentionShape& shape, DType dtype, Random* layout)
      : output(dtype, {shape.batch, shape.heads, shape.queries, shape.value_size}, layout),
        threshold(DType::kFloat64, {shape.batch, shape.heads, shape.queries}, layout) {}

  AttentionOutputs views(bool with_support) {
    return {output.mutable_view(), threshold.mutable_view(), with_support ? &support : nullptr};
  }
};

double Alpha(const AttentionProblem& problem, int64_t head) {
  return problem.alpha_per_head
             ? ReadElement(problem.alpha_per_head, head * problem.alpha_per_head.strides[0])
             : problem.alpha;
}

// Largest |query|·|key| product sum of a row: what rounding of its scores is relative to.
double ScoreMagnitude(const AttentionCase& data, const AttentionProblem& problem, int64_t b,
                      int64_t h, int64_t i) {
  const testing::AttentionShape& shape = data.shape();
  const double scale =
      problem.scale ? *problem.scale : 1.0 / std::sqrt(static_cast<double>(shape.head_size));
  const int64_t kv_head = h / (shape.heads / shape.kv_heads);
  double largest = 0.0;
  for (int64_t j = 0; j < shape.keys; ++j) {
    double sum = 0.0;
    for (int64_t e = 0; e < shape.head_size; ++e) {
      sum += std::fabs(data.query.Get({b, h, i, e}) * data.key.Get({b, kv_head, j, e}));
    }
    if (std::isfinite(sum)) largest = std::max(largest, std::fabs(scale) * sum);
  }
  double factor = 1.0;
  if (problem.query_scale) {
    factor = std::fabs(testing::GetBroadcast(data.query_scale, {b, h, i}));
  }
  return largest * std::max(factor, 1.0) + static_cast<double>(shape.keys) + 8.0;
}

// Compares every row of `results` with the reference. A score carries an error of δ from rounding;
// a probability then moves by p^(2−α)·δ, an output by that times the values, and the support may
// differ only by keys whose score is within δ of the threshold.
void ExpectMatchesReference(const AttentionCase& data, const AttentionProblem& problem,
                            const Results& results, bool with_support) {
  const testing::AttentionShape& shape = data.shape();
  const DType dtype = results.output.dtype();
  const double epsilon = dtype == DType::kFloat64 ? 0x1p-52 : 0x1p-23;
  double largest_value = 0.0;
  for (const double v : data.value.Values()) {
    if (std::isfinite(v)) largest_value = std::max(largest_value, std::fabs(v));
  }
  int64_t row = 0;
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t h = 0; h < shape.heads; ++h) {
      const double alpha = Alpha(problem, h);
      for (int64_t i = 0; i < shape.queries; ++i, ++row) {
        SCOPED_TRACE("row " + std::to_string(b) + " " + std::to_string(h) + " " +
                     std::to_string(i) + " alpha " + std::to_string(alpha));
        const reference::AttentionRow want = reference::AttentionForwardRow(problem, b, h, i);
        const double delta = 4.0 * epsilon * static_cast<double>(shape.head_size + 8) *
                             ScoreMagnitude(data, problem, b, h, i);
        double sensitivity = 0.0;  // Σ p^(2−α), with p as large as rounding can make it.
        for (const double p : want.probability) {
          const double raised =
              p > 0.0 ? std::max(p, std::pow(delta, 1.0 / std::max(alpha - 1.0, 1e-9))) : 0.0;
          if (raised > 0.0) sensitivity += std::pow(raised, 2.0 - alpha);
        }
        sensitivity = std::isnan(sensitivity) ? 1.0 : std::max(sensitivity, 1.0);
        for (int64_t e = 0; e < shape.value_size; ++e) {
          const double got = results.output.Get({b, h, i, e});
          const double exact = want.output[static_cast<size_t>(e)];
          const double bound = 4.0 * delta * sensitivity * largest_value +
                               EpsilonOf(dtype) * std::fabs(exact) +
                               2.0 * testing::RoundingNearZero(dtype);
          ASSERT_LE(Error(got, exact), bound) << got << " instead of " << exact;
        }
        const double tau = results.threshold.Get({b, h, i});
        ASSERT_LE(Error(tau, want.threshold), 4.0 * std::max(1.0, alpha) * delta);
        if (!with_support) continue;
        const int64_t begin = results.support.row_offsets[static_cast<size_t>(row)];
        const int64_t end = results.support.row_offsets[static_cast<size_t>(row) + 1];
        std::vector<double> got(want.probability.size(), 0.0);
        for (int64_t entry = begin; entry < end; ++entry) {
          const int32_t key = results.support.key_index[static_cast<size_t>(entry)];
          ASSERT_GE(key, entry == begin
                             ? 0
                             : results.support.key_index[static_cast<size_t>(entry) - 1] + 1);
          ASSERT_LT(static_cast<size_t>(key), got.size());
          got[static_cast<size_t>(key)] =
              static_cast<double>(results.support.probability[static_cast<size_t>(entry)]);
          ASSERT_GT(got[static_cast<size_t>(key)], 0.0);
        }
        if (std::isnan(want.threshold)) {
          ASSERT_EQ(begin, end);
          continue;
        }
        for (size_t j = 0; j < got.size(); ++j) {
          const double p = want.probability[j];
          const double top = std::max(p, got[j]);
          const double slope =
              top > 0.0
                  ? std::pow(std::max(top, std::pow(delta, 1.0 / std::max(alpha - 1.0, 1e-9))),
                             2.0 - alpha)
                  : 0.0;
          ASSERT_LE(Error(got[j], p), 4.0 * delta * std::max(slope, p) + 2e-7 * p + 1e-37);
          // A key whose score is clear of the threshold is in both supports or in neither.
          const double margin = (alpha - 1.0) * want.score[j] - want.threshold;
          if (alpha > 1.0 && std::fabs(margin) > 8.0 * std::max(1.0, alpha) * delta) {
            ASSERT_EQ(got[j] > 0.0, margin > 0.0) << "key " << j;
          }
        }
      }
    }
  }
}

void RunAndCompare(const AttentionCase& data, DType dtype, bool with_support, Random* layout,
                   int num_threads = 0) {
  Results results(data.shape(), dtype, layout);
  const AttentionProblem problem = data.problem();
  ASSERT_TRUE(IsOk(AttentionForward(problem, results.views(with_support), {num_threads})));
  ASSERT_TRUE(results.output.GapsAreIntact());
  ASSERT_TRUE(results.threshold.GapsAreIntact());
  ExpectMatchesReference(data, problem, results, with_support);
}

TEST(Attention, EveryCombinationOfMasksAndModifiers) {
  SCOPED_TRACE(SeedMessage());
  Random random(1);
  const std::vector<DType> dtypes = {DType::kFloat32, DType::kFloat64, DType::kBFloat16,
                                     DType::kFloat16};
  const std::vector<double> alphas = {1.5, 2.0, 1.25, 1.0, 3.0};
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
    for (const double alpha : {1.0, 1.5, 2.0}) {
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
  for (const double alpha : {1.0, 1.1, 1.5, 1.75, 2.0, 4.0}) {
    for (const double deviation : {0.05, 1.0, 4.0}) {
      AttentionFeatures features;
      features.causal = true;
      AttentionCase data({1, 2, 1, 50, 1500, 32, 24}, features, DType::kFloat32, alpha, &random);
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
    for (const double alpha : {1.0, 1.25, 1.5, 2.0, 5.0}) {
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
  for (const double alpha : {1.0, 1.5}) {
    for (const bool bad_key : {false, true}) {
      AttentionFeatures features;
      features.causal = true;
      AttentionCase data({1, 1, 1, 100, 100, 8, 8}, features, DType::kFloat32, alpha, &random);
      (bad_key ? data.key : data.query).Set({0, 0, 60, 3}, std::nan(""));
      Results results(data.shape(), DType::kFloat32, nullptr);
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
  for (const double alpha : {1.0, 1.5}) {
    AttentionFeatures features;
    features.causal = true;
    AttentionCase data({1, 1, 1, 50, 50, 8, 8}, features, DType::kFloat32, alpha, &random);
    for (int64_t e = 0; e < 8; ++e) data.value.Set({0, 0, 49, e}, std::nan(""));
    Results results(data.shape(), DType::kFloat32, nullptr);
    ASSERT_TRUE(IsOk(AttentionForward(data.problem(), results.views(false))));
    for (int64_t i = 0; i < 49; ++i) {
      ASSERT_FALSE(std::isnan(results.output.Get({0, 0, i, 0}))) << i;
    }
  }
}

TEST(Attention, SameBitsForAnyNumberOfThreads) {
  SCOPED_TRACE(SeedMessage());
  Random random(7);
  for (const double alpha : {1.0, 1.5}) {
    AttentionFeatures features;
    features.causal = true;
    const AttentionCase data({2, 4, 2, 150, 300, 16, 16}, features, DType::kFloat32, alpha,
                             &random);
    Results one(data.shape(), DType::kFloat32, nullptr);
    ASSERT_TRUE(IsOk(AttentionForward(data.problem(), one.views(true), {1})));
    for (const int threads : {2, 3, 7}) {
      Results many(data.shape(), DType::kFloat32, nullptr);
      ASSERT_TRUE(IsOk(AttentionForward(data.problem(), many.views(true), {threads})));
      EXPECT_EQ(one.output.bytes(), many.output.bytes());
      EXPECT_EQ(one.threshold.bytes(), many.threshold.bytes());
      EXPECT_EQ(one.support.key_index, many.support.key_index);
      EXPECT_EQ(one.support.probability, many.support.probability);
    }
  }
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
    Results results(data_.shape(), DType::kFloat32, nullptr);
    EXPECT_TRUE(testing::Rejects(AttentionForward(problem_, results.views(true)), argument));
    EXPECT_TRUE(testing::Rejects(PlanAttention(problem_).status(), argument));
    for (const uint8_t byte : results.output.bytes()) ASSERT_EQ(byte, 0xFF);
  }

  Random random_;
  AttentionCase data_;
  AttentionProblem problem_;
};

TEST_F(BadAttentionInput, Numbers) {
  for (const double alpha : {0.99, 0.0, -1.0, static_cast<double>(std::nan("")), HUGE_VAL}) {
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
  problem_ = data_.problem();
  problem_.cu_query = integers.view();
  ExpectRejected("cu_key");
  problem_.cu_key = integers.view();
  ExpectRejected("query");  // Packed sequences need batch 1.
}

TEST_F(BadAttentionInput, Outputs) {
  Results results(data_.shape(), DType::kFloat32, nullptr);
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
