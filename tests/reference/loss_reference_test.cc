// The reference losses against closed forms, differences, and at the edges.

#include "reference/loss_reference.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "reference/mapping_reference.h"
#include "testing/compare.h"
#include "testing/finite_difference.h"
#include "testing/random.h"

namespace flash_entmax {
namespace {

using reference::FenchelYoungLoss;
using reference::LossRow;
using reference::MapRow;
using testing::CentralGradient;
using testing::Error;
using testing::MaxError;
using testing::Random;
using testing::SeedMessage;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr MappingKind kEntmax = MappingKind::kEntmax;
constexpr MappingKind kNormmax = MappingKind::kNormmax;

TEST(FenchelYoungLoss, IsCrossEntropyAtOne) {
  SCOPED_TRACE(SeedMessage());
  Random random(40);
  for (int i = 0; i < 100; ++i) {
    const std::vector<double> s = random.GaussVector(9, 3.0);
    double sum = 0.0;
    for (double x : s) sum += std::exp(x);
    const int64_t y = random.Integer(0, 8);
    EXPECT_LE(Error(FenchelYoungLoss(s, y, kEntmax, 1.0).loss, std::log(sum) - s[y]), 1e-13);
  }
}

TEST(FenchelYoungLoss, IsTheSparsemaxLossAtTwo) {
  // −s_y + ½ Σ_{support}(s_i² − τ²) + ½ (Martins & Astudillo 2016, equation 23).
  SCOPED_TRACE(SeedMessage());
  Random random(41);
  for (int i = 0; i < 100; ++i) {
    const std::vector<double> s = random.GaussVector(9);
    const reference::MappedRow row = MapRow(s, kEntmax, 2.0);
    const int64_t y = random.Integer(0, 8);
    double want = 0.5 - s[y];
    for (size_t j = 0; j < s.size(); ++j) {
      if (row.probability[j] > 0.0) want += 0.5 * (s[j] * s[j] - row.threshold * row.threshold);
    }
    EXPECT_LE(Error(FenchelYoungLoss(s, y, kEntmax, 2.0).loss, std::max(want, 0.0)), 1e-13);
  }
}

TEST(FenchelYoungLoss, TwoClassesByHand) {
  // α = 2, s = (0, 0.5): p = (¼, ¾), H = ½(1 − 10/16), L = (p − e_y)·s + H.
  EXPECT_LE(Error(FenchelYoungLoss({0.0, 0.5}, 1, kEntmax, 2.0).loss, -0.125 + 0.1875), 1e-15);
  EXPECT_LE(Error(FenchelYoungLoss({0.0, 0.5}, 0, kEntmax, 2.0).loss, 0.375 + 0.1875), 1e-15);
  // Equal scores: H of the uniform distribution; for normmax 1 − ‖(½, ½)‖₂.
  EXPECT_LE(Error(FenchelYoungLoss({3.0, 3.0}, 0, kNormmax, 2.0).loss, 1.0 - std::sqrt(0.5)),
            1e-15);
}

TEST(FenchelYoungLoss, GradientMatchesDifferences) {
  SCOPED_TRACE(SeedMessage());
  Random random(42);
  for (MappingKind kind : {kEntmax, kNormmax}) {
    for (double alpha : {0.3, 0.8, 1.0, 1.0 + 1e-9, 1.0001, 1.1, 1.5, 2.0, 2.5, 4.0}) {
      if (kind == kNormmax && alpha < 1.1) continue;
      for (int i = 0; i < 20; ++i) {
        const std::vector<double> s = random.GaussVector(random.Integer(1, 10));
        const int64_t y = random.Integer(0, static_cast<int64_t>(s.size()) - 1);
        const auto loss = [&](const std::vector<double>& scores) {
          return FenchelYoungLoss(scores, y, kind, alpha).loss;
        };
        const LossRow row = FenchelYoungLoss(s, y, kind, alpha);
        // The loss has a continuous gradient everywhere, but for large α a steep one.
        EXPECT_LE(MaxError(row.grad, CentralGradient(loss, s, 1e-6)), alpha < 2.5 ? 1e-5 : 2e-2)
            << alpha;
        std::vector<double> want = MapRow(s, kind, alpha).probability;
        want[y] -= 1.0;
        EXPECT_EQ(row.grad, want);
      }
    }
  }
}

TEST(FenchelYoungLoss, IsZeroExactlyWhereTheTargetHasAllWeight) {
  SCOPED_TRACE(SeedMessage());
  Random random(43);
  for (MappingKind kind : {kEntmax, kNormmax}) {
    for (double alpha : {1.25, 1.5, 2.0, 4.0}) {
      // The margin is 1/(α−1) for entmax and 1 for normmax.
      const double margin = kind == kEntmax ? 1.0 / (alpha - 1.0) : 1.0;
      for (double excess : {-0.1, 0.0, 0.1}) {
        std::vector<double> s = {0.0, -0.5, -1.0, 0.0};
        s[2] = margin + excess;
        const LossRow row = FenchelYoungLoss(s, 2, kind, alpha);
        if (excess >= 0.0) {
          EXPECT_EQ(row.loss, 0.0) << alpha;
          EXPECT_EQ(row.grad, (std::vector<double>(4, 0.0))) << alpha;
        } else {
          EXPECT_GT(row.loss, 0.0) << alpha;
        }
      }
    }
  }
  for (double alpha : {0.3, 0.8, 1.0}) {
    EXPECT_GT(FenchelYoungLoss({0.0, 5.0}, 1, kEntmax, alpha).loss, 0.0);
  }
}

TEST(FenchelYoungLoss, Edges) {
  for (MappingKind kind : {kEntmax, kNormmax}) {
    for (double alpha : {0.8, 1.0, 1.5, 2.0}) {
      if (kind == kNormmax && alpha <= 1.0) continue;
      EXPECT_EQ(FenchelYoungLoss({4.0}, 0, kind, alpha).loss, 0.0);
      EXPECT_EQ(FenchelYoungLoss({0.0, -kInfinity}, 1, kind, alpha).loss, kInfinity);
      EXPECT_EQ(FenchelYoungLoss({0.0, -kInfinity}, 0, kind, alpha).loss, 0.0);
      const double nan = std::numeric_limits<double>::quiet_NaN();
      for (const std::vector<double>& bad : std::vector<std::vector<double>>{
               {0.0, nan}, {0.0, kInfinity}, {-kInfinity, -kInfinity}, {nan, -kInfinity}}) {
        const LossRow row = FenchelYoungLoss(bad, 1, kind, alpha);
        EXPECT_TRUE(std::isnan(row.loss));
        EXPECT_TRUE(std::isnan(row.grad[0]));
        EXPECT_TRUE(std::isnan(row.grad[1]));
      }
    }
  }
}

}  // namespace
}  // namespace flash_entmax
