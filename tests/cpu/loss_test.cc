// FenchelYoungLoss against the reference over a fixed matrix, special rows, and bad arguments.

#include "flash_entmax/loss.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "testing/loss_case.h"
#include "testing/status.h"

namespace flash_entmax {
namespace {

using testing::FloatingTypes;
using testing::IsOk;
using testing::LossCase;
using testing::LossDisagreement;
using testing::LossProblem;
using testing::Rejects;
using testing::TestAlphas;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

void ExpectAgreement(const LossCase& c) {
  LossProblem problem(c);
  const std::string disagreement = LossDisagreement(c, &problem);
  EXPECT_TRUE(disagreement.empty()) << c << '\n' << disagreement;
}

TEST(Loss, AgreesWithTheReference) {
  for (MappingKind kind : {MappingKind::kEntmax, MappingKind::kNormmax}) {
    for (double alpha : TestAlphas()) {
      if (kind == MappingKind::kNormmax && alpha < 1.0001) continue;
      for (DType dtype : FloatingTypes()) {
        for (Reduction reduction : {Reduction::kNone, Reduction::kSum, Reduction::kMean}) {
          for (double spread : {0.1, 1.0, 10.0}) {
            LossCase c;
            c.kind = kind;
            c.alpha = alpha;
            c.dtype = dtype;
            c.reduction = reduction;
            c.spread = spread;
            c.stream = 500;
            c.classes = 33;
            c.loss_dtype = spread < 1.0 ? DType::kFloat32 : DType::kFloat64;
            c.strided = spread > 1.0;
            ExpectAgreement(c);
          }
        }
      }
    }
  }
}

TEST(Loss, SizesFromNothingToLong) {
  for (int64_t rows : {0, 1, 70}) {
    for (int64_t classes : {1, 2, 3, 8, 17, 1000}) {
      for (double ignored : {0.0, 0.5, 1.0}) {
        for (Reduction reduction : {Reduction::kNone, Reduction::kSum, Reduction::kMean}) {
          LossCase c;
          c.rows = rows;
          c.classes = classes;
          c.ignored = ignored;
          c.reduction = reduction;
          c.dtype = DType::kFloat32;
          c.with_grad = ignored > 0.0;
          ExpectAgreement(c);
        }
      }
    }
  }
}

TEST(Loss, SpecialRows) {
  for (double alpha : {0.8, 1.0, 1.5, 2.0, 2.5}) {
    LossCase c;
    c.alpha = alpha;
    c.rows = 6;
    c.classes = 20;
    c.ignored = 0.0;
    c.reduction = Reduction::kNone;
    LossProblem problem(c);
    problem.options.ignore_index = -100;
    for (int64_t row = 0; row < c.rows; ++row) problem.target.Set({row}, 3.0);
    problem.scores.Set({1, 7}, kNaN);
    problem.scores.Set({2, 0}, kInfinity);
    for (int64_t k = 0; k < c.classes; ++k) problem.scores.Set({3, k}, -kInfinity);
    problem.scores.Set({4, 3}, -kInfinity);
    problem.scores.Set({5, 9}, kNaN);
    problem.target.Set({5}, -100.0);  // Ignored, so its NaN is not seen.
    const std::string disagreement = LossDisagreement(c, &problem);
    EXPECT_TRUE(disagreement.empty()) << c << '\n' << disagreement;
    EXPECT_TRUE(std::isfinite(problem.loss.Get({0})));
    for (int64_t row : {1, 2, 3}) EXPECT_TRUE(std::isnan(problem.loss.Get({row}))) << row;
    EXPECT_EQ(problem.loss.Get({4}), kInfinity);
    EXPECT_EQ(problem.loss.Get({5}), 0.0);
  }
}

TEST(Loss, IsZeroWhereTheTargetHasAllWeight) {
  for (double alpha : {1.25, 1.5, 2.0, 4.0}) {
    LossCase c;
    c.alpha = alpha;
    c.rows = 1;
    c.ignored = 0.0;
    c.reduction = Reduction::kSum;
    LossProblem problem(c);
    for (int64_t k = 0; k < c.classes; ++k) problem.scores.Set({0, k}, k == 2 ? 10.0 : -1.0);
    problem.target.Set({0}, 2.0);
    ASSERT_TRUE(IsOk(problem.Run()));
    EXPECT_EQ(problem.loss.Values()[0], 0.0);
    for (double g : problem.grad.Values()) EXPECT_EQ(g, 0.0);
  }
}

TEST(Loss, ThreadsChangeNoBit) {
  for (Reduction reduction : {Reduction::kNone, Reduction::kSum, Reduction::kMean}) {
    for (double alpha : {1.0, 1.5, 1.75}) {
      LossCase c;
      c.alpha = alpha;
      c.rows = 500;
      c.classes = 130;
      c.dtype = DType::kFloat32;
      c.reduction = reduction;
      std::vector<uint8_t> first_loss;
      std::vector<uint8_t> first_grad;
      for (int threads : {1, 2, 3}) {
        LossProblem problem(c);
        problem.options.num_threads = threads;
        ASSERT_TRUE(IsOk(problem.Run()));
        if (threads == 1) {
          first_loss = problem.loss.bytes();
          first_grad = problem.grad.bytes();
        }
        EXPECT_EQ(problem.loss.bytes(), first_loss) << c << " threads " << threads;
        EXPECT_EQ(problem.grad.bytes(), first_grad) << c << " threads " << threads;
      }
    }
  }
}

// A valid call; tests spoil one argument.
struct Call {
  std::vector<double> scores_data = std::vector<double>(6, 1.0);
  std::vector<int64_t> target_data = {0, 2};
  std::vector<double> loss_data = {0.0, 0.0};
  std::vector<double> grad_data = std::vector<double>(6, 0.0);
  TensorView scores = TensorView::Contiguous(scores_data.data(), DType::kFloat64, {2, 3});
  TensorView target = TensorView::Contiguous(target_data.data(), DType::kInt64, {2});
  MutableTensorView loss = MutableTensorView::Contiguous(loss_data.data(), DType::kFloat64, {1});
  MutableTensorView grad = MutableTensorView::Contiguous(grad_data.data(), DType::kFloat64, {2, 3});
  LossOptions options;

  Call() = default;
  Call(const Call&) = delete;  // The views point into the object.
  Call& operator=(const Call&) = delete;

  Status Run() const { return FenchelYoungLoss(scores, target, options, loss, grad); }
};

template <typename Spoil>
void ExpectRejects(const std::string& argument, const Spoil& spoil) {
  Call call;
  spoil(call);
  EXPECT_TRUE(Rejects(call.Run(), argument));
}

TEST(LossArguments, TheUnspoiltCallIsValid) { EXPECT_TRUE(IsOk(Call().Run())); }

TEST(LossArguments, Options) {
  for (double alpha : {0.0, -1.0, kInfinity, kNaN}) {
    ExpectRejects("alpha", [&](Call& call) { call.options.alpha = alpha; });
  }
  ExpectRejects("alpha", [](Call& call) {
    call.options.kind = MappingKind::kNormmax;
    call.options.alpha = 1.0;
  });
  ExpectRejects("kind", [](Call& call) { call.options.kind = MappingKind::kBudget; });
  ExpectRejects("num_threads", [](Call& call) { call.options.num_threads = -2; });
}

TEST(LossArguments, Tensors) {
  ExpectRejects("scores", [](Call& call) { call.scores = {}; });
  ExpectRejects("scores", [](Call& call) { call.scores.dtype = DType::kInt64; });
  ExpectRejects("scores", [](Call& call) { call.scores.rank = 1; });
  ExpectRejects("scores", [](Call& call) { call.scores.shape[1] = 0; });
  ExpectRejects("target", [](Call& call) { call.target = {}; });
  ExpectRejects("target", [](Call& call) { call.target.dtype = DType::kInt32; });
  ExpectRejects("target", [](Call& call) { call.target.shape[0] = 1; });
  ExpectRejects("target", [](Call& call) { call.target_data[1] = 3; });
  ExpectRejects("target", [](Call& call) { call.target_data[1] = -1; });
  ExpectRejects("loss", [](Call& call) { call.loss = {}; });
  ExpectRejects("loss", [](Call& call) { call.loss.dtype = DType::kFloat16; });
  ExpectRejects("loss", [](Call& call) { call.loss.shape[0] = 2; });
  ExpectRejects("loss", [](Call& call) { call.options.reduction = Reduction::kNone; });
  ExpectRejects("grad", [](Call& call) { call.grad.dtype = DType::kFloat32; });
  ExpectRejects("grad", [](Call& call) { call.grad.shape[0] = 1; });
  ExpectRejects("grad", [](Call& call) { call.grad.strides[0] = 0; });
}

}  // namespace
}  // namespace flash_entmax
