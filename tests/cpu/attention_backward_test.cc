// The CPU engine's gradients of attention against the reference and finite differences.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "flash_entmax/attention.h"
#include "reference/attention_reference.h"
#include "testing/attention_case.h"
#include "testing/backward_case.h"
#include "testing/compare.h"
#include "testing/finite_difference.h"
#include "testing/random.h"
#include "testing/status.h"
#include "testing/stored_tensor.h"

namespace flash_entmax {
namespace {

using testing::AttentionCase;
using testing::AttentionFeatures;
using testing::AttentionShape;
using testing::BackwardCase;
using testing::BackwardTolerance;
using testing::IsOk;
using testing::Random;
using testing::SeedMessage;
using testing::StoredTensor;

void RunAndCompare(BackwardCase* c, const AttentionOptions& options,
                   const BackwardTolerance& tolerance = {}) {
  ASSERT_TRUE(IsOk(c->Run(options)));
  ASSERT_EQ(c->Disagreements(tolerance), "");
}

TEST(AttentionBackward, EveryCombinationOfMasksAndModifiers) {
  SCOPED_TRACE(SeedMessage());
  Random random(1);
  const std::vector<DType> dtypes = {DType::kFloat32, DType::kFloat64, DType::kBFloat16,
                                     DType::kFloat16};
  const std::vector<double> alphas = {1.5, 2.0, 1.25, 1.0, 1.1, 0.5, 0.8};
  const std::vector<int64_t> capacities = {-1, 0, 40};
  for (uint32_t bits = 0; bits < (1u << AttentionFeatures::kCount); ++bits) {
    const AttentionFeatures features = AttentionFeatures::FromBits(bits);
    if (!features.IsValid()) continue;
    const AttentionShape shape{random.Integer(1, 2),
                               4,
                               random.Pick<int64_t>({1, 2, 4}),
                               random.Integer(1, 30),
                               random.Integer(1, 40),
                               random.Integer(1, 20),
                               random.Integer(1, 20)};
    const DType dtype = dtypes[bits % dtypes.size()];
    const double alpha = alphas[(bits / 4) % alphas.size()];
    AttentionOptions options;
    options.num_threads = static_cast<int>(bits % 3);
    options.support_capacity = capacities[(bits / 20) % capacities.size()];
    std::ostringstream trace;
    trace << "bits " << bits << ": " << features << NameOf(dtype) << " alpha " << alpha << " Nq "
          << shape.queries << " Nk " << shape.keys << " d " << shape.head_size << " dv "
          << shape.value_size << " capacity " << options.support_capacity;
    SCOPED_TRACE(trace.str());
    BackwardCase c(AttentionCase(shape, features, dtype, alpha, &random, &random), &random,
                   &random);
    if (bits % 2 == 0) c.gradients.bias = {};  // Which allows the dense way.
    RunAndCompare(&c, options);
    if (HasFatalFailure()) return;
  }
}

// Lengths around the blocks', through every way: supports kept, found again, dense.
TEST(AttentionBackward, OddSizes) {
  SCOPED_TRACE(SeedMessage());
  Random random(2);
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (const double alpha : {0.5, 1.0, 1.5, 2.0}) {
      for (const int64_t queries : {1, 11, 13, 95, 97}) {
        for (const int64_t keys : {1, 31, 33, 95, 97, 200}) {
          for (const int64_t capacity : {-1, 0}) {
            AttentionFeatures features;
            features.causal = queries % 4 == 1;
            features.window_left = keys == 200;
            SCOPED_TRACE(std::to_string(queries) + " x " + std::to_string(keys) + " alpha " +
                         std::to_string(alpha) + " capacity " + std::to_string(capacity));
            BackwardCase c(AttentionCase({1, 2, 1, queries, keys, random.Integer(1, 70),
                                          random.Integer(1, 70)},
                                         features, dtype, alpha, &random),
                           &random);
            AttentionOptions options;
            options.support_capacity = capacity;
            RunAndCompare(&c, options);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

// Rows of a realistic length: sparse, dense, and in between.
TEST(AttentionBackward, LongRows) {
  SCOPED_TRACE(SeedMessage());
  Random random(3);
  for (const double alpha : {0.5, 1.0, 1.1, 1.3, 1.5, 2.0}) {
    for (const double deviation : {0.05, 1.0, 4.0}) {
      for (const int64_t capacity : {-1, 300, 0}) {
        AttentionFeatures features;
        features.causal = true;
        AttentionCase data({1, 1, 1, 110, 700, 20, 18}, features, DType::kFloat32, alpha, &random);
        data.query.SetValues(random.GaussVector(static_cast<size_t>(data.query.size()), deviation));
        SCOPED_TRACE("alpha " + std::to_string(alpha) + " deviation " + std::to_string(deviation) +
                     " capacity " + std::to_string(capacity));
        BackwardCase c(std::move(data), &random);
        AttentionOptions options;
        options.support_capacity = capacity;
        RunAndCompare(&c, options);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// The whole loss along random directions, in float64.
TEST(AttentionBackward, FiniteDifferences) {
  SCOPED_TRACE(SeedMessage());
  Random random(4);
  for (const double alpha : {0.4, 0.9, 1.0, 1.25, 1.5, 2.5}) {
    for (const int64_t capacity : {-1, 0}) {
      AttentionFeatures features;
      features.causal = true;
      features.softcap = true;
      features.alibi = true;
      features.query_scale = true;
      BackwardCase c(
          AttentionCase({1, 2, 1, 20, 30, 5, 4}, features, DType::kFloat64, alpha, &random),
          &random);
      AttentionOptions options;
      options.support_capacity = capacity;
      ASSERT_TRUE(IsOk(c.Run(options)));
      const auto check = [&](const std::string& name, StoredTensor* input,
                             const StoredTensor& gradient) {
        const std::vector<double> at = input->Values();
        const std::vector<double> direction = random.GaussVector(at.size());
        const std::vector<double> slope = gradient.Values();
        double expected = 0.0;
        for (size_t i = 0; i < at.size(); ++i) expected += slope[i] * direction[i];
        const double difference = testing::CentralDifference(
            [&](double t) {
              std::vector<double> moved = at;
              for (size_t i = 0; i < at.size(); ++i) moved[i] += t * direction[i];
              input->SetValues(moved);
              return c.Loss();
            },
            0.0);
        input->SetValues(at);
        EXPECT_LE(std::fabs(difference - expected), 1e-6 * (1.0 + std::fabs(expected)))
            << name << " alpha " << alpha;
      };
      check("query", &c.data.query, c.query);
      check("key", &c.data.key, c.key);
      check("value", &c.data.value, c.value);
      check("query_scale", &c.data.query_scale, c.query_scale);
      check("alibi_slopes", &c.data.alibi_slopes, c.alibi_slopes);
    }
  }
}

// α > 2: u = p^(2−α) grows without bound as p falls, so gradients of random scores have no bound
// on their error. Scores on a grid of exact numbers keep every probability away from zero.
TEST(AttentionBackward, AlphaAboveTwo) {
  SCOPED_TRACE(SeedMessage());
  Random random(11);
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (const double alpha : {2.5, 3.0, 4.0}) {
      if (dtype == DType::kFloat32 && alpha > 3.0) continue;  // Nothing would be left to compare.
      for (const int64_t keys : {12, 150}) {
        for (const int64_t capacity : {-1, 0}) {
          for (const bool bias_gradient : {false, true}) {
            AttentionFeatures features;
            features.causal = true;
            features.bias = true;
            features.key_mask = true;
            features.query_scale = true;
            AttentionCase data({1, 4, 2, 30, keys, 4, 5}, features, dtype, alpha, &random);
            data.query_scale = StoredTensor(DType::kFloat64, {1, 4, 30});
            data.bias = StoredTensor(DType::kFloat64, {1, 4, 30, keys});
            const auto set = [&](StoredTensor* tensor, double step) {
              std::vector<double> values = tensor->Values();
              for (double& x : values) x = step * static_cast<double>(random.Integer(-1, 1));
              tensor->SetValues(values);
            };
            set(&data.query, 0.25);  // Times the scale of 1/2.
            set(&data.key, 1.0);
            set(&data.query_scale, 1.0);
            set(&data.bias, 0.25);
            SCOPED_TRACE(std::string(NameOf(dtype)) + " alpha " + std::to_string(alpha) + " keys " +
                         std::to_string(keys) + " capacity " + std::to_string(capacity));
            BackwardCase c(std::move(data), &random);
            if (!bias_gradient) c.gradients.bias = {};
            AttentionOptions options;
            options.support_capacity = capacity;
            // Rounding is multiplied by u ≤ keys^(α−2) or so, in sums of that many terms; where few
            // keys share a row, a level of the grid may come so near the threshold that u is 1e5.
            const double epsilon = dtype == DType::kFloat64 ? 0x1p-52 : 0x1p-23;
            const double usual = dtype == DType::kFloat64 ? 1e-10 : 3e-5;
            const double rounding = epsilon * std::pow(static_cast<double>(keys), alpha - 1.0);
            RunAndCompare(&c, options, {std::max(usual, rounding)});
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

// A bias with an element for every score, which the dense way serves, and one that is shared, which
// takes the lists.
TEST(AttentionBackward, BiasOfLargeSupports) {
  SCOPED_TRACE(SeedMessage());
  Random random(13);
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (const double alpha : {0.5, 1.3, 1.5}) {
      for (const bool shared : {false, true}) {
        AttentionFeatures features;
        features.causal = true;
        features.bias = true;
        features.softcap = true;
        AttentionCase data({2, 2, 1, 60, 120, 12, 12}, features, dtype, alpha, &random);
        data.bias = StoredTensor(DType::kFloat64, {shared ? 1 : 2, 2, 60, 120});
        data.bias.SetValues(random.GaussVector(static_cast<size_t>(data.bias.size()), 0.1));
        SCOPED_TRACE(std::string(NameOf(dtype)) + " alpha " + std::to_string(alpha));
        BackwardCase c(std::move(data), &random);
        AttentionOptions options;
        options.support_capacity = 0;
        RunAndCompare(&c, options);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Heads below, at and above α = 1 in one call.
TEST(AttentionBackward, AlphaOfEveryKindInOneCall) {
  SCOPED_TRACE(SeedMessage());
  Random random(12);
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (const int64_t keys : {40, 250}) {
      for (const bool masked : {false, true}) {
        AttentionFeatures features;
        features.causal = true;
        features.alibi = true;
        features.alpha_per_head = true;
        features.key_mask = masked;
        AttentionCase data({1, 6, 2, 120, keys, 16, 12}, features, dtype, 1.5, &random);
        data.alpha_per_head.SetValues({1e-3, 0.5, 1.0, 1.3, 1.5, 2.0});
        if (masked) {  // So few keys that the support is none of the dense way's.
          for (int64_t j = 0; j < keys; ++j) data.key_mask.Set({0, j}, j % 16 == 0 ? 1.0 : 0.0);
        }
        SCOPED_TRACE(std::string(NameOf(dtype)) + " keys " + std::to_string(keys));
        BackwardCase c(std::move(data), &random);
        RunAndCompare(&c, {});
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(AttentionBackward, SameBitsForAnyNumberOfThreads) {
  SCOPED_TRACE(SeedMessage());
  for (const double alpha : {0.5, 1.0, 1.3, 1.5}) {
    for (const double deviation : {0.05, 1.0}) {
      for (const int64_t capacity : {-1, 1000}) {
        std::vector<std::vector<uint8_t>> first;
        for (const int threads : {1, 2, 3, 7}) {
          Random random(5);
          AttentionFeatures features;
          features.causal = true;
          features.alibi = true;
          AttentionCase data({2, 4, 2, 250, 600, 16, 16}, features, DType::kFloat32, alpha,
                             &random);
          data.query.SetValues(
              random.GaussVector(static_cast<size_t>(data.query.size()), deviation));
          for (int64_t h = 0; h < 4; ++h) data.alibi_slopes.Set({h}, 0.001);
          BackwardCase c(std::move(data), &random);
          AttentionOptions options;
          options.num_threads = threads;
          options.support_capacity = capacity;
          ASSERT_TRUE(IsOk(c.Run(options)));
          const std::vector<std::vector<uint8_t>> bytes = {c.query.bytes(), c.key.bytes(),
                                                           c.value.bytes(), c.alpha.bytes(),
                                                           c.alibi_slopes.bytes()};
          if (threads == 1) first = bytes;
          EXPECT_EQ(bytes, first) << threads << " threads";
        }
      }
    }
  }
}

// A row whose output is NaN gives NaN to its own gradients and to those of the keys it sees; no
// other row or key is touched by it.
TEST(AttentionBackward, NotANumberInQueryOrKey) {
  SCOPED_TRACE(SeedMessage());
  Random random(6);
  for (const double alpha : {0.5, 1.0, 1.5}) {
    for (const int64_t capacity : {-1, 0}) {
      for (const bool bad_key : {false, true}) {
        AttentionFeatures features;
        features.causal = true;
        AttentionCase data({1, 1, 1, 100, 100, 8, 8}, features, DType::kFloat32, alpha, &random);
        (bad_key ? data.key : data.query).Set({0, 0, 60, 3}, std::nan(""));
        BackwardCase c(std::move(data), &random);
        AttentionOptions options;
        options.support_capacity = capacity;
        ASSERT_TRUE(IsOk(c.Run(options)));
        for (int64_t i = 0; i < 100; ++i) {
          const bool bad_row = bad_key ? i >= 60 : i == 60;
          const bool key_seen = bad_key || i <= 60;  // By a bad row.
          for (int64_t e = 0; e < 8; ++e) {
            ASSERT_EQ(std::isnan(c.query.Get({0, 0, i, e})), bad_row) << i;
            ASSERT_EQ(std::isnan(c.key.Get({0, 0, i, e})), key_seen) << i;
            ASSERT_EQ(std::isnan(c.value.Get({0, 0, i, e})), key_seen) << i;
          }
        }
        ASSERT_TRUE(std::isnan(c.alpha.Get({0})));
      }
    }
  }
}

// NaN in the output's gradient stays in its row and in the keys of that row's support; NaN in a
// value that no row may see changes nothing.
TEST(AttentionBackward, NotANumberInGradientOrHiddenValue) {
  SCOPED_TRACE(SeedMessage());
  Random random(7);
  for (const double alpha : {0.5, 1.0, 1.5, 2.0}) {
    for (const int64_t capacity : {-1, 0}) {
      AttentionFeatures features;
      features.causal = true;
      AttentionCase data({1, 1, 1, 80, 80, 8, 8}, features, DType::kFloat32, alpha, &random);
      for (int64_t e = 0; e < 8; ++e) data.value.Set({0, 0, 79, e}, std::nan(""));
      for (int64_t e = 0; e < 8; ++e) data.query.Set({0, 0, 79, e}, 0.0);
      BackwardCase c(std::move(data), &random);
      c.grad_output.Set({0, 0, 40, 2}, std::nan(""));
      AttentionOptions options;
      options.support_capacity = capacity;
      ASSERT_TRUE(IsOk(c.Run(options)));
      const auto row = reference::AttentionForwardRow(c.data.problem(), 0, 0, 40);
      for (int64_t i = 0; i < 79; ++i) {
        ASSERT_EQ(std::isnan(c.query.Get({0, 0, i, 0})), i == 40) << i;
        const double p = row.probability[static_cast<size_t>(i)];
        if (p == 0.0) {
          // Row 79 sees everything, and its own value is NaN where its probability is positive.
          ASSERT_FALSE(std::isnan(c.value.Get({0, 0, i, 2}))) << i;
        } else if (p > 1e-5) {
          ASSERT_TRUE(std::isnan(c.value.Get({0, 0, i, 2}))) << i;
          ASSERT_TRUE(std::isnan(c.key.Get({0, 0, i, 0}))) << i;
        }
      }
    }
  }
}

TEST(AttentionBackward, SubsetsOfGradients) {
  SCOPED_TRACE(SeedMessage());
  Random random(8);
  for (uint32_t wanted = 0; wanted < 32; ++wanted) {
    for (const double alpha : {1.0, 1.5}) {
      AttentionFeatures features;
      features.query_scale = true;
      BackwardCase c(
          AttentionCase({1, 2, 2, 100, 110, 7, 6}, features, DType::kFloat32, alpha, &random),
          &random);
      if ((wanted & 1) == 0) c.gradients.query = {};
      if ((wanted & 2) == 0) c.gradients.key = {};
      if ((wanted & 4) == 0) c.gradients.value = {};
      if ((wanted & 8) == 0) c.gradients.alpha = {};
      if ((wanted & 16) == 0) c.gradients.query_scale = {};
      SCOPED_TRACE("wanted " + std::to_string(wanted));
      RunAndCompare(&c, {});
      if (HasFatalFailure()) return;
    }
  }
}

TEST(AttentionBackward, EmptyDimensions) {
  Random random(9);
  for (const int64_t queries : {0, 3}) {
    for (const int64_t keys : {0, 3}) {
      for (const int64_t batch : {0, 2}) {
        BackwardCase c(
            AttentionCase({batch, 2, 1, queries, keys, 4, 5}, {}, DType::kFloat32, 1.5, &random),
            &random);
        RunAndCompare(&c, {});
        if (HasFatalFailure()) return;
      }
    }
  }
}

// ---- Bad input ----------------------------------------------------------------------------------

class BadBackwardInput : public ::testing::Test {
 protected:
  BadBackwardInput()
      : random_(10),
        case_(AttentionCase({2, 4, 2, 6, 7, 8, 5}, {}, DType::kFloat32, 1.5, &random_), &random_) {}

  void ExpectRejected(const std::string& argument) {
    EXPECT_TRUE(testing::Rejects(case_.Run({}), argument));
    for (const uint8_t byte : case_.query.bytes()) ASSERT_EQ(byte, 0xFF);
    case_.ResetViews();
  }

  Random random_;
  BackwardCase case_;
};

TEST_F(BadBackwardInput, Gradients) {
  case_.gradients.output = {};
  ExpectRejected("grad_output");
  case_.gradients.output.dtype = DType::kFloat64;
  ExpectRejected("grad_output");
  case_.gradients.output.shape[3] = 4;
  ExpectRejected("grad_output");
  case_.gradients.query.dtype = DType::kBFloat16;
  ExpectRejected("grad_query");
  case_.gradients.key.shape[2] = 6;
  ExpectRejected("grad_key");
  case_.gradients.value.strides[2] = 0;
  ExpectRejected("grad_value");
  case_.gradients.alpha.dtype = DType::kBFloat16;
  ExpectRejected("grad_alpha");
  case_.gradients.alpha.shape[0] = 3;
  ExpectRejected("grad_alpha");
  case_.gradients.bias = case_.gradients.query;
  ExpectRejected("grad_bias");
  case_.gradients.alibi_slopes = case_.gradients.alpha;
  ExpectRejected("grad_alibi_slopes");
  case_.gradients.query_scale = case_.gradients.alpha;
  ExpectRejected("grad_query_scale");
  case_.gradients.value.data = case_.gradients.key.data;  // smaller: overlaps nothing else
  ExpectRejected("grad_value");
  case_.gradients.output.data = case_.gradients.query.data;
  ExpectRejected("grad_query");
}

TEST_F(BadBackwardInput, SavedBuffer) {
  const AttentionProblem problem = case_.data.problem();
  AttentionOptions options;
  options.save_for_backward = true;
  const Expected<AttentionPlan> plan = PlanAttention(problem, options);
  ASSERT_TRUE(IsOk(plan.status()));
  ASSERT_LE(1, plan->saved_bytes);
  ASSERT_EQ(PlanAttention(problem).value().saved_bytes, 0);
  testing::AlignedBytes memory(plan->saved_bytes);
  const auto rejects = [&](AttentionBuffer saved, const std::string& argument) {
    AttentionOutputs outputs;
    outputs.output = case_.output.mutable_view();
    EXPECT_TRUE(testing::Rejects(AttentionForward(problem, outputs, options, saved), argument));
    EXPECT_TRUE(
        testing::Rejects(AttentionBackward(problem, case_.gradients, options, saved), argument));
  };
  rejects({}, "saved");
  rejects({memory.data(), plan->saved_bytes - 1}, "saved");
  rejects({memory.data() + 1, plan->saved_bytes}, "saved");
  // Of the right size, but nobody filled it.
  EXPECT_TRUE(testing::Rejects(
      AttentionBackward(problem, case_.gradients, options, {memory.data(), plan->saved_bytes}),
      "saved"));
  // Filled for a problem of the same sizes but another mask.
  AttentionProblem causal = problem;
  causal.causal = true;
  AttentionOutputs outputs;
  outputs.output = case_.output.mutable_view();
  const AttentionBuffer saved{memory.data(), plan->saved_bytes};
  ASSERT_TRUE(IsOk(AttentionForward(causal, outputs, options, saved)));
  EXPECT_TRUE(
      testing::Rejects(AttentionBackward(problem, case_.gradients, options, saved), "saved"));
  EXPECT_TRUE(IsOk(AttentionBackward(causal, case_.gradients, options, saved)));
  options.support_capacity = -2;
  rejects({memory.data(), plan->saved_bytes}, "support_capacity");
}

}  // namespace
}  // namespace flash_entmax
