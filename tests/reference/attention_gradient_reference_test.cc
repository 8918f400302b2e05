// Every gradient of the reference attention against central differences, under every combination
// of masks and modifiers.

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "reference/attention_reference.h"
#include "testing/attention_case.h"
#include "testing/compare.h"
#include "testing/finite_difference.h"
#include "testing/random.h"

namespace flash_entmax {
namespace {

using reference::AttentionBackward;
using reference::AttentionForward;
using reference::AttentionGradients;
using testing::AttentionCase;
using testing::AttentionFeatures;
using testing::AttentionShape;
using testing::CentralDifference;
using testing::Error;
using testing::Index;
using testing::Random;
using testing::SeedMessage;
using testing::StoredTensor;
using testing::Unravel;

double Loss(const AttentionCase& c, const std::vector<double>& grad_output) {
  const std::vector<double> output = AttentionForward(c.problem()).output;
  double loss = 0.0;
  for (size_t i = 0; i < output.size(); ++i) loss += output[i] * grad_output[i];
  return loss;
}

// The gradient of a tensor that is repeated along `full`: the sum over its repetitions.
std::vector<double> ReduceTo(const Index& shape, const Index& full,
                             const std::vector<double>& gradient) {
  StoredTensor sum(DType::kFloat64, shape);
  sum.SetValues(std::vector<double>(sum.size(), 0.0));
  for (size_t flat = 0; flat < gradient.size(); ++flat) {
    const Index index = Unravel(full, static_cast<int64_t>(flat));
    Index own(shape.size());
    for (size_t d = 0; d < shape.size(); ++d) {
      own[d] = shape[d] == 1 ? 0 : index[full.size() - shape.size() + d];
    }
    sum.Set(own, sum.Get(own) + gradient[flat]);
  }
  return sum.Values();
}

// Moves `tensor`, one of c's, along a random direction and compares the derivative of the loss
// with the product of direction and gradient. One direction sees an error in any element.
void ExpectDerivative(AttentionCase* c, StoredTensor* tensor, const std::vector<double>& gradient,
                      const std::vector<double>& grad_output, double tolerance, Random* random) {
  const std::vector<double> start = tensor->Values();
  ASSERT_EQ(gradient.size(), start.size());
  const std::vector<double> direction = random->GaussVector(start.size());
  double got = 0.0;
  for (size_t i = 0; i < start.size(); ++i) got += gradient[i] * direction[i];
  const double want = CentralDifference(
      [&](double t) {
        std::vector<double> moved = start;
        for (size_t i = 0; i < start.size(); ++i) moved[i] += t * direction[i];
        tensor->SetValues(moved);
        return Loss(*c, grad_output);
      },
      0.0, 1e-5);
  tensor->SetValues(start);
  ASSERT_LE(Error(got, want), tolerance);
}

void ExpectAllDerivatives(const AttentionShape& shape, const AttentionFeatures& features,
                          double alpha, double tolerance, Random* random) {
  AttentionCase c(shape, features, DType::kFloat64, alpha, random);
  const AttentionShape& s = c.shape();
  const std::vector<double> grad_output =
      random->GaussVector(s.batch * s.heads * s.queries * s.value_size);
  const AttentionGradients gradients = AttentionBackward(c.problem(), grad_output);
  const auto expect = [&](const char* name, StoredTensor* tensor,
                          const std::vector<double>& gradient) {
    SCOPED_TRACE(name);
    ExpectDerivative(&c, tensor, gradient, grad_output, tolerance, random);
  };
  expect("query", &c.query, gradients.query);
  expect("key", &c.key, gradients.key);
  expect("value", &c.value, gradients.value);
  if (features.alpha_per_head) expect("alpha", &c.alpha_per_head, gradients.alpha);
  if (features.alibi) expect("alibi_slopes", &c.alibi_slopes, gradients.alibi_slopes);
  if (features.query_scale) {
    expect("query_scale", &c.query_scale,
           ReduceTo(c.query_scale.shape(), {s.batch, s.heads, s.queries}, gradients.query_scale));
  }
  if (features.bias) {
    expect("bias", &c.bias,
           ReduceTo(c.bias.shape(), {s.batch, s.heads, s.queries, s.keys}, gradients.bias));
  }
}

// α below 1.3: the output has three continuous derivatives there even where the support changes,
// so that differences are accurate whatever the random numbers are.
TEST(AttentionBackwardReference, EveryCombinationOfMasks) {
  SCOPED_TRACE(SeedMessage());
  Random random(60);
  const std::vector<double> alphas = {0.8, 1.0, 1.0 + 1e-9, 1.1, 1.25};
  for (uint32_t bits = 0; bits < (1u << AttentionFeatures::kCount); ++bits) {
    const AttentionFeatures features = AttentionFeatures::FromBits(bits);
    if (!features.IsValid()) continue;
    const AttentionShape shape{.batch = random.Integer(1, 2),
                               .heads = 2,
                               .kv_heads = random.Integer(1, 2),
                               .queries = random.Integer(1, 4),
                               .keys = random.Integer(1, 5),
                               .head_size = random.Integer(1, 3),
                               .value_size = random.Integer(1, 2)};
    ExpectAllDerivatives(shape, features, random.Pick(alphas), 1e-6, &random);
    if (HasFatalFailure()) FAIL() << "with " << features;
  }
}

// The second derivative of p jumps where the support changes, so that the difference quotient has
// an error of a multiple of its step.
TEST(AttentionBackwardReference, OneAndAHalf) {
  SCOPED_TRACE(SeedMessage());
  Random random(61);
  for (int i = 0; i < 10; ++i) {
    ExpectAllDerivatives({.heads = 4, .kv_heads = 2}, {.causal = true, .alibi = true}, 1.5, 1e-3,
                         &random);
    if (HasFatalFailure()) return;
  }
}

TEST(AttentionBackwardReference, NothingReachesHiddenKeysAndRows) {
  SCOPED_TRACE(SeedMessage());
  Random random(62);
  // Query 0 sees no key; key 1 is masked.
  const AttentionShape shape{.batch = 1, .heads = 1, .queries = 3, .keys = 2};
  AttentionCase c(shape, {.causal = true, .key_mask = true}, DType::kFloat64, 1.5, &random);
  c.key_mask = StoredTensor(DType::kUInt8, {1, 2});
  c.key_mask.SetValues({1.0, 0.0});
  c.key.Set({0, 0, 1, 0}, std::nan(""));
  c.value.Set({0, 0, 1, 0}, std::nan(""));
  const std::vector<double> grad_output = random.GaussVector(6);
  const AttentionGradients gradients = AttentionBackward(c.problem(), grad_output);
  for (int64_t x = 0; x < 3; ++x) {
    EXPECT_EQ(gradients.query[x], 0.0);
    EXPECT_EQ(gradients.key[3 + x], 0.0);
  }
  for (int64_t x = 0; x < 2; ++x) EXPECT_EQ(gradients.value[2 + x], 0.0);
  for (double bias : gradients.bias) EXPECT_FALSE(std::isnan(bias));
  // The one visible key has p = 1 in two rows.
  EXPECT_LE(Error(gradients.value[0], grad_output[2] + grad_output[4]), 1e-15);
}

TEST(AttentionBackwardReference, AlphaIsTheSumOverRowsOfAHead) {
  SCOPED_TRACE(SeedMessage());
  Random random(63);
  AttentionCase c({.batch = 2, .heads = 2}, {.alpha_per_head = true}, DType::kFloat64, 1.25,
                  &random);
  const std::vector<double> grad_output = random.GaussVector(2 * 2 * 3 * 2);
  const AttentionGradients gradients = AttentionBackward(c.problem(), grad_output);
  for (int64_t h = 0; h < 2; ++h) {
    const double alpha = c.alpha_per_head.Get({h});
    const double want = CentralDifference(
        [&](double a) {
          c.alpha_per_head.Set({h}, a);
          return Loss(c, grad_output);
        },
        alpha, 1e-5);
    c.alpha_per_head.Set({h}, alpha);
    EXPECT_LE(Error(gradients.alpha[h], want), 1e-7);
  }
}

}  // namespace
}  // namespace flash_entmax
