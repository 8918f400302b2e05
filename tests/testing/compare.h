// Errors and precisions for comparisons of the form EXPECT_LE(error, bound), which NaN fails.

#ifndef FLASH_ENTMAX_TESTS_TESTING_COMPARE_H_
#define FLASH_ENTMAX_TESTS_TESTING_COMPARE_H_

#include <algorithm>
#include <cmath>
#include <vector>

#include "flash_entmax/tensor.h"
#include "math/element.h"

namespace flash_entmax::testing {

// |got − want|; 0 for equal infinities and for NaN where NaN is wanted, NaN where only one is.
inline double Error(double got, double want) {
  if (std::isnan(want)) return std::isnan(got) ? 0.0 : want;
  if (got == want) return 0.0;
  return std::fabs(got - want);
}

// Largest element-wise Error; NaN if any is, or if the lengths differ.
inline double MaxError(const std::vector<double>& got, const std::vector<double>& want) {
  if (got.size() != want.size()) return std::nan("");
  double largest = 0.0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = Error(got[i], want[i]);
    if (std::isnan(error)) return error;
    largest = std::max(largest, error);
  }
  return largest;
}

// Distance from 1 to the next number of a floating-point type.
inline double EpsilonOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-52;
    case DType::kFloat16:
      return 0x1p-10;
    case DType::kBFloat16:
      return 0x1p-7;
    default:
      return 0x1p-23;
  }
}

// Half the smallest positive number of the type: what rounding costs next to zero. For bfloat16
// and float32 a little is added because an engine may flush float32 denormals.
inline double RoundingNearZero(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-1074;
    case DType::kFloat16:
      return 0x1p-25;
    default:
      return 0x1p-126;
  }
}

// `value` rounded to the type.
inline double RoundTo(DType dtype, double value) {
  return DispatchFloating(dtype, [value](auto type) {
    decltype(type) stored{};
    MutableTensorView view = MutableTensorView::Contiguous(&stored, DType::kFloat64, {1});
    if constexpr (sizeof(type) == 4) view.dtype = DType::kFloat32;
    if constexpr (std::is_same_v<decltype(type), BFloat16>) view.dtype = DType::kBFloat16;
    if constexpr (std::is_same_v<decltype(type), Float16>) view.dtype = DType::kFloat16;
    WriteElement(view, 0, value);
    return ToDouble(stored);
  });
}

}  // namespace flash_entmax::testing

#endif  // FLASH_ENTMAX_TESTS_TESTING_COMPARE_H_
