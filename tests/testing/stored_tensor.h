// A tensor that owns its memory, in any type and memory order, with guarded gaps between elements.

#ifndef FLASH_ENTMAX_TESTS_TESTING_STORED_TENSOR_H_
#define FLASH_ENTMAX_TESTS_TESTING_STORED_TENSOR_H_

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "flash_entmax/tensor.h"
#include "math/element.h"
#include "testing/random.h"

namespace flash_entmax::testing {

using Index = std::vector<int64_t>;

// Number of elements of a shape.
inline int64_t Product(const Index& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

// The multi-index of element `flat` in row-major order.
inline Index Unravel(const Index& shape, int64_t flat) {
  Index index(shape.size());
  for (size_t d = shape.size(); d-- > 0;) {
    index[d] = flat % shape[d];
    flat /= shape[d];
  }
  return index;
}

// Every byte starts as 0xFF, which is NaN in all floating-point types and −1 in the signed ones.
class StoredTensor {
 public:
  StoredTensor() = default;

  // Row-major without gaps.
  StoredTensor(DType dtype, const Index& shape) : StoredTensor(dtype, shape, nullptr) {}

  // Dimensions in random memory order, with gaps, some running backwards. Null means row-major.
  StoredTensor(DType dtype, const Index& shape, Random* layout) : shape_(shape) {
    view_.dtype = dtype;
    view_.rank = static_cast<int>(shape.size());
    std::vector<size_t> order(shape.size());  // innermost first
    std::iota(order.rbegin(), order.rend(), size_t{0});
    if (layout != nullptr) {
      for (size_t d = order.size(); d > 1; --d) {
        std::swap(order[d - 1], order[layout->Integer(0, static_cast<int64_t>(d) - 1)]);
      }
    }
    int64_t span = 1;   // elements from the lowest to one past the highest
    int64_t first = 0;  // where index 0 lies
    for (size_t d : order) {
      const int64_t step = span + (layout != nullptr ? layout->Integer(0, 2) : 0);
      const bool backwards = layout != nullptr && layout->Chance(0.25);
      const int64_t reach = step * std::max<int64_t>(shape[d] - 1, 0);
      view_.shape[d] = shape[d];
      view_.strides[d] = backwards ? -step : step;
      if (backwards) first += reach;
      span += reach;
    }
    bytes_.assign(span * SizeOf(dtype), 0xFF);
    first_ = first;
  }

  const Index& shape() const { return shape_; }
  DType dtype() const { return view_.dtype; }
  int64_t size() const { return Product(shape_); }

  MutableTensorView mutable_view() {
    MutableTensorView view = view_;
    view.data = bytes_.data() + first_ * SizeOf(view_.dtype);
    return view;
  }
  TensorView view() const {
    TensorView view = view_.view();
    view.data = bytes_.data() + first_ * SizeOf(view_.dtype);
    return view;
  }

  double Get(const Index& index) const { return ReadElement(view(), OffsetOf(index)); }
  void Set(const Index& index, double value) {
    WriteElement(mutable_view(), OffsetOf(index), value);
  }

  // Row-major values.
  std::vector<double> Values() const {
    std::vector<double> values(size());
    for (int64_t i = 0; i < size(); ++i) values[i] = Get(Unravel(shape_, i));
    return values;
  }
  void SetValues(const std::vector<double>& values) {
    for (int64_t i = 0; i < size(); ++i) Set(Unravel(shape_, i), values[i]);
  }

  // The bytes as they are, for comparisons of every bit.
  const std::vector<uint8_t>& bytes() const { return bytes_; }
  void Poison() { std::fill(bytes_.begin(), bytes_.end(), uint8_t{0xFF}); }

  // True if no byte between the elements was written.
  bool GapsAreIntact() const {
    StoredTensor copy = *this;
    const std::vector<uint8_t> ones(SizeOf(dtype()), 0xFF);
    for (int64_t i = 0; i < size(); ++i) {
      const int64_t at = first_ + OffsetOf(Unravel(shape_, i));
      std::copy(ones.begin(), ones.end(), copy.bytes_.begin() + at * SizeOf(dtype()));
    }
    return std::all_of(copy.bytes_.begin(), copy.bytes_.end(), [](uint8_t b) { return b == 0xFF; });
  }

 private:
  int64_t OffsetOf(const Index& index) const {
    int64_t offset = 0;
    for (size_t d = 0; d < index.size(); ++d) offset += index[d] * view_.strides[d];
    return offset;
  }

  Index shape_;
  MutableTensorView view_;
  int64_t first_ = 0;
  std::vector<uint8_t> bytes_;
};

// A random shape that broadcasts to `shape`: leading dimensions dropped, others of size 1. The
// dimension `keep_one`, if not −1, has size 1 or is dropped.
inline Index BroadcastableShape(const Index& shape, int keep_one, Random* random) {
  Index result = shape;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (static_cast<int>(d) == keep_one || random->Chance(0.25)) result[d] = 1;
  }
  const int64_t dropped =
      random->Chance(0.3) ? random->Integer(0, static_cast<int64_t>(shape.size()) - 1) : 0;
  result.erase(result.begin(), result.begin() + dropped);
  return result;
}

// Where element `index` of the full shape is found in a tensor that broadcasts to it.
inline double GetBroadcast(const StoredTensor& tensor, const Index& index) {
  const Index& shape = tensor.shape();
  Index own(shape.size());
  for (size_t d = 0; d < shape.size(); ++d) {
    own[d] = shape[d] == 1 ? 0 : index[index.size() - shape.size() + d];
  }
  return tensor.Get(own);
}

}  // namespace flash_entmax::testing

#endif  // FLASH_ENTMAX_TESTS_TESTING_STORED_TENSOR_H_
