// The lab on a GPU against the lab on a CPU: layers, models, training. Skipped, and counted, where
// there is no GPU.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "checkpoint_values.h"
#include "flash_entmax/gpu.h"
#include "io/temporary_folder.h"
#include "layers.h"
#include "model.h"
#include "steps.h"
#include "testing/random.h"
#include "testing/status.h"
#include "trainer.h"

namespace flash_entmax::lab {
namespace {

#define SKIP_WITHOUT_GPU() \
  if (!gpu::DescribeDevice().ok()) GTEST_SKIP() << "no GPU"

// For the CPU's side. Its work is small; as many threads as cores, on a machine that others use
// too, would spend minutes waiting for each other.
constexpr int kThreads = 2;

using Tensors = std::vector<at::Tensor>;

// Rounded to bfloat16, so that both sides compute from the same numbers.
at::Tensor Gauss(testing::Random& random, std::vector<int64_t> shape, double deviation = 1.0) {
  at::Tensor values = at::zeros(shape, at::kFloat);
  float* at = values.mutable_data_ptr<float>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    at[i] = static_cast<float>(deviation * random.Gauss());
  }
  return values.to(at::kBFloat16).to(at::kFloat);
}

// ‖got − want‖ / ‖want‖; NaN if either is not finite.
double RelativeError(const at::Tensor& got, const at::Tensor& want) {
  const at::Tensor wide = want.detach().cpu().to(at::kDouble);
  const at::Tensor difference = got.detach().cpu().to(at::kDouble) - wide;
  return (difference.norm() / wide.norm().clamp_min(1e-12)).item<double>();
}

// Runs `layer` on the CPU in float32 and on the GPU with the types that training uses, and compares
// outputs and the gradients of all inputs of floating type under random output gradients.
void CompareLayer(testing::Random& random, const Tensors& inputs, const std::vector<bool>& narrow,
                  const std::function<Tensors(const Tensors&)>& layer) {
  Tensors results[2], gradients[2];
  Tensors weights;
  for (const bool cuda : {false, true}) {
    Tensors leaves, wanted;
    for (size_t i = 0; i < inputs.size(); ++i) {
      at::Tensor leaf = inputs[i].clone();
      if (cuda) leaf = leaf.to(at::kCUDA);
      if (cuda && narrow[i]) leaf = leaf.to(at::kBFloat16);
      if (leaf.is_floating_point()) {
        leaf.set_requires_grad(true);
        wanted.push_back(leaf);
      }
      leaves.push_back(leaf);
    }
    results[cuda] = layer(leaves);
    at::Tensor sum;
    for (size_t i = 0; i < results[cuda].size(); ++i) {
      const at::Tensor& result = results[cuda][i];
      if (!cuda) weights.push_back(Gauss(random, result.sizes().vec()));
      const at::Tensor part = (result.to(at::kFloat) * weights[i].to(result.device())).sum();
      sum = sum.defined() ? sum + part : part;
    }
    gradients[cuda] = torch::autograd::grad({sum}, wanted);
  }
  for (size_t i = 0; i < results[0].size(); ++i) {
    EXPECT_LE(RelativeError(results[1][i], results[0][i]), 6e-3) << "result " << i;
  }
  for (size_t i = 0; i < gradients[0].size(); ++i) {
    EXPECT_LE(RelativeError(gradients[1][i], gradients[0][i]), 1.2e-2) << "gradient " << i;
  }
}

at::ScalarType ComputeType(const at::Tensor& like) { return like.scalar_type(); }

TEST(Cuda, LayersAgreeWithTheCpu) {
  SKIP_WITHOUT_GPU();
  at::set_num_threads(kThreads);
  SCOPED_TRACE(testing::SeedMessage());
  testing::Random random(30);
  for (const int64_t width : {128, 256, 512}) {
    for (const int64_t rows : {1, 37, 300}) {
      SCOPED_TRACE(::testing::Message() << "width " << width << " rows " << rows);
      at::Tensor tokens = at::zeros({rows}, at::kLong);
      for (int64_t i = 0; i < rows; ++i) tokens[i] = random.Integer(0, 15);
      CompareLayer(random, {Gauss(random, {16, width}), Gauss(random, {width}, 0.2)}, {true, true},
                   [&](const Tensors& x) -> Tensors {
                     const auto [stream, normed] =
                         EmbedAndNorm(tokens.to(x[0].device()), x[0], x[1], ComputeType(x[0]));
                     return {stream, normed};
                   });
      CompareLayer(random,
                   {Gauss(random, {rows, width}), Gauss(random, {rows, width}),
                    Gauss(random, {width}, 0.2), Gauss(random, {width}, 0.2)},
                   {false, true, true, true}, [](const Tensors& x) -> Tensors {
                     const auto [stream, normed] =
                         AddAndNorm(x[0], x[1], x[2], x[3], ComputeType(x[1]));
                     return {stream, normed};
                   });
      CompareLayer(random, {Gauss(random, {rows, 2 * width})}, {true},
                   [](const Tensors& x) -> Tensors { return {GatedUnit(x[0])}; });
    }
  }
  for (const int64_t plain : {0, 3}) {
    CompareLayer(random, {Gauss(random, {2, 50, 10}), Gauss(random, {10})}, {true, true},
                 [&](const Tensors& x) -> Tensors { return {AdaptiveScale(x[0], x[1], plain)}; });
  }
}

TEST(Cuda, ModelsAgreeWithTheCpu) {
  SKIP_WITHOUT_GPU();
  at::set_num_threads(kThreads);
  SCOPED_TRACE(testing::SeedMessage());
  testing::Random random(31);
  for (const AttentionKind kind :
       {AttentionKind::kSoftmax, AttentionKind::kSsmax, AttentionKind::kEntmax,
        AttentionKind::kEntmaxLearnable, AttentionKind::kAsentmax, AttentionKind::kLinear,
        AttentionKind::kSelectiveLinear}) {
    for (const Positions positions : {Positions::kRope, Positions::kNape}) {
      ModelConfig config;
      config.layers = 2;
      config.width = 128;
      config.mlp = 128;
      config.heads = 4;
      config.init = 0.08;
      config.attention = kind;
      config.positions = positions;
      at::Tensor tokens = at::zeros({6, 45}, at::kLong);
      for (int64_t b = 0; b < 6; ++b) {
        for (int64_t i = 0; i < 45; ++i) tokens[b][i] = random.Integer(0, 10);
      }
      const at::Tensor index = at::arange(0, 6 * 45, 7, at::kLong);
      const at::Tensor labels = tokens.view({-1}).index_select(0, index);
      const auto run = [&](at::Device device, at::ScalarType type) {
        const Model model(config, 11, device, type);
        const at::Tensor leaf = model.Initialise(7).to(at::kBFloat16).to(type).to(device);
        leaf.set_requires_grad(true);
        const at::Tensor loss =
            Loss(model, leaf, tokens.to(device), index.to(device), labels.to(device));
        return std::pair(loss.item<double>(), torch::autograd::grad({loss}, {leaf})[0]);
      };
      const auto [loss, gradient] = run(at::kCPU, at::kFloat);
      for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
        SCOPED_TRACE(::testing::Message()
                     << NameOf(kind) << ", " << NameOf(positions) << ", " << toString(type));
        const auto [other_loss, other_gradient] = run(at::kCUDA, type);
        const bool narrow = type == at::kBFloat16;
        EXPECT_NEAR(other_loss, loss, narrow ? 2e-2 : 1e-4);
        EXPECT_LE(RelativeError(other_gradient, gradient), narrow ? 8e-2 : 2e-3);
      }
    }
  }
}

class CudaTrainingTest : public ::testing::Test {
 protected:
  void SetUp() override { SKIP_WITHOUT_GPU(); }

  static RunConfig SmallRun(AttentionKind kind, Precision precision) {
    RunConfig run;
    run.recipe = "test";
    run.variant = NameOf(kind);
    run.task.name = "copy";
    run.task.symbols = 8;
    run.model.width = 128;
    run.model.mlp = 128;
    run.model.attention = kind;
    run.training.steps = 150;  // more than two chunks of steps
    run.training.precision = precision;
    run.training.evaluate_every = 50;
    run.evaluation.samples = 32;
    return run;
  }

  // All losses of a run in `folder`.
  std::vector<double> Losses(const RunConfig& run, const char* device, const std::string& folder,
                             const std::function<bool(int64_t)>& stop = nullptr) const {
    std::vector<double> losses;
    TrainingOptions options;
    options.folder = folder_.File(folder);
    options.device = device;
    options.threads = kThreads;
    options.on_step = [&](int64_t /*step*/, double loss) { losses.push_back(loss); };
    if (stop) options.stop = [&] { return stop(std::ssize(losses)); };
    EXPECT_TRUE(testing::IsOk(Train(run, options).status()));
    return losses;
  }

  TemporaryFolder folder_;
};

TEST_F(CudaTrainingTest, LossesFollowTheCpu) {
  for (const AttentionKind kind : {AttentionKind::kSoftmax, AttentionKind::kAsentmax}) {
    const RunConfig run = SmallRun(kind, Precision::kFloat32);
    const std::string name = NameOf(kind);
    const std::vector<double> cpu = Losses(run, "cpu", name + "-cpu");
    const std::vector<double> cuda = Losses(run, "cuda", name + "-cuda");
    ASSERT_EQ(cpu.size(), 150u);
    ASSERT_EQ(cuda.size(), 150u);
    for (size_t i = 0; i < 20; ++i) EXPECT_NEAR(cuda[i], cpu[i], 2e-3) << name << " step " << i;
    // Rounding grows with the steps; what is learnt does not depend on it.
    EXPECT_NEAR(cuda.back(), cpu.back(), 0.15 * cpu.front()) << name;
  }
}

// The state is rounded by the kernel as the CPU rounds it.
TEST_F(CudaTrainingTest, KeepsItsStateInBfloat16) {
  RunConfig run = SmallRun(AttentionKind::kAsentmax, Precision::kBFloat16True);
  run.model.zero_token = 0;
  const std::vector<double> cpu = Losses(run, "cpu", "rounded-cpu");
  const std::vector<double> cuda = Losses(run, "cuda", "rounded-cuda");
  ASSERT_EQ(cuda.size(), cpu.size());
  for (size_t i = 0; i < 20; ++i) EXPECT_NEAR(cuda[i], cpu[i], 2e-2) << "step " << i;
  EXPECT_NEAR(cuda.back(), cpu.back(), 0.15 * cpu.front());
  EXPECT_TRUE(KeepsBfloat16(folder_.File("rounded-cuda")));
}

TEST_F(CudaTrainingTest, GoesOnWhereItStopped) {
  const RunConfig run = SmallRun(AttentionKind::kEntmax, Precision::kBFloat16);
  const std::vector<double> whole = Losses(run, "cuda", "whole");
  std::vector<double> parts =
      Losses(run, "cuda", "parts", [](int64_t steps) { return steps >= 64; });
  EXPECT_LT(parts.size(), whole.size());
  const std::vector<double> rest = Losses(run, "cuda", "parts");
  parts.insert(parts.end(), rest.begin(), rest.end());
  ASSERT_EQ(parts.size(), whole.size());
  for (size_t i = 0; i < whole.size(); ++i) EXPECT_NEAR(parts[i], whole[i], 2e-2) << i;
}

TEST_F(CudaTrainingTest, RunsInCompanyDoNotDisturbEachOther) {
  const std::vector<AttentionKind> kinds = {AttentionKind::kSoftmax, AttentionKind::kEntmax,
                                            AttentionKind::kAsentmax, AttentionKind::kEntmax};
  std::vector<std::vector<double>> alone, company(kinds.size());
  for (size_t i = 0; i < kinds.size(); ++i) {
    alone.push_back(
        Losses(SmallRun(kinds[i], Precision::kBFloat16), "cuda", "alone" + std::to_string(i)));
  }
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kinds.size(); ++i) {
    threads.emplace_back([&, i] {
      company[i] =
          Losses(SmallRun(kinds[i], Precision::kBFloat16), "cuda", "company" + std::to_string(i));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < kinds.size(); ++i) {
    ASSERT_EQ(company[i].size(), alone[i].size());
    for (size_t step = 0; step < alone[i].size(); ++step) {
      EXPECT_NEAR(company[i][step], alone[i][step], 2e-2) << i << " step " << step;
    }
  }
}

}  // namespace
}  // namespace flash_entmax::lab
