// Every bad argument of the mappings is refused by name.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "flash_entmax/mapping.h"
#include "testing/status.h"

namespace flash_entmax {
namespace {

using testing::IsOk;
using testing::Rejects;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// A valid call with every argument given; tests spoil one of them.
struct Call {
  std::vector<double> scores_data = std::vector<double>(6, 1.0);
  std::vector<double> probabilities_data = std::vector<double>(6, 0.5);
  std::vector<double> grad_data = std::vector<double>(6, 0.5);
  std::vector<double> grad_scores_data = std::vector<double>(6, 0.5);
  std::vector<double> alpha_data = {1.5, 2.0};
  std::vector<double> threshold_data = {0.0, 0.0};
  std::vector<double> grad_alpha_data = {0.0, 0.0};
  std::vector<int64_t> support_size_data = {0, 0};
  std::vector<uint8_t> mask_data = std::vector<uint8_t>(6, 1);

  TensorView scores = TensorView::Contiguous(scores_data.data(), DType::kFloat64, {2, 3});
  MutableTensorView probabilities =
      MutableTensorView::Contiguous(probabilities_data.data(), DType::kFloat64, {2, 3});
  MappingExtras extras = {
      MutableTensorView::Contiguous(threshold_data.data(), DType::kFloat64, {2, 1}),
      MutableTensorView::Contiguous(support_size_data.data(), DType::kInt64, {2, 1})};
  TensorView grad_probabilities = TensorView::Contiguous(grad_data.data(), DType::kFloat64, {2, 3});
  MutableTensorView grad_scores =
      MutableTensorView::Contiguous(grad_scores_data.data(), DType::kFloat64, {2, 3});
  MutableTensorView grad_alpha =
      MutableTensorView::Contiguous(grad_alpha_data.data(), DType::kFloat64, {2, 1});
  MappingOptions options;

  Call() = default;
  Call(const Call&) = delete;  // The views point into the object.
  Call& operator=(const Call&) = delete;

  Status Forward() const { return MappingForward(scores, options, probabilities, extras); }
  Status Backward() const {
    return MappingBackward(probabilities.view(), grad_probabilities, options, grad_scores,
                           grad_alpha);
  }
};

// Spoils a valid call and expects both passes, or one of them, to name the argument.
template <typename Spoil>
void ExpectForwardRejects(const std::string& argument, const Spoil& spoil) {
  Call call;
  spoil(call);
  EXPECT_TRUE(Rejects(call.Forward(), argument));
}
template <typename Spoil>
void ExpectBackwardRejects(const std::string& argument, const Spoil& spoil) {
  Call call;
  spoil(call);
  EXPECT_TRUE(Rejects(call.Backward(), argument));
}
template <typename Spoil>
void ExpectBothReject(const std::string& argument, const Spoil& spoil) {
  ExpectForwardRejects(argument, spoil);
  ExpectBackwardRejects(argument, spoil);
}

TEST(MappingArguments, TheUnspoiltCallIsValid) {
  const Call call;
  EXPECT_TRUE(IsOk(call.Forward()));
  EXPECT_TRUE(IsOk(call.Backward()));
}

TEST(MappingArguments, Alpha) {
  for (double alpha : {0.0, -1.0, kInfinity, kNaN}) {
    ExpectBothReject("alpha", [&](Call& call) { call.options.alpha = alpha; });
  }
  for (double alpha : {1.0, 0.5, kInfinity, kNaN}) {
    ExpectForwardRejects("alpha", [&](Call& call) {
      call.options.kind = MappingKind::kNormmax;
      call.options.alpha = alpha;
    });
  }
}

TEST(MappingArguments, AlphaPerRow) {
  const auto give = [](Call& call) {
    call.options.alpha_per_row =
        TensorView::Contiguous(call.alpha_data.data(), DType::kFloat64, {2, 1});
  };
  {
    Call call;
    give(call);
    EXPECT_TRUE(IsOk(call.Forward()));
  }
  ExpectBothReject("alpha_per_row", [&](Call& call) {
    give(call);
    call.alpha_data[1] = 0.0;
  });
  ExpectBothReject("alpha_per_row", [&](Call& call) {
    give(call);
    call.alpha_data[1] = kNaN;
  });
  ExpectBothReject("alpha_per_row", [&](Call& call) {
    give(call);
    call.options.alpha_per_row.dtype = DType::kInt64;
  });
  ExpectBothReject("alpha_per_row", [&](Call& call) {
    give(call);
    call.options.alpha_per_row.shape[1] = 3;
  });
  ExpectBothReject("alpha_per_row", [&](Call& call) {
    give(call);
    call.options.alpha_per_row.shape[0] = 5;
  });
  ExpectForwardRejects("alpha_per_row", [&](Call& call) {
    give(call);
    call.options.kind = MappingKind::kNormmax;
    call.alpha_data[0] = 1.0;
  });
}

TEST(MappingArguments, Budget) {
  for (double budget : {0.0, -1.0, 3.5, kInfinity, kNaN}) {
    ExpectForwardRejects("budget", [&](Call& call) {
      call.options.kind = MappingKind::kBudget;
      call.options.budget = budget;
    });
  }
}

TEST(MappingArguments, DimAndThreads) {
  for (int dim : {2, -3, 100, std::numeric_limits<int>::min()}) {
    ExpectBothReject("dim", [&](Call& call) { call.options.dim = dim; });
  }
  ExpectBothReject("num_threads", [](Call& call) { call.options.num_threads = -1; });
}

TEST(MappingArguments, Scores) {
  ExpectForwardRejects("scores", [](Call& call) { call.scores.dtype = DType::kInt32; });
  ExpectForwardRejects("scores", [](Call& call) { call.scores = {}; });
  ExpectForwardRejects("scores", [](Call& call) { call.scores.data = nullptr; });
  ExpectForwardRejects("scores", [](Call& call) { call.scores.rank = 0; });
  ExpectForwardRejects("scores", [](Call& call) { call.scores.rank = kMaxRank + 1; });
  ExpectForwardRejects("scores", [](Call& call) { call.scores.rank = -1; });
  ExpectForwardRejects("scores", [](Call& call) { call.scores.shape[0] = -2; });
  ExpectForwardRejects("scores", [](Call& call) {
    call.scores.shape = {int64_t{1} << 40, int64_t{1} << 40};
  });
  ExpectForwardRejects("scores", [](Call& call) {
    call.scores.data = reinterpret_cast<const char*>(call.scores_data.data()) + 1;
  });
}

TEST(MappingArguments, Probabilities) {
  ExpectForwardRejects("probabilities", [](Call& call) { call.probabilities = {}; });
  ExpectForwardRejects("probabilities", [](Call& call) { call.probabilities.data = nullptr; });
  ExpectForwardRejects("probabilities",
                       [](Call& call) { call.probabilities.dtype = DType::kFloat32; });
  ExpectForwardRejects("probabilities", [](Call& call) { call.probabilities.rank = 1; });
  ExpectForwardRejects("probabilities", [](Call& call) { call.probabilities.shape[1] = 2; });
  // Two elements in one place.
  ExpectForwardRejects("probabilities", [](Call& call) { call.probabilities.strides[0] = 0; });
  // Shares memory with the scores, without being the same view.
  ExpectForwardRejects("probabilities", [](Call& call) {
    call.probabilities.data = call.scores_data.data();
    call.probabilities.strides = {1, 2};
  });
  ExpectBackwardRejects("probabilities",
                        [](Call& call) { call.probabilities.dtype = DType::kUInt8; });
  ExpectBackwardRejects("probabilities", [](Call& call) { call.probabilities = {}; });
}

TEST(MappingArguments, Mask) {
  const auto give = [](Call& call) {
    call.options.mask = TensorView::Contiguous(call.mask_data.data(), DType::kUInt8, {2, 3});
  };
  ExpectForwardRejects("mask", [&](Call& call) {
    give(call);
    call.options.mask.dtype = DType::kFloat32;
  });
  ExpectForwardRejects("mask", [&](Call& call) {
    give(call);
    call.options.mask.shape[1] = 2;
  });
  ExpectForwardRejects("mask", [&](Call& call) {
    give(call);
    call.options.mask.rank = 3;
    call.options.mask.shape = {2, 1, 3};
  });
}

TEST(MappingArguments, Extras) {
  ExpectForwardRejects("threshold",
                       [](Call& call) { call.extras.threshold.dtype = DType::kFloat16; });
  ExpectForwardRejects("threshold", [](Call& call) { call.extras.threshold.shape[1] = 3; });
  ExpectForwardRejects("threshold", [](Call& call) { call.extras.threshold.rank = 1; });
  ExpectForwardRejects("threshold", [](Call& call) { call.extras.threshold.strides[0] = 0; });
  ExpectForwardRejects("support_size",
                       [](Call& call) { call.extras.support_size.dtype = DType::kFloat64; });
  ExpectForwardRejects("support_size", [](Call& call) { call.extras.support_size.shape[0] = 1; });
}

TEST(MappingArguments, Gradients) {
  ExpectBackwardRejects("grad_probabilities", [](Call& call) { call.grad_probabilities = {}; });
  ExpectBackwardRejects("grad_probabilities",
                        [](Call& call) { call.grad_probabilities.dtype = DType::kFloat32; });
  ExpectBackwardRejects("grad_probabilities",
                        [](Call& call) { call.grad_probabilities.shape[0] = 1; });
  ExpectBackwardRejects("grad_scores", [](Call& call) { call.grad_scores = {}; });
  ExpectBackwardRejects("grad_scores", [](Call& call) { call.grad_scores.dtype = DType::kInt64; });
  ExpectBackwardRejects("grad_scores", [](Call& call) { call.grad_scores.shape[1] = 4; });
  ExpectBackwardRejects("grad_scores", [](Call& call) { call.grad_scores.strides[1] = 0; });
  ExpectBackwardRejects("grad_alpha", [](Call& call) { call.grad_alpha.dtype = DType::kBFloat16; });
  ExpectBackwardRejects("grad_alpha", [](Call& call) { call.grad_alpha.shape[1] = 3; });
  // Only entmax has a gradient in α here.
  for (MappingKind kind : {MappingKind::kNormmax, MappingKind::kBudget}) {
    Call call;
    call.options.kind = kind;
    const Status status = call.Backward();
    EXPECT_FALSE(status.ok());
    EXPECT_EQ(status.message().rfind("grad_alpha", 0), 0u) << status.message();
  }
}

TEST(MappingArguments, Support) {
  std::vector<double> data(6, 0.5);
  TensorView view = TensorView::Contiguous(data.data(), DType::kFloat64, {2, 3});
  EXPECT_TRUE(Rejects(MappingSupport(view, 2).status(), "dim"));
  EXPECT_TRUE(Rejects(MappingSupport(TensorView{}).status(), "probabilities"));
  view.dtype = DType::kInt64;
  EXPECT_TRUE(Rejects(MappingSupport(view).status(), "probabilities"));
}

}  // namespace
}  // namespace flash_entmax
