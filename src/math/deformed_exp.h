// The deformed exponential and logarithm of α-entmax (Tsallis statistics), and how the exponential
// changes with α. All are accurate through α = 1, where they are exp and log.
//
// Throughout m = α − 1 and ε = 2^-52.

#ifndef FLASH_ENTMAX_SRC_MATH_DEFORMED_EXP_H_
#define FLASH_ENTMAX_SRC_MATH_DEFORMED_EXP_H_

#include <cmath>

#include "math/host_device.h"

namespace flash_entmax {

// Below this |t|, log1p(t)/t = 1 − t/2 and expm1(t)/t = 1 + t/2 to less than an ulp, and the short
// form has no quotient of two denormal numbers.
inline constexpr double kFirstOrderLimit = 1e-8;

// log exp_α(x) = log(1 + m·x)/m for 1 + m·x > 0; x itself at α = 1. Outside that domain −∞ for
// α > 1 (the truncated tail) and +∞ for α < 1 (beyond the pole).
// Error: a relative error of 4ε, and 2ε·|x|/(1 + m·x), which is what a rounding of x costs.
FLASH_ENTMAX_HOST_DEVICE inline double LogDeformedExp(double alpha, double x) {
  const double m = alpha - 1.0;
  if (m == 0.0) return x;
  const double t = m * x;
  if (t <= -1.0) return m > 0.0 ? -HUGE_VAL : HUGE_VAL;
  if (std::fabs(t) < kFirstOrderLimit) return x * (1.0 - 0.5 * t);
  return std::log1p(t) / m;
}

// exp_α(x) = [1 + m·x]₊^(1/m); exp(x) at α = 1. Any x, α > 0; NaN gives NaN. 0 at and below
// x = −1/m for α > 1, +∞ at and above x = 1/|m| for α < 1.
// Error relative to the result p: ε·(2 + 4·|log p| + 2·|x|·p^(−m)).
FLASH_ENTMAX_HOST_DEVICE inline double DeformedExp(double alpha, double x) {
  return std::exp(LogDeformedExp(alpha, x));
}

// log_α(p) = (p^m − 1)/m, the inverse of exp_α; log(p) at α = 1. p ≥ 0, α > 0; NaN gives NaN.
// log_α(0) is −1/m for α > 1, else −∞.
// Error: relative 4ε, and 2ε·|log p|·p^m, which is what a rounding of log p costs.
FLASH_ENTMAX_HOST_DEVICE inline double DeformedLog(double alpha, double p) {
  const double m = alpha - 1.0;
  const double log_p = std::log(p);
  if (m == 0.0) return log_p;
  const double t = m * log_p;
  if (std::fabs(t) < kFirstOrderLimit) return log_p * (1.0 + 0.5 * t);
  return std::expm1(t) / m;
}

// φ₂(z) = (e^z − 1 − z)/z², 1/2 at 0. Any z.
// Error: relative 8ε.
FLASH_ENTMAX_HOST_DEVICE inline double ExpSecondRemainder(double z) {
  if (std::fabs(z) > 1.0) return (std::expm1(z) - z) / (z * z);
  // Σ z^k/(k+2)!, innermost term first: 1/2·(1 + z/3·(1 + z/4·(1 + …))).
  double sum = 1.0;
  for (int k = 20; k >= 3; --k) sum = 1.0 + sum * z / k;
  return 0.5 * sum;
}

// ∂exp_α(x)/∂α at fixed x, given p = exp_α(x) instead of x. 0 ≤ p, α > 0; 0 at p = 0, which
// includes the whole truncated tail.
//
// From log p = log(1 + y)/m with y = m·x = p^m − 1,
//     ∂ log p/∂α = (y/(1 + y) − log(1 + y))/m² = −(log p)²·φ₂(−m·log p),
// and the second form has no cancellation: at α = 1 it is −½(log p)².
// Error: relative ε·(16 + 2·|m·log p|).
FLASH_ENTMAX_HOST_DEVICE inline double DeformedExpAlphaPartial(double alpha, double p) {
  if (p == 0.0) return 0.0;
  const double log_p = std::log(p);
  return -p * log_p * log_p * ExpSecondRemainder(-(alpha - 1.0) * log_p);
}

}  // namespace flash_entmax

#endif  // FLASH_ENTMAX_SRC_MATH_DEFORMED_EXP_H_
