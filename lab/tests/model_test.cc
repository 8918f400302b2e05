// Models: gradients, causality, and what every kind of attention must share.

#include "model.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <vector>

#include "optimizer.h"
#include "steps.h"
#include "testing/random.h"

namespace flash_entmax::lab {
namespace {

const std::vector<AttentionKind> kKinds = {
    AttentionKind::kSoftmax,         AttentionKind::kSsmax,    AttentionKind::kEntmax,
    AttentionKind::kEntmaxLearnable, AttentionKind::kAsentmax, AttentionKind::kLinear,
    AttentionKind::kSelectiveLinear};
const std::vector<Positions> kPositions = {Positions::kNone, Positions::kRope, Positions::kAlibi,
                                           Positions::kNape};

ModelConfig SmallConfig(AttentionKind kind, Positions positions) {
  ModelConfig config;
  config.layers = 2;
  config.width = 16;
  config.mlp = 16;
  config.heads = 4;
  config.init = 0.3;
  config.attention = kind;
  config.positions = positions;
  return config;
}

struct Problem {
  at::Tensor tokens, index, labels;
};

Problem MakeProblem(testing::Random& random, int64_t batch, int64_t length) {
  Problem problem{at::zeros({batch, length}, at::kLong), at::zeros({batch * 2}, at::kLong),
                  at::zeros({batch * 2}, at::kLong)};
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < length; ++i) problem.tokens[b][i] = random.Integer(0, 10);
    for (int64_t i = 0; i < 2; ++i) {
      problem.index[2 * b + i] = b * length + length - 2 + i;
      problem.labels[2 * b + i] = random.Integer(0, 10);
    }
  }
  return problem;
}

TEST(Model, GradientsAgreeWithFiniteDifferences) {
  SCOPED_TRACE(testing::SeedMessage());
  testing::Random random(20);
  for (const AttentionKind kind : kKinds) {
    for (const Positions positions : kPositions) {
      SCOPED_TRACE(::testing::Message() << NameOf(kind) << ", " << NameOf(positions));
      const Model model(SmallConfig(kind, positions), 11, at::kCPU, at::kFloat);
      const Problem problem = MakeProblem(random, 3, 9);
      at::Tensor leaf = model.Initialise(7);
      // A direction in the space of all parameters, and the slope along it.
      at::Tensor direction = at::zeros_like(leaf);
      for (int64_t i = 0; i < leaf.numel(); ++i) {
        direction.mutable_data_ptr<float>()[i] = static_cast<float>(random.Gauss());
      }
      direction = direction / direction.norm();
      leaf.set_requires_grad(true);
      const at::Tensor loss = Loss(model, leaf, problem.tokens, problem.index, problem.labels);
      const at::Tensor gradient = torch::autograd::grad({loss}, {leaf})[0];
      const double slope = (gradient * direction).sum().item<double>();
      const at::NoGradGuard no_gradient;
      const auto value = [&](double step) {
        return Loss(model, leaf.detach() + step * direction, problem.tokens, problem.index,
                    problem.labels)
            .item<double>();
      };
      constexpr double kStep = 3e-3;
      const double difference = (value(kStep) - value(-kStep)) / (2 * kStep);
      EXPECT_NEAR(slope, difference, 2e-3 + 0.02 * std::abs(slope));
    }
  }
}

TEST(Model, LooksOnlyBack) {
  SCOPED_TRACE(testing::SeedMessage());
  testing::Random random(21);
  const at::NoGradGuard no_gradient;
  for (const AttentionKind kind : kKinds) {
    for (const Positions positions : kPositions) {
      SCOPED_TRACE(::testing::Message() << NameOf(kind) << ", " << NameOf(positions));
      const Model model(SmallConfig(kind, positions), 11, at::kCPU, at::kFloat);
      const at::Tensor parameters = model.Initialise(3);
      at::Tensor tokens = MakeProblem(random, 1, 12).tokens;
      const at::Tensor index = at::arange(6, at::kLong);
      const at::Tensor before = model.Forward(parameters, tokens, index);
      tokens.narrow(1, 6, 6).copy_((tokens.narrow(1, 6, 6) + 1).remainder(11));
      const at::Tensor after = model.Forward(parameters, tokens, index);
      EXPECT_LE((after - before).abs().max().item<double>(), 1e-6);
      EXPECT_TRUE(before.isfinite().all().item<bool>());
    }
  }
}

TEST(Model, AdaptiveScalerStartsWhereToldTo) {
  ModelConfig config = SmallConfig(AttentionKind::kAsentmax, Positions::kNape);
  config.scaler_start = 1.05;
  const Model model(config, 11, at::kCPU, at::kFloat);
  const at::NoGradGuard no_gradient;
  bool seen = false;
  const auto observer = [&](int64_t /*layer*/, const AttentionInputs& inputs) {
    seen = true;
    ASSERT_TRUE(inputs.query_scale.defined());
    const at::Tensor plain = inputs.query_scale.narrow(2, 0, 2);
    const at::Tensor scaled = inputs.query_scale.narrow(2, 2, 2);
    EXPECT_LE((plain - 1.0).abs().max().item<double>(), 1e-6);
    EXPECT_LE((scaled - 1.05).abs().max().item<double>(), 1e-5);
    // NAPE of four heads: slopes 1, 1/2, none, none.
    EXPECT_TRUE(inputs.slopes.equal(at::tensor({1.0F, 0.5F, 0.0F, 0.0F})));
  };
  model.Forward(model.Initialise(1), at::zeros({1, 5}, at::kLong), at::zeros({1}, at::kLong),
                observer);
  EXPECT_TRUE(seen);
}

TEST(Optimizer, FollowsTheFormula) {
  TrainingConfig training;
  training.steps = 10;
  training.warmup = 2;
  training.learning_rate = 0.1;
  training.weight_decay = 0.5;
  training.clip = 5.0;
  EXPECT_NEAR(LearningRate(training, 0), 0.05, 1e-12);
  EXPECT_NEAR(LearningRate(training, 2), 0.1, 1e-12);
  EXPECT_NEAR(LearningRate(training, 6), 0.05, 1e-12);
  EXPECT_NEAR(LearningRate(training, 10), 0.0, 1e-12);
  TrainingState state{at::tensor({1.0F, -2.0F}), at::zeros({2}), at::zeros({2})};
  // Norm 10: clipped to (3, 4).
  const double norm = OptimizerStep(training, 0, {}, at::tensor({6.0F, 8.0F}), &state);
  EXPECT_NEAR(norm, 10.0, 1e-5);
  // The first step moves by the rate, whatever the gradient, after the decay.
  EXPECT_NEAR(state.parameters[0].item<double>(), 1.0 - 0.025 - 0.05, 1e-5);
  EXPECT_NEAR(state.parameters[1].item<double>(), -2.0 + 0.05 - 0.05, 1e-5);
  EXPECT_NEAR(state.first_moment[1].item<double>(), 0.4, 1e-6);
  EXPECT_NEAR(state.second_moment[0].item<double>(), 0.09, 1e-6);
}

// Every number that training keeps is a bfloat16, and small steps of large weights are lost.
TEST(Optimizer, CanKeepItsStateInBfloat16) {
  SCOPED_TRACE(testing::SeedMessage());
  TrainingConfig training;
  training.warmup = 0;
  training.learning_rate = 1e-3;
  training.precision = Precision::kBFloat16True;
  testing::Random random(22);
  at::Tensor gradient = at::zeros({64});
  for (int64_t i = 0; i < 64; ++i) gradient[i] = random.Gauss();
  TrainingState state{at::linspace(-1.0, 1.0, 64), at::zeros({64}), at::zeros({64})};
  state.Round();
  TrainingState wide{state.parameters.clone(), at::zeros({64}), at::zeros({64})};
  TrainingConfig plain = training;
  plain.precision = Precision::kFloat32;
  const at::Tensor start = state.parameters.clone();
  for (int64_t step = 0; step < 3; ++step) {
    OptimizerStep(training, step, {}, gradient, &state);
    OptimizerStep(plain, step, {}, gradient, &wide);
  }
  for (const at::Tensor& tensor : {state.parameters, state.first_moment, state.second_moment}) {
    EXPECT_TRUE(tensor.equal(tensor.to(at::kBFloat16).to(at::kFloat)));
  }
  // Half the distance between bfloat16 numbers is 1/512 from 1/2 to 1, twice the step.
  const at::Tensor large = start.abs() >= 0.5, small = start.abs() < 0.1;
  EXPECT_TRUE(state.parameters.masked_select(large).equal(start.masked_select(large)));
  EXPECT_FALSE(state.parameters.masked_select(small).equal(start.masked_select(small)));
  EXPECT_TRUE((wide.parameters != start).all().item<bool>());
  EXPECT_TRUE(state.parameters.allclose(wide.parameters, 4e-3, 5e-3));
}

TEST(Model, TheZeroTokenStaysZero) {
  ModelConfig config = SmallConfig(AttentionKind::kAsentmax, Positions::kNape);
  config.zero_token = 3;
  const Model model(config, 11, at::kCPU, at::kFloat);
  const at::Tensor embedding = model.Find(model.Initialise(1), "embedding");
  EXPECT_EQ(embedding[3].abs().sum().item<double>(), 0.0);
  EXPECT_GT(embedding[2].abs().sum().item<double>(), 0.0);
  at::Tensor gradient = at::ones({model.num_parameters()});
  model.ClearZeroToken(gradient);
  EXPECT_EQ(gradient.sum().item<double>(),
            static_cast<double>(model.num_parameters() - config.width));
  EXPECT_EQ(model.Find(gradient, "embedding")[3].sum().item<double>(), 0.0);
}

TEST(Muon, DirectionsAreNearlyOrthogonal) {
  SCOPED_TRACE(testing::SeedMessage());
  testing::Random random(22);
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{24, 24}, {16, 40}, {40, 16}}) {
    at::Tensor matrices = at::zeros({3, rows, columns}, at::kFloat);
    for (int64_t i = 0; i < matrices.numel(); ++i) {
      matrices.mutable_data_ptr<float>()[i] = static_cast<float>(1e-6 * random.Gauss());
    }
    const at::Tensor result = Orthogonalise(matrices);
    ASSERT_EQ(result.sizes(), matrices.sizes());
    const bool wide = columns > rows;
    const at::Tensor square =
        wide ? at::bmm(result, result.transpose(1, 2)) : at::bmm(result.transpose(1, 2), result);
    // Singular values within (0.3, 1.3): the trace is their squares' sum, and none exceeds 1.3.
    const double size = static_cast<double>(std::min(rows, columns));
    for (int64_t i = 0; i < 3; ++i) {
      const double trace = square[i].trace().item<double>() / size;
      EXPECT_TRUE(trace >= 0.4 && trace <= 1.5) << trace;
      // ‖A − I‖ of A = R Rᵀ: small next to ‖I‖, unlike that of the normalised input.
      const double distance =
          (square[i] - at::eye(square.size(1))).norm().item<double>() / std::sqrt(size);
      EXPECT_TRUE(distance <= 0.6) << distance;
    }
    // The direction is the input's: their inner product is positive, and scale does not matter.
    EXPECT_TRUE((result * matrices).sum().item<double>() > 0.0);
    EXPECT_LE((Orthogonalise(matrices * 1e4) - result).abs().max().item<double>(), 1e-3);
  }
  EXPECT_TRUE(Orthogonalise(at::zeros({1, 8, 8})).isfinite().all().item<bool>());
}

TEST(Muon, TakesTheMatricesAndLeavesTheRest) {
  SCOPED_TRACE(testing::SeedMessage());
  const Model model(SmallConfig(AttentionKind::kAsentmax, Positions::kNape), 11, at::kCPU,
                    at::kFloat);
  const std::vector<HiddenMatrix> matrices = model.HiddenMatrices();
  ASSERT_EQ(matrices.size(), 8u);  // Two layers of qkv, out, gate_up and down.
  int64_t covered = 0;
  for (const ParameterRange& range : CoveredRanges(matrices)) covered += range.size;
  EXPECT_EQ(covered, 2 * (16 * 48 + 16 * 16 + 16 * 32 + 16 * 16));
  int64_t others = 0;
  for (const ParameterRange& range : OtherRanges(matrices, model.num_parameters())) {
    others += range.size;
  }
  EXPECT_EQ(covered + others, model.num_parameters());

  TrainingConfig training;
  training.warmup = 0;
  training.learning_rate = 1e-3;
  training.muon_rate = 0.02;
  training.clip = 1e6;
  const at::Tensor start = model.Initialise(3);
  at::Tensor gradient = at::sin(at::arange(model.num_parameters(), at::kFloat) * 0.7F);
  const auto step = [&](Optimizer optimizer) {
    training.optimizer = optimizer;
    TrainingState state{start.clone(), at::zeros_like(start), at::zeros_like(start)};
    OptimizerStep(training, 0, matrices, gradient, &state);
    return state.parameters - start;
  };
  const at::Tensor adam = step(Optimizer::kAdamW), muon = step(Optimizer::kMuon);
  for (const char* name : {"embedding", "head", "layer1.mlp_norm", "layer0.scaler_bias_beta"}) {
    EXPECT_TRUE(model.Find(muon, name).equal(model.Find(adam, name))) << name;
  }
  // From zero momentum the direction is that of the gradient; columns/rows = 1 for query.
  const at::Tensor query = model.Find(gradient, "layer1.qkv").narrow(1, 16, 16);
  const at::Tensor expected = -0.02 * Orthogonalise(query.unsqueeze(0))[0];
  const at::Tensor got = model.Find(muon, "layer1.qkv").narrow(1, 16, 16);
  EXPECT_LE((got - expected).abs().max().item<double>(), 1e-4);
}

}  // namespace
}  // namespace flash_entmax::lab
