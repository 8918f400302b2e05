// Gradients of the reference mappings against central differences.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "math/deformed_exp.h"
#include "reference/mapping_reference.h"
#include "testing/compare.h"
#include "testing/finite_difference.h"
#include "testing/random.h"

namespace flash_entmax {
namespace {

using reference::MappedRow;
using reference::MappedRowGradient;
using reference::MapRow;
using reference::MapRowBackward;
using testing::CentralDifference;
using testing::CentralGradient;
using testing::Error;
using testing::MaxError;
using testing::Random;
using testing::SeedMessage;

constexpr MappingKind kEntmax = MappingKind::kEntmax;
constexpr MappingKind kNormmax = MappingKind::kNormmax;
constexpr MappingKind kBudget = MappingKind::kBudget;

double Dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// Random scores none of which is within 0.01 of a place where the derivative jumps: there a
// difference quotient means nothing.
std::vector<double> SmoothScores(MappingKind kind, double alpha, double budget, Random* random) {
  while (true) {
    const std::vector<double> s = random->GaussVector(random->Integer(2, 12));
    const MappedRow row = MapRow(s, kind, alpha, budget);
    double distance = 1.0;
    for (double score : s) {
      const double base = (kind == kEntmax ? alpha - 1.0 : 1.0) * score - row.threshold;
      if (kind != kEntmax || alpha > 1.0) distance = std::min(distance, std::fabs(base));
      if (kind == kBudget) distance = std::min(distance, std::fabs(base - 1.0));
    }
    // Close to α = 1 every base is close to 1, and next to the border p vanishes to high order.
    if (distance > 0.01 || (kind == kEntmax && alpha < 1.3)) return s;
  }
}

void ExpectScoreGradient(MappingKind kind, double alpha, double budget, Random* random) {
  const std::vector<double> s = SmoothScores(kind, alpha, budget, random);
  const std::vector<double> g = random->GaussVector(s.size());
  const auto loss = [&](const std::vector<double>& scores) {
    return Dot(g, MapRow(scores, kind, alpha, budget).probability);
  };
  const MappedRow row = MapRow(s, kind, alpha, budget);
  const std::vector<double> gradient = MapRowBackward(row.probability, g, kind, alpha).scores;
  double scale = 1.0;
  for (double x : gradient) scale = std::max(scale, std::fabs(x));
  ASSERT_LE(MaxError(gradient, CentralGradient(loss, s, 1e-6)), 2e-7 * scale * scale)
      << "alpha " << alpha << " budget " << budget;
}

TEST(MapRowBackward, EntmaxMatchesDifferences) {
  SCOPED_TRACE(SeedMessage());
  Random random(30);
  for (double alpha : {0.3, 0.8, 1.0, 1.0 + 1e-9, 1.0001, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 4.0}) {
    for (int i = 0; i < 20; ++i) ExpectScoreGradient(kEntmax, alpha, 1.0, &random);
  }
}

TEST(MapRowBackward, NormmaxMatchesDifferences) {
  SCOPED_TRACE(SeedMessage());
  Random random(31);
  for (double alpha : {1.25, 1.5, 2.0, 2.5, 4.0}) {
    for (int i = 0; i < 20; ++i) ExpectScoreGradient(kNormmax, alpha, 1.0, &random);
  }
}

TEST(MapRowBackward, BudgetMatchesDifferences) {
  SCOPED_TRACE(SeedMessage());
  Random random(32);
  for (double budget : {0.5, 1.0, 1.7, 3.3}) {
    for (int i = 0; i < 20; ++i) ExpectScoreGradient(kBudget, 1.0, budget, &random);
  }
}

TEST(MapRowBackward, AlphaMatchesDifferences) {
  SCOPED_TRACE(SeedMessage());
  Random random(33);
  for (double alpha : {0.3, 0.8, 1.0, 1.0 + 1e-9, 1.0001, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 4.0}) {
    for (int i = 0; i < 20; ++i) {
      const std::vector<double> s = SmoothScores(kEntmax, alpha, 1.0, &random);
      const std::vector<double> g = random.GaussVector(s.size());
      const double gradient =
          MapRowBackward(MapRow(s, kEntmax, alpha).probability, g, kEntmax, alpha).alpha;
      const double want = CentralDifference(
          [&](double a) { return Dot(g, MapRow(s, kEntmax, a).probability); }, alpha, 1e-6);
      ASSERT_LE(Error(gradient, want), 1e-7 * (1.0 + gradient * gradient)) << "alpha " << alpha;
    }
  }
}

TEST(MapRowBackward, AlphaIsContinuousThroughSoftmax) {
  SCOPED_TRACE(SeedMessage());
  Random random(34);
  for (int i = 0; i < 50; ++i) {
    const std::vector<double> s = random.GaussVector(15, 2.0);
    const std::vector<double> g = random.GaussVector(15);
    // At α = 1: −½ Σ p_i log²p_i (g_i − p·g).
    const std::vector<double> p = MapRow(s, kEntmax, 1.0).probability;
    double want = 0.0;
    for (size_t j = 0; j < p.size(); ++j) {
      want -= 0.5 * p[j] * std::log(p[j]) * std::log(p[j]) * (g[j] - Dot(p, g));
    }
    EXPECT_LE(Error(MapRowBackward(p, g, kEntmax, 1.0).alpha, want), 1e-13);
    for (double step : {1e-15, 1e-12, 1e-9, 1e-6}) {
      for (double alpha : {1.0 - step, 1.0 + step}) {
        const std::vector<double> near = MapRow(s, kEntmax, alpha).probability;
        EXPECT_LE(Error(MapRowBackward(near, g, kEntmax, alpha).alpha, want), 100.0 * step + 1e-12)
            << alpha;
      }
    }
  }
}

TEST(MapRowBackward, AlphaHasTheFormOfTheLiterature) {
  // (p_i − p̃_i)/(α−1)² + (h_i − p̃_i·Σh)/(α−1), h = −p log p (Correia, Niculae & Martins 2019),
  // where α is far enough from 1 for it to keep its digits.
  SCOPED_TRACE(SeedMessage());
  Random random(35);
  for (double alpha : {1.25, 1.5, 1.75, 2.0, 2.5}) {
    const double m = alpha - 1.0;
    const std::vector<double> s = random.GaussVector(12);
    const std::vector<double> g = random.GaussVector(12);
    const std::vector<double> p = MapRow(s, kEntmax, alpha).probability;
    double u_sum = 0.0;
    double entropy = 0.0;
    for (double x : p) {
      if (x == 0.0) continue;
      u_sum += std::pow(x, 2.0 - alpha);
      entropy -= x * std::log(x);
    }
    double want = 0.0;
    for (size_t i = 0; i < p.size(); ++i) {
      if (p[i] == 0.0) continue;
      const double share = std::pow(p[i], 2.0 - alpha) / u_sum;
      want += g[i] * ((p[i] - share) / (m * m) + (-p[i] * std::log(p[i]) - share * entropy) / m);
    }
    EXPECT_LE(Error(MapRowBackward(p, g, kEntmax, alpha).alpha, want), 1e-12) << alpha;
  }
}

TEST(MapRowBackward, RowsWithoutADistribution) {
  for (MappingKind kind : {kEntmax, kNormmax, kBudget}) {
    const MappedRowGradient empty = MapRowBackward({}, {}, kind, 1.5);
    EXPECT_TRUE(empty.scores.empty());
    EXPECT_EQ(empty.alpha, 0.0);
    const MappedRowGradient masked = MapRowBackward({0.0, 0.0}, {1.0, -1.0}, kind, 1.5);
    EXPECT_EQ(masked.scores, (std::vector<double>{0.0, 0.0}));
    EXPECT_EQ(masked.alpha, 0.0);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const MappedRowGradient bad = MapRowBackward({nan, nan}, {1.0, -1.0}, kind, 1.5);
    EXPECT_TRUE(std::isnan(bad.scores[0]));
    EXPECT_TRUE(std::isnan(bad.scores[1]));
  }
}

TEST(MapRowBackward, NothingReachesZeros) {
  const std::vector<double> p = {0.75, 0.0, 0.25};
  for (MappingKind kind : {kEntmax, kNormmax, kBudget}) {
    EXPECT_EQ(MapRowBackward(p, {1.0, 1e30, 2.0}, kind, 1.5).scores[1], 0.0);
    EXPECT_EQ(MapRowBackward(p, {1.0, 1e30, 2.0}, kind, 1.5).scores,
              MapRowBackward(p, {1.0, HUGE_VAL, 2.0}, kind, 1.5).scores);
  }
}

TEST(MapRowBackward, NotANumberFillsItsRow) {
  for (MappingKind kind : {kEntmax, kNormmax, kBudget}) {
    const MappedRowGradient bad =
        MapRowBackward({0.75, 0.0, 0.25}, {1.0, std::nan(""), 2.0}, kind, 1.5);
    for (const double grad : bad.scores) EXPECT_TRUE(std::isnan(grad));
  }
}

}  // namespace
}  // namespace flash_entmax
