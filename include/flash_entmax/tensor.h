// Views of memory that the caller owns: pointer, element type, shape and strides.

#ifndef FLASH_ENTMAX_TENSOR_H_
#define FLASH_ENTMAX_TENSOR_H_

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "flash_entmax/status.h"

namespace flash_entmax {

enum class DType : uint8_t { kFloat64, kFloat32, kBFloat16, kFloat16, kUInt8, kInt32, kInt64 };

// Bytes of one element.
int64_t SizeOf(DType dtype);
// "float32" and so on.
const char* NameOf(DType dtype);
// True for the four floating-point types.
bool IsFloating(DType dtype);

inline constexpr int kMaxRank = 8;

// A read-only tensor. `shape[i]` counts elements, `strides[i]` is the step of dimension i in
// elements (0 repeats, negative is allowed). A default-constructed view is empty: "not given".
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};
  std::array<int64_t, kMaxRank> strides{};

  // A row-major view. The shape may have at most kMaxRank entries; more are ignored.
  static TensorView Contiguous(const void* data, DType dtype, std::initializer_list<int64_t> shape);

  // True if the view was given at all.
  explicit operator bool() const { return data != nullptr; }
  // Number of elements; 1 for rank 0.
  int64_t num_elements() const;
};

// A tensor that a function may write to.
struct MutableTensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};
  std::array<int64_t, kMaxRank> strides{};

  static MutableTensorView Contiguous(void* data, DType dtype,
                                      std::initializer_list<int64_t> shape);

  explicit operator bool() const { return data != nullptr; }
  int64_t num_elements() const;
  // The same memory, read-only.
  TensorView view() const { return {data, dtype, rank, shape, strides}; }
};

// "[2, 3, 64]", for messages.
std::string ShapeToString(const TensorView& tensor);

}  // namespace flash_entmax

#endif  // FLASH_ENTMAX_TENSOR_H_
