// Query scaling against its formulas and finite differences.

#include "flash_entmax/query_scaling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "testing/compare.h"
#include "testing/finite_difference.h"
#include "testing/random.h"
#include "testing/status.h"
#include "testing/stored_tensor.h"

namespace flash_entmax {
namespace {

using testing::BroadcastableShape;
using testing::Error;
using testing::GetBroadcast;
using testing::Index;
using testing::IsOk;
using testing::Random;
using testing::Rejects;
using testing::SeedMessage;
using testing::StoredTensor;

// A scaling of rows [batch, heads, query_length] with random parameters.
struct ScalingCase {
  ScalingCase(QueryScalingKind kind, DType dtype, Random* random) {
    shape = {random->Integer(1, 3), random->Integer(1, 3), random->Integer(1, 9)};
    beta = StoredTensor(dtype, BroadcastableShape(shape, -1, random), random);
    beta.SetValues(random->GaussVector(static_cast<size_t>(beta.size())));
    gamma = StoredTensor(dtype, BroadcastableShape(shape, -1, random), random);
    gamma.SetValues(random->GaussVector(static_cast<size_t>(gamma.size())));
    positions = StoredTensor(DType::kInt64, {shape[2]});
    for (int64_t i = 0; i < shape[2]; ++i) {
      positions.Set({i}, static_cast<double>(random->Integer(0, 100000)));
    }
    scaling.kind = kind;
    scaling.beta = beta.view();
    if (kind == QueryScalingKind::kAsEntmax) scaling.gamma = gamma.view();
    scaling.delta = random->Uniform(0.0, 2.0);
    scaling.first_position = random->Integer(0, 100);
    if (random->Chance(0.5)) scaling.positions = positions.view();
  }

  double Expected(const Index& index) const {
    const double position = scaling.positions
                                ? positions.Get({index[2]})
                                : static_cast<double>(scaling.first_position + index[2]);
    const double b = GetBroadcast(beta, index);
    if (scaling.kind == QueryScalingKind::kSsmax) return b * std::log(position + 2.0);
    return scaling.delta + b * std::pow(std::log(position + 2.0), GetBroadcast(gamma, index));
  }

  Index shape;
  StoredTensor beta, gamma, positions;
  QueryScaling scaling;
};

TEST(QueryScaling, Forward) {
  SCOPED_TRACE(SeedMessage());
  Random random(1);
  const std::vector<DType> dtypes = {DType::kFloat32, DType::kFloat64, DType::kBFloat16,
                                     DType::kFloat16};
  for (int run = 0; run < 200; ++run) {
    const auto kind = run % 2 == 0 ? QueryScalingKind::kAsEntmax : QueryScalingKind::kSsmax;
    const ScalingCase c(kind, dtypes[static_cast<size_t>(run / 2) % 4], &random);
    StoredTensor out(dtypes[static_cast<size_t>(run / 8) % 4], c.shape, &random);
    ASSERT_TRUE(IsOk(QueryScaleForward(c.scaling, out.mutable_view())));
    ASSERT_TRUE(out.GapsAreIntact());
    for (int64_t i = 0; i < out.size(); ++i) {
      const Index index = testing::Unravel(c.shape, i);
      const double want = c.Expected(index);
      const double bound = (testing::EpsilonOf(out.dtype()) + 1e-15) * std::fabs(want) +
                           1e-7 * (out.dtype() == DType::kFloat16);
      ASSERT_LE(Error(out.Get(index), want), bound) << run << ' ' << i;
    }
  }
}

TEST(QueryScaling, GradientsByFiniteDifferences) {
  SCOPED_TRACE(SeedMessage());
  Random random(2);
  for (int run = 0; run < 60; ++run) {
    const auto kind = run % 2 == 0 ? QueryScalingKind::kAsEntmax : QueryScalingKind::kSsmax;
    ScalingCase c(kind, DType::kFloat64, &random);
    StoredTensor grad(DType::kFloat64, c.shape, &random);
    grad.SetValues(random.GaussVector(static_cast<size_t>(grad.size())));
    StoredTensor out(DType::kFloat64, c.shape);
    const auto loss = [&](StoredTensor* parameter, const std::vector<double>& values) {
      const std::vector<double> before = parameter->Values();
      parameter->SetValues(values);
      EXPECT_TRUE(IsOk(QueryScaleForward(c.scaling, out.mutable_view())));
      parameter->SetValues(before);
      double sum = 0.0;
      for (int64_t i = 0; i < out.size(); ++i) {
        const Index index = testing::Unravel(c.shape, i);
        sum += out.Get(index) * grad.Get(index);
      }
      return sum;
    };
    StoredTensor grad_beta(DType::kFloat64, c.beta.shape(), &random);
    StoredTensor grad_gamma(DType::kFloat64, c.gamma.shape(), &random);
    QueryScalingGradients gradients;
    gradients.beta = grad_beta.mutable_view();
    if (kind == QueryScalingKind::kAsEntmax) gradients.gamma = grad_gamma.mutable_view();
    ASSERT_TRUE(IsOk(QueryScaleBackward(c.scaling, grad.view(), gradients)));
    ASSERT_TRUE(grad_beta.GapsAreIntact());
    const auto check = [&](StoredTensor* parameter, const StoredTensor& got) {
      const std::vector<double> want = testing::CentralGradient(
          [&](const std::vector<double>& x) { return loss(parameter, x); }, parameter->Values());
      const std::vector<double> values = got.Values();
      for (size_t i = 0; i < want.size(); ++i) {
        EXPECT_LE(std::fabs(values[i] - want[i]), 1e-5 * (1.0 + std::fabs(want[i]))) << run;
      }
    };
    check(&c.beta, grad_beta);
    if (kind == QueryScalingKind::kAsEntmax) check(&c.gamma, grad_gamma);
  }
}

TEST(QueryScaling, BadArguments) {
  Random random(3);
  ScalingCase c(QueryScalingKind::kAsEntmax, DType::kFloat32, &random);
  StoredTensor out(DType::kFloat32, c.shape);
  const QueryScaling good = c.scaling;
  const auto forward = [&](const QueryScaling& scaling) {
    return QueryScaleForward(scaling, out.mutable_view());
  };
  QueryScaling bad = good;
  bad.beta = {};
  EXPECT_TRUE(Rejects(forward(bad), "beta"));
  bad = good;
  bad.gamma = {};
  EXPECT_TRUE(Rejects(forward(bad), "gamma"));
  bad = good;
  bad.kind = QueryScalingKind::kSsmax;
  EXPECT_TRUE(Rejects(forward(bad), "gamma"));
  bad = good;
  bad.beta.dtype = DType::kInt32;
  EXPECT_TRUE(Rejects(forward(bad), "beta"));
  bad = good;
  bad.first_position = -1;
  EXPECT_TRUE(Rejects(forward(bad), "first_position"));
  bad = good;
  bad.delta = std::nan("");
  EXPECT_TRUE(Rejects(forward(bad), "delta"));
  bad = good;
  c.positions.Set({0}, -3.0);
  bad.positions = c.positions.view();
  EXPECT_TRUE(Rejects(forward(bad), "positions"));
  bad.positions.dtype = DType::kFloat64;
  EXPECT_TRUE(Rejects(forward(bad), "positions"));
  EXPECT_TRUE(Rejects(QueryScaleForward(good, {}), "query_scale"));
  bad = good;
  bad.positions = {};
  bad.beta = out.view();
  EXPECT_TRUE(Rejects(forward(bad), "query_scale"));
  StoredTensor wrong(DType::kFloat32, {7, 7, 7, 7});
  QueryScalingGradients gradients;
  gradients.beta = wrong.mutable_view();
  bad = good;
  bad.positions = {};
  EXPECT_TRUE(Rejects(QueryScaleBackward(bad, out.view(), gradients), "grad_beta"));
}

}  // namespace
}  // namespace flash_entmax
