// The deformed exponential and logarithm against closed forms and extended precision.

#include "math/deformed_exp.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "testing/compare.h"
#include "testing/random.h"

namespace flash_entmax {
namespace {

using testing::Error;
using testing::Random;
using testing::SeedMessage;

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

const std::vector<double> kAlphas = {0.3,
                                     0.8,
                                     1.0,
                                     1.0 + kEpsilon,
                                     1.0 - kEpsilon,
                                     1.0 + 1e-9,
                                     1.0 - 1e-9,
                                     1.0001,
                                     1.1,
                                     1.25,
                                     4.0 / 3.0,
                                     1.5,
                                     1.75,
                                     2.0,
                                     2.5,
                                     4.0,
                                     20.0};

using Extended = long double;

// The same function in extended precision.
Extended ExtendedExp(double alpha, double score) {
  const auto x = static_cast<Extended>(score);
  const Extended m = static_cast<Extended>(alpha) - 1.0L;
  if (m == 0.0L) return std::exp(x);
  if (m * x <= -1.0L) return m > 0.0L ? 0.0L : std::numeric_limits<Extended>::infinity();
  return std::exp(std::log1p(m * x) / m);
}

TEST(DeformedExp, HasTheClosedFormsOfTheNamedMappings) {
  for (double x = -3.0; x <= 3.0; x += 0.0625) {
    EXPECT_LE(Error(DeformedExp(1.0, x), std::exp(x)), kEpsilon * std::exp(x)) << x;
    const double linear = std::max(0.0, 1.0 + x);
    EXPECT_LE(Error(DeformedExp(2.0, x), linear), 8.0 * kEpsilon * linear) << x;
    const double square = std::max(0.0, 1.0 + 0.5 * x) * std::max(0.0, 1.0 + 0.5 * x);
    EXPECT_LE(Error(DeformedExp(1.5, x), square), 16.0 * kEpsilon * square) << x;
    const double root = std::sqrt(std::max(0.0, 1.0 + 2.0 * x));
    EXPECT_LE(Error(DeformedExp(3.0, x), root), 8.0 * kEpsilon * root) << x;
    if (x < 2.0) {
      const double inverse_square = 1.0 / ((1.0 - 0.5 * x) * (1.0 - 0.5 * x));
      EXPECT_LE(Error(DeformedExp(0.5, x), inverse_square), 32.0 * kEpsilon * inverse_square) << x;
    }
  }
}

TEST(DeformedExp, KeepsItsErrorBound) {
  SCOPED_TRACE(SeedMessage());
  Random random(10);
  for (double alpha : kAlphas) {
    const double m = alpha - 1.0;
    for (int i = 0; i < 2000; ++i) {
      double x = -std::exp2(random.Uniform(-40.0, 6.0));
      if (random.Chance(0.25) && m > 0.0) x = -random.Uniform(0.0, 1.0) / m;
      if (random.Chance(0.1)) x = m < 0.0 ? random.Uniform(0.0, -0.99 / m) : -x;
      const auto want = static_cast<double>(ExtendedExp(alpha, x));
      if (want == 0.0 || want == kInfinity || want < 1e-300) continue;
      const double bound =
          kEpsilon * want *
          (2.0 + 4.0 * std::fabs(std::log(want)) + 2.0 * std::fabs(x) * std::pow(want, -m));
      ASSERT_LE(Error(DeformedExp(alpha, x), want), bound) << "alpha " << alpha << " x " << x;
    }
  }
}

TEST(DeformedExp, EndsOfTheDomain) {
  for (double alpha : kAlphas) {
    const double m = alpha - 1.0;
    EXPECT_EQ(DeformedExp(alpha, 0.0), 1.0) << alpha;
    EXPECT_EQ(DeformedExp(alpha, -kInfinity), 0.0) << alpha;
    EXPECT_TRUE(std::isnan(DeformedExp(alpha, std::nan("")))) << alpha;
    EXPECT_EQ(DeformedExp(alpha, kInfinity), kInfinity) << alpha;
    if (m > 0.0) {
      EXPECT_EQ(DeformedExp(alpha, -1.001 / m), 0.0) << alpha;
    }
    if (m < 0.0) {
      EXPECT_EQ(DeformedExp(alpha, -1.001 / m), kInfinity) << alpha;
    }
  }
  EXPECT_EQ(DeformedExp(2.0, -1.0), 0.0);
  EXPECT_EQ(DeformedExp(1.5, -2.0), 0.0);
  EXPECT_EQ(DeformedExp(0.5, 2.0), kInfinity);
}

TEST(DeformedLog, InvertsTheExponential) {
  SCOPED_TRACE(SeedMessage());
  Random random(11);
  for (double alpha : kAlphas) {
    const double m = alpha - 1.0;
    for (int i = 0; i < 1000; ++i) {
      const double p = std::exp2(random.Uniform(-20.0, 2.0));
      const double x = DeformedLog(alpha, p);
      const double log_p = std::log(p);
      // d log_α(p) = p^m d(log p), and log p itself is rounded.
      const double bound =
          kEpsilon * (6.0 * std::fabs(x) + 2.0 * std::fabs(log_p) * std::pow(p, m));
      const Extended exact_m = static_cast<Extended>(alpha) - 1.0L;
      const Extended exact_log = std::log(static_cast<Extended>(p));
      const Extended exact = std::fabs(exact_m * exact_log) < 1e-12L
                                 ? exact_log * (1.0L + exact_m * exact_log / 2.0L)
                                 : std::expm1(exact_m * exact_log) / exact_m;
      ASSERT_LE(Error(x, static_cast<double>(exact)), bound) << "alpha " << alpha << " p " << p;
      // Next to the end of the domain x has no digits left that would tell p.
      const double relative =
          kEpsilon * (8.0 + 8.0 * std::fabs(log_p) + 8.0 * std::fabs(x) * std::pow(p, -m));
      if (relative > 1e-3) continue;
      ASSERT_LE(Error(DeformedExp(alpha, x), p), relative * p) << "alpha " << alpha << " p " << p;
    }
    EXPECT_EQ(DeformedLog(alpha, 1.0), 0.0) << alpha;
    EXPECT_TRUE(std::isnan(DeformedLog(alpha, std::nan("")))) << alpha;
    EXPECT_EQ(DeformedLog(alpha, 0.0), m > 0.0 ? -1.0 / m : -kInfinity) << alpha;
  }
}

TEST(ExpSecondRemainder, KeepsItsErrorBound) {
  for (double z = -50.0; z <= 50.0; z += 0.03125) {
    // Σ z^k/(k+2)! for small |z|, the definition in extended precision for the rest.
    Extended want = 0.0L;
    const auto exact_z = static_cast<Extended>(z);
    if (std::fabs(z) <= 2.0) {
      Extended term = 0.5L;
      for (int k = 0; k < 40; ++k) {
        want += term;
        term *= exact_z / (k + 3);
      }
    } else {
      want = (std::expm1(exact_z) - exact_z) / (exact_z * exact_z);
    }
    const auto rounded = static_cast<double>(want);
    EXPECT_LE(Error(ExpSecondRemainder(z), rounded), 8.0 * kEpsilon * rounded) << z;
  }
  EXPECT_EQ(ExpSecondRemainder(0.0), 0.5);
}

TEST(DeformedExpAlphaPartial, KeepsItsErrorBound) {
  SCOPED_TRACE(SeedMessage());
  Random random(12);
  for (double alpha : kAlphas) {
    const Extended m = static_cast<Extended>(alpha) - 1.0L;
    for (int i = 0; i < 1000; ++i) {
      const double p = std::exp2(random.Uniform(-30.0, 1.0));
      const auto exact_p = static_cast<Extended>(p);
      const Extended log_p = std::log(exact_p);
      const Extended w = m * log_p;
      // p·(y/(1 + y) − log(1 + y))/m² with y = p^m − 1, or its series close to α = 1.
      const Extended want =
          std::fabs(w) > 1e-4L
              ? exact_p * (-std::expm1(-w) - w) / (m * m)
              : -0.5L * exact_p * log_p * log_p *
                    (1.0L - w / 3.0L * (1.0L - w / 4.0L * (1.0L - w / 5.0L * (1.0L - w / 6.0L))));
      const auto rounded = static_cast<double>(want);
      const double bound =
          kEpsilon * std::fabs(rounded) * (16.0 + 2.0 * std::fabs(static_cast<double>(w)));
      ASSERT_LE(Error(DeformedExpAlphaPartial(alpha, p), rounded), bound)
          << "alpha " << alpha << " p " << p;
    }
    EXPECT_EQ(DeformedExpAlphaPartial(alpha, 0.0), 0.0);
    EXPECT_EQ(DeformedExpAlphaPartial(alpha, 1.0), 0.0);
    EXPECT_TRUE(std::isnan(DeformedExpAlphaPartial(alpha, std::nan(""))));
  }
}

TEST(DeformedExpAlphaPartial, IsTheDerivative) {
  for (double alpha : {0.3, 0.8, 1.0, 1.0 + 1e-9, 1.1, 1.5, 2.0, 4.0}) {
    for (double x : {-3.0, -1.0, -0.3, -0.01, 0.01, 0.2}) {
      const double step = 1e-5;
      const double p = DeformedExp(alpha, x);
      if (p == 0.0 || DeformedExp(alpha + step, x) == 0.0) continue;
      const double slope =
          (DeformedExp(alpha + step, x) - DeformedExp(alpha - step, x)) / (2.0 * step);
      EXPECT_LE(Error(DeformedExpAlphaPartial(alpha, p), slope), 1e-8) << alpha << ' ' << x;
    }
  }
}

}  // namespace
}  // namespace flash_entmax
