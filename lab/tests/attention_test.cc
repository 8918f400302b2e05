// The engine's attention against compositions of tensor operations, values and gradients.

#include "attention.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <vector>

#include "testing/random.h"

namespace flash_entmax::lab {
namespace {

at::Tensor Gauss(testing::Random& random, std::vector<int64_t> shape) {
  at::Tensor values = at::zeros(shape, at::kDouble);
  double* at = values.mutable_data_ptr<double>();
  for (int64_t i = 0; i < values.numel(); ++i) at[i] = random.Gauss();
  return values;
}

AttentionInputs MakeInputs(testing::Random& random, int64_t length, bool scaled, bool slopes) {
  AttentionInputs inputs;
  inputs.qkv = (1.5 * Gauss(random, {2, length, 3, 4, 8})).set_requires_grad(true);
  if (scaled) {
    inputs.query_scale = (1.0 + 0.2 * Gauss(random, {2, length, 4}).abs()).set_requires_grad(true);
  }
  if (slopes) inputs.slopes = at::arange(4, at::kDouble) * 0.25;
  return inputs;
}

// Composition with every score of a row at once: [batch, length, heads, head_size].
at::Tensor Composed(const AttentionInputs& inputs, double alpha) {
  const at::Tensor scores = CausalScores(inputs, 0, inputs.qkv.size(1));
  const at::Tensor p = SortedEntmax(scores, alpha);
  return at::matmul(p, inputs.qkv.select(2, 2).transpose(1, 2)).transpose(1, 2);
}

double Difference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

TEST(Attention, EngineAgreesWithCompositionInValueAndGradient) {
  SCOPED_TRACE(testing::SeedMessage());
  testing::Random random(1);
  for (const double alpha : {1.0, 1.5, 2.0}) {
    for (const int64_t length : {1, 2, 17, 70}) {
      for (const bool scaled : {false, true}) {
        for (const bool slopes : {false, true}) {
          SCOPED_TRACE(::testing::Message() << "alpha " << alpha << " length " << length);
          AttentionInputs inputs = MakeInputs(random, length, scaled, slopes);
          inputs.fixed_alpha = alpha;
          const at::Tensor weight = Gauss(random, {2, length, 4, 8});
          const at::Tensor engine = EngineAttention(inputs);
          const at::Tensor composed = Composed(inputs, alpha);
          EXPECT_LE(Difference(engine, composed), 1e-6);
          std::vector<at::Tensor> wanted = {inputs.qkv};
          if (scaled) wanted.push_back(inputs.query_scale);
          const auto expected = torch::autograd::grad({(composed * weight).sum()}, wanted);
          const auto got = torch::autograd::grad({(engine * weight).sum()}, wanted);
          for (size_t i = 0; i < wanted.size(); ++i) {
            EXPECT_LE(Difference(got[i], expected[i]),
                      1e-5 * (1.0 + expected[i].abs().max().item<double>()));
          }
        }
      }
    }
  }
}

TEST(Attention, GradientInAlphaAgreesWithFiniteDifferences) {
  SCOPED_TRACE(testing::SeedMessage());
  testing::Random random(2);
  AttentionInputs inputs = MakeInputs(random, 24, true, true);
  const at::Tensor weight = Gauss(random, {2, 24, 4, 8});
  inputs.alpha = at::tensor({1.2, 1.4, 1.6, 1.8}, at::kDouble).set_requires_grad(true);
  const at::Tensor loss = (EngineAttention(inputs) * weight).sum();
  const at::Tensor gradient = torch::autograd::grad({loss}, {inputs.alpha})[0];
  const at::NoGradGuard no_gradient;
  constexpr double kStep = 1e-5;
  for (int64_t head = 0; head < 4; ++head) {
    double values[2];
    for (const int side : {0, 1}) {
      AttentionInputs moved = inputs;
      moved.alpha = inputs.alpha.detach().clone();
      moved.alpha[head] += side == 0 ? -kStep : kStep;
      values[side] = (EngineAttention(moved) * weight).sum().item<double>();
    }
    EXPECT_NEAR(gradient[head].item<double>(), (values[1] - values[0]) / (2 * kStep), 1e-3);
  }
}

TEST(Attention, BisectionAgreesWithSorting) {
  SCOPED_TRACE(testing::SeedMessage());
  testing::Random random(3);
  const at::Tensor scores = 3.0 * Gauss(random, {2, 3, 5, 40});
  for (const double alpha : {1.0, 1.5, 2.0}) {
    const at::Tensor p = BisectedEntmax(scores, at::full({1, 3, 1}, alpha));
    EXPECT_LE(Difference(p, SortedEntmax(scores, alpha)), 1e-9) << alpha;
  }
  const at::Tensor p = BisectedEntmax(scores, at::full({1, 3, 1}, 1.3));
  EXPECT_LE(Difference(p.sum(-1), at::ones({2, 3, 5})), 1e-9);
}

// The state that the quadratic form stands for, one token after the other.
at::Tensor LinearByRecurrence(const AttentionInputs& inputs, const at::Tensor& log_decay,
                              const at::Tensor& write) {
  const at::Tensor qkv = inputs.qkv.detach();
  const int64_t length = qkv.size(1);
  at::Tensor output = at::zeros({qkv.size(0), length, qkv.size(3), qkv.size(4)}, at::kDouble);
  for (int64_t b = 0; b < qkv.size(0); ++b) {
    for (int64_t h = 0; h < qkv.size(3); ++h) {
      at::Tensor state = at::zeros({qkv.size(4), qkv.size(4)}, at::kDouble);
      at::Tensor sum = at::zeros({qkv.size(4)}, at::kDouble);
      const double slope = inputs.slopes.defined() ? inputs.slopes[h].item<double>() : 0.0;
      for (int64_t i = 0; i < length; ++i) {
        double keep = std::exp(-slope), gate = 1.0;
        if (log_decay.defined()) keep *= std::exp(log_decay[b][i][h].item<double>());
        if (write.defined()) gate = write[b][i][h].item<double>();
        const at::Tensor query = at::elu(qkv[b][i][0][h]) + 1;
        const at::Tensor key = at::elu(qkv[b][i][1][h]) + 1;
        state = keep * state + gate * at::outer(key, qkv[b][i][2][h]);
        sum = keep * sum + gate * key;
        output[b][i][h] = at::mv(state.t(), query) / at::dot(sum, query);
      }
    }
  }
  return output;
}

TEST(Attention, LinearAttentionIsItsRecurrence) {
  SCOPED_TRACE(testing::SeedMessage());
  testing::Random random(4);
  for (const bool slopes : {false, true}) {
    const AttentionInputs inputs = MakeInputs(random, 12, false, slopes);
    EXPECT_LE(Difference(LinearAttention(inputs, {}, {}), LinearByRecurrence(inputs, {}, {})),
              1e-5);
    const at::Tensor decay = -0.3 * Gauss(random, {2, 12, 4}).abs();
    const at::Tensor write = Gauss(random, {2, 12, 4}).sigmoid();
    EXPECT_LE(
        Difference(LinearAttention(inputs, decay, write), LinearByRecurrence(inputs, decay, write)),
        1e-5);
  }
}

TEST(Attention, SoftmaxByHeadsIsSoftmax) {
  SCOPED_TRACE(testing::SeedMessage());
  testing::Random random(5);
  for (const int64_t length : {1, 33, 300}) {
    // Slopes 0, 0.25, 0.5, 0.75, then steep ones, whose reach is shorter than the sequence.
    for (const double factor : {1.0, 40.0}) {
      AttentionInputs inputs = MakeInputs(random, length, true, true);
      inputs.slopes = inputs.slopes * factor;
      inputs.fixed_alpha = 1.0;
      const at::Tensor whole = ComposedSoftmax(inputs);
      EXPECT_LE(Difference(whole, Composed(inputs, 1.0)), 1e-6);
      EXPECT_LE(Difference(SoftmaxByHeads(inputs), whole), 1e-6) << length << " " << factor;
    }
  }
}

}  // namespace
}  // namespace flash_entmax::lab
