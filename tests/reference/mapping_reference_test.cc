// The reference mappings against answers worked out by hand, and at the edges of their domain.

#include "reference/mapping_reference.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "math/deformed_exp.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace flash_entmax {
namespace {

using reference::MappedRow;
using reference::MapRow;
using testing::Error;
using testing::MaxError;
using testing::Random;
using testing::SeedMessage;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr MappingKind kEntmax = MappingKind::kEntmax;
constexpr MappingKind kNormmax = MappingKind::kNormmax;
constexpr MappingKind kBudget = MappingKind::kBudget;

const std::vector<double> kAlphas = {0.3,       0.8, 1.0,  1.0 + 1e-9, 1.0001, 1.1, 1.25,
                                     4.0 / 3.0, 1.5, 1.75, 2.0,        2.5,    4.0, 20.0};

double SumOf(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

TEST(MapRow, SparsemaxByHand) {
  // The two largest: τ = (1 + 0.6 − 1)/2 = 0.3, above 0.1 and −2.
  const MappedRow row = MapRow({0.1, 1.0, -2.0, 0.6}, kEntmax, 2.0);
  EXPECT_LE(MaxError(row.probability, {0.0, 0.7, 0.0, 0.3}), 1e-15);
  EXPECT_EQ(row.probability[0], 0.0);
  EXPECT_LE(Error(row.threshold, 0.3), 1e-15);
  EXPECT_EQ(row.support_size, 2);
}

TEST(MapRow, TwoKeysAtAnyGap) {
  for (double gap : {0.0, 0.01, 0.2, 0.49}) {
    const std::vector<double> scores = {-gap + 5.0, 5.0};
    // Softmax.
    const double logistic = 1.0 / (1.0 + std::exp(-gap));
    EXPECT_LE(MaxError(MapRow(scores, kEntmax, 1.0).probability, {1.0 - logistic, logistic}),
              1e-15);
    // α = 1.5: √p₂ − √p₁ = gap/2 and p₁ + p₂ = 1.
    const double root = gap / 4.0 + std::sqrt(0.5 - gap * gap / 16.0);
    EXPECT_LE(MaxError(MapRow(scores, kEntmax, 1.5).probability, {1.0 - root * root, root * root}),
              1e-14);
    // α = 2: p₂ − p₁ = gap.
    EXPECT_LE(
        MaxError(MapRow(scores, kEntmax, 2.0).probability, {0.5 - 0.5 * gap, 0.5 + 0.5 * gap}),
        1e-14);
    // α = 3: p₂² − p₁² = 2·gap, and with p₁ + p₂ = 1 also p₂ − p₁ = 2·gap.
    EXPECT_LE(MaxError(MapRow(scores, kEntmax, 3.0).probability, {0.5 - gap, 0.5 + gap}), 1e-13);
    // Normmax, α = 2: p = t/Σt with t₂ − t₁ = gap and t₁² + t₂² = 1.
    const double t = 0.5 * (gap + std::sqrt(2.0 - gap * gap));
    const double sum = 2.0 * t - gap;
    EXPECT_LE(MaxError(MapRow(scores, kNormmax, 2.0).probability, {(t - gap) / sum, t / sum}),
              1e-14);
    EXPECT_LE(Error(MapRow(scores, kNormmax, 2.0).threshold, 5.0 - t), 1e-14);
    // Budget 1.2: p₂ − p₁ = gap unless p₂ is at its limit.
    const double first = std::max(0.6 - 0.5 * gap, 0.2);
    EXPECT_LE(MaxError(MapRow(scores, kBudget, 0.0, 1.2).probability, {first, 1.2 - first}), 1e-14);
  }
}

TEST(MapRow, ThreeKeysOfOneAndAHalfEntmax) {
  // √p = (a, b, c)/… chosen first: √p ∝ 3, 2, 1 gives p = (9, 4, 1)/14, z = √p + τ, s = 2z.
  const double unit = 1.0 / std::sqrt(14.0);
  const MappedRow row = MapRow({6.0 * unit, 4.0 * unit, 2.0 * unit, -0.1}, kEntmax, 1.5);
  EXPECT_LE(MaxError(row.probability, {9.0 / 14.0, 4.0 / 14.0, 1.0 / 14.0, 0.0}), 1e-15);
  EXPECT_LE(Error(row.threshold, 0.0), 1e-15);
  EXPECT_EQ(row.support_size, 3);
}

TEST(MapRow, BudgetByHand) {
  // Two at the limit, two in between, one at zero: 2 + (1.2 − τ) + (1.0 − τ) = 3 at τ = 0.6.
  const MappedRow row = MapRow({5.0, 1.2, 3.0, 0.2, 1.0}, kBudget, 0.0, 3.0);
  EXPECT_LE(MaxError(row.probability, {1.0, 0.6, 1.0, 0.0, 0.4}), 1e-15);
  EXPECT_LE(Error(row.threshold, 0.6), 1e-15);
  EXPECT_EQ(row.support_size, 4);
  // A budget of 1 is sparsemax.
  EXPECT_LE(MaxError(MapRow({0.1, 1.0, -2.0, 0.6}, kBudget, 0.0, 1.0).probability,
                     MapRow({0.1, 1.0, -2.0, 0.6}, kEntmax, 2.0).probability),
            1e-15);
  // Fewer unmasked entries than the budget, or as many.
  EXPECT_EQ(MapRow({1.0, -kInfinity, 5.0}, kBudget, 0.0, 2.5).probability,
            (std::vector<double>{1.0, 0.0, 1.0}));
  EXPECT_EQ(MapRow({1.0, -9.0, 5.0}, kBudget, 0.0, 3.0).probability,
            (std::vector<double>{1.0, 1.0, 1.0}));
}

TEST(MapRow, SolvesItsOwnEquation) {
  SCOPED_TRACE(SeedMessage());
  Random random(20);
  for (double alpha : kAlphas) {
    for (int i = 0; i < 40; ++i) {
      const std::vector<double> s =
          random.GaussVector(random.Integer(1, 60), std::exp2(random.Uniform(-4.0, 4.0)));
      const MappedRow row = MapRow(s, kEntmax, alpha);
      ASSERT_LE(Error(SumOf(row.probability), 1.0), 1e-14) << alpha;
      if (alpha == 1.0) continue;
      // p from the reported τ: [(α−1)s − τ]₊^(1/(α−1)); 1/(α−1) digits are lost close to 1.
      if (std::fabs(alpha - 1.0) < 0.01 || alpha > 4.0) continue;
      for (size_t j = 0; j < s.size(); ++j) {
        const double base = std::max(0.0, (alpha - 1.0) * s[j] - row.threshold);
        ASSERT_LE(Error(row.probability[j], std::pow(base, 1.0 / (alpha - 1.0))), 1e-4) << alpha;
      }
    }
  }
}

TEST(MapRow, NormmaxSolvesItsOwnEquation) {
  SCOPED_TRACE(SeedMessage());
  Random random(21);
  for (double alpha : {1.0001, 1.25, 1.5, 2.0, 4.0, 20.0}) {
    for (int i = 0; i < 40; ++i) {
      const std::vector<double> s = random.GaussVector(random.Integer(1, 60));
      const MappedRow row = MapRow(s, kNormmax, alpha);
      ASSERT_LE(Error(SumOf(row.probability), 1.0), 1e-14) << alpha;
      double norm = 0.0;
      for (double p : row.probability) norm += std::pow(p, alpha);
      norm = std::pow(norm, 1.0 / alpha);
      // On the support s_i − (p_i/‖p‖)^(α−1) = τ, elsewhere s_i ≤ τ.
      for (size_t j = 0; j < s.size(); ++j) {
        const double p = row.probability[j];
        if (p > 1e-300) {  // Denormal numbers have too few digits.
          ASSERT_LE(Error(s[j] - std::pow(p / norm, alpha - 1.0), row.threshold), 1e-12) << alpha;
        } else {
          // Outside, or too small for a double.
          const double base = std::max(s[j] - row.threshold, 0.0);
          ASSERT_LE(std::pow(base, 1.0 / (alpha - 1.0)), 1e-12) << alpha;
        }
      }
    }
  }
}

// Runs `check(kind, alpha)` for every mapping.
template <typename Check>
void ForEveryMapping(const Check& check) {
  for (double alpha : kAlphas) check(kEntmax, alpha);
  for (double alpha : kAlphas) {
    if (alpha > 1.0) check(kNormmax, alpha);
  }
  check(kBudget, 1.5);
}

TEST(MapRow, RowsWithoutADistribution) {
  ForEveryMapping([](MappingKind kind, double alpha) {
    const MappedRow empty = MapRow({}, kind, alpha);
    EXPECT_TRUE(empty.probability.empty());
    EXPECT_TRUE(std::isnan(empty.threshold));
    const MappedRow masked = MapRow({-kInfinity, -kInfinity}, kind, alpha);
    EXPECT_EQ(masked.probability, (std::vector<double>{0.0, 0.0}));
    EXPECT_TRUE(std::isnan(masked.threshold));
    EXPECT_EQ(masked.support_size, 0);
    for (double bad : {kNaN, kInfinity}) {
      const MappedRow row = MapRow({1.0, bad, -kInfinity, 0.5}, kind, alpha);
      EXPECT_TRUE(std::isnan(row.threshold));
      EXPECT_TRUE(std::isnan(row.probability[0]));
      EXPECT_TRUE(std::isnan(row.probability[1]));
      EXPECT_TRUE(std::isnan(row.probability[3]));
      EXPECT_EQ(row.support_size, 0);
    }
  });
}

TEST(MapRow, OneKeyTakesEverything) {
  ForEveryMapping([](MappingKind kind, double alpha) {
    for (double score : {0.0, -3.5, 1e300, -1e300, 5e-324}) {
      EXPECT_EQ(MapRow({score}, kind, alpha).probability, (std::vector<double>{1.0}));
      EXPECT_EQ(MapRow({-kInfinity, score}, kind, alpha).probability,
                (std::vector<double>{0.0, 1.0}));
    }
  });
}

TEST(MapRow, EqualScoresAreUniform) {
  ForEveryMapping([](MappingKind kind, double alpha) {
    for (double score : {0.0, 7.25, -1e10, 1e300, 5e-324}) {
      for (size_t n : {2, 3, 7, 100}) {
        if (kind == kBudget && std::fabs(score) > 100.0) continue;  // τ = s − 1/n is no double.
        const MappedRow row = MapRow(std::vector<double>(n, score), kind, alpha);
        const double share = 1.0 / static_cast<double>(n);
        EXPECT_LE(MaxError(row.probability, std::vector<double>(n, share)), 1e-13)
            << alpha << ' ' << score << ' ' << n;
        EXPECT_EQ(row.support_size, static_cast<int64_t>(n));
      }
    }
  });
}

TEST(MapRow, ScoresTooCloseToTellApartAreUniform) {
  ForEveryMapping([](MappingKind kind, double alpha) {
    const MappedRow row = MapRow({5e-324, 0.0, -1e-310, 2e-308}, kind, alpha);
    EXPECT_LE(MaxError(row.probability, std::vector<double>(4, 0.25)), 1e-14) << alpha;
  });
}

TEST(MapRow, HugeScores) {
  for (double alpha : kAlphas) {
    if (alpha < 1.0) continue;
    const MappedRow row = MapRow({1e308, -1e308, 1e308, 0.0}, kEntmax, alpha);
    EXPECT_LE(MaxError(row.probability, {0.5, 0.0, 0.5, 0.0}), 1e-13) << alpha;
    EXPECT_EQ(row.probability[1], 0.0);
    EXPECT_EQ(row.probability[3], 0.0);
  }
  // Heavy tails: with α = 1/2, p = (1 + x/2)^−2; the sum is 1 + 2·10^-16 at most.
  const MappedRow heavy = MapRow({1e9, 0.0}, kEntmax, 0.5);
  EXPECT_LE(Error(heavy.probability[1], 4e-18), 1e-25);
  EXPECT_EQ(heavy.support_size, 2);
}

TEST(MapRow, IsContinuousThroughSoftmax) {
  SCOPED_TRACE(SeedMessage());
  Random random(22);
  for (int i = 0; i < 50; ++i) {
    const std::vector<double> s = random.GaussVector(20, 2.0);
    const std::vector<double> softmax = MapRow(s, kEntmax, 1.0).probability;
    for (double step : {1e-15, 1e-12, 1e-9, 1e-6}) {
      for (double alpha : {1.0 - step, 1.0 + step}) {
        // |∂p/∂α| ≤ ½ p log²p + … < 3 for 20 keys.
        EXPECT_LE(MaxError(MapRow(s, kEntmax, alpha).probability, softmax), 3.0 * step + 1e-14);
      }
    }
  }
}

}  // namespace
}  // namespace flash_entmax
