// Reading and writing one element of a tensor whose type is known only at run time, and calling a
// template with the C++ type of a DType.

#ifndef FLASH_ENTMAX_SRC_MATH_ELEMENT_H_
#define FLASH_ENTMAX_SRC_MATH_ELEMENT_H_

#include <cstdint>

#include "flash_entmax/tensor.h"
#include "math/half.h"

namespace flash_entmax {

inline double ToDouble(double x) { return x; }
inline double ToDouble(float x) { return static_cast<double>(x); }
inline double ToDouble(BFloat16 x) { return static_cast<double>(ToFloat(x)); }
inline double ToDouble(Float16 x) { return static_cast<double>(ToFloat(x)); }

// Calls f with a value of the C++ type of a floating-point `dtype`; returns what f returns. The
// caller has checked that the type is one of the four.
template <typename Function>
decltype(auto) DispatchFloating(DType dtype, Function&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    default:
      return f(float{});
  }
}

// The element of `tensor` at `offset` elements from its start, any type.
inline double ReadElement(const TensorView& tensor, int64_t offset) {
  switch (tensor.dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(tensor.data)[offset];
    case DType::kFloat32:
      return ToDouble(static_cast<const float*>(tensor.data)[offset]);
    case DType::kBFloat16:
      return ToDouble(static_cast<const BFloat16*>(tensor.data)[offset]);
    case DType::kFloat16:
      return ToDouble(static_cast<const Float16*>(tensor.data)[offset]);
    case DType::kUInt8:
      return static_cast<const uint8_t*>(tensor.data)[offset];
    case DType::kInt32:
      return static_cast<const int32_t*>(tensor.data)[offset];
    case DType::kInt64:
      return static_cast<double>(static_cast<const int64_t*>(tensor.data)[offset]);
  }
  return 0.0;
}

// Rounds `value` to the type of `tensor` and stores it.
inline void WriteElement(const MutableTensorView& tensor, int64_t offset, double value) {
  switch (tensor.dtype) {
    case DType::kFloat64:
      static_cast<double*>(tensor.data)[offset] = value;
      break;
    case DType::kFloat32:
      static_cast<float*>(tensor.data)[offset] = static_cast<float>(value);
      break;
    case DType::kBFloat16:
      static_cast<BFloat16*>(tensor.data)[offset] = ToBFloat16(static_cast<float>(value));
      break;
    case DType::kFloat16:
      static_cast<Float16*>(tensor.data)[offset] = ToFloat16(static_cast<float>(value));
      break;
    case DType::kUInt8:
      static_cast<uint8_t*>(tensor.data)[offset] = static_cast<uint8_t>(value);
      break;
    case DType::kInt32:
      static_cast<int32_t*>(tensor.data)[offset] = static_cast<int32_t>(value);
      break;
    case DType::kInt64:
      static_cast<int64_t*>(tensor.data)[offset] = static_cast<int64_t>(value);
      break;
  }
}

}  // namespace flash_entmax

#endif  // FLASH_ENTMAX_SRC_MATH_ELEMENT_H_
