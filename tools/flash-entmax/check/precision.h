// The rounding of each floating-point type, and how it moves a probability.

#ifndef FLASH_ENTMAX_TOOLS_CHECK_PRECISION_H_
#define FLASH_ENTMAX_TOOLS_CHECK_PRECISION_H_

#include <cmath>

#include "flash_entmax/tensor.h"
#include "math/element.h"

namespace flash_entmax::cli {

// ε: the distance from 1 to the next number.
inline double EpsilonOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-52;
    case DType::kBFloat16:
      return 0x1p-7;
    case DType::kFloat16:
      return 0x1p-10;
    default:
      return 0x1p-23;
  }
}

// The distance between neighbours around 0.
inline double SmallestOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-1074;
    case DType::kBFloat16:
      return 0x1p-133;
    case DType::kFloat16:
      return 0x1p-24;
    default:
      return 0x1p-149;
  }
}

// Rounded to the type, as the library's results are.
inline double RoundTo(DType dtype, double value) {
  double memory = 0.0;
  const auto view = MutableTensorView::Contiguous(&memory, dtype, {1});
  WriteElement(view, 0, value);
  return ReadElement(view.view(), 0);
}

// How far α-entmax's probability p moves at most when its score moves by `shift` against the
// threshold. Also right for p = 0 at the edge of the support, where derivatives say nothing.
inline double ProbabilityShift(double p, double alpha, double shift) {
  const double m = alpha - 1.0;
  if (std::abs(m) < 1e-6) return p * std::expm1(shift);
  if (m < 0.0 && p == 0.0) return 0.0;
  const double x = std::pow(p, m);  // The score's distance from the threshold, times m.
  const double moved = x + m * shift;
  if (moved <= 0.0) return 1.0;  // Only for α < 1, where the sum of one bounds everything.
  return std::abs(std::pow(moved, 1.0 / m) - p);
}

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_CHECK_PRECISION_H_
