// Tensors of attention's backward pass in the layouts that its kernels read and write.

#ifndef FLASH_ENTMAX_SRC_CPU_BACKWARD_INPUTS_H_
#define FLASH_ENTMAX_SRC_CPU_BACKWARD_INPUTS_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "cpu/parallel.h"
#include "flash_entmax/tensor.h"
#include "math/element.h"

namespace flash_entmax::cpu {

// Rows of one head: padded with zeros to a width that the owner knows, `stride` apart.
template <typename T>
struct RowsView {
  T* data = nullptr;
  int64_t stride = 0;

  T* Row(int64_t i) const { return data + i * stride; }
};

inline int64_t PaddedWidth(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// True if the rows of a [batch, heads, length, size] tensor are such rows already.
template <typename T>
bool RowsInPlace(DType dtype, int64_t size, int64_t last_stride, int64_t multiple) {
  constexpr DType kDType = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;
  return dtype == kDType && last_stride == 1 && size % multiple == 0;
}

// Rows to read: in place where they can be, otherwise a copy in T of the whole tensor.
template <typename T>
class InputRows {
 public:
  InputRows(const TensorView& tensor, int64_t multiple, int num_threads)
      : tensor_(tensor), width_(PaddedWidth(tensor.shape[3], multiple)) {
    if (RowsInPlace<T>(tensor.dtype, tensor.shape[3], tensor.strides[3], multiple)) return;
    const int64_t rows = tensor.shape[0] * tensor.shape[1] * tensor.shape[2];
    copy_.reset(new T[static_cast<size_t>(rows * width_)]);
    DispatchFloating(tensor.dtype, [&](auto type) { Copy<decltype(type)>(rows, num_threads); });
  }

  static int64_t CopyElements(const TensorView& tensor, int64_t multiple) {
    if (RowsInPlace<T>(tensor.dtype, tensor.shape[3], tensor.strides[3], multiple)) return 0;
    return tensor.shape[0] * tensor.shape[1] * tensor.shape[2] *
           PaddedWidth(tensor.shape[3], multiple);
  }

  int64_t width() const { return width_; }

  // The rows of one head from row `first` on.
  RowsView<const T> Get(int64_t batch, int64_t head, int64_t first) const {
    if (copy_) {
      const int64_t row = (batch * tensor_.shape[1] + head) * tensor_.shape[2] + first;
      return {copy_.get() + row * width_, width_};
    }
    return {static_cast<const T*>(tensor_.data) + batch * tensor_.strides[0] +
                head * tensor_.strides[1] + first * tensor_.strides[2],
            tensor_.strides[2]};
  }

 private:
  template <typename Element>
  void Copy(int64_t rows, int num_threads) {
    constexpr int64_t kGrain = 256;
    ParallelFor(rows, kGrain, num_threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t i = row % tensor_.shape[2];
        const int64_t head = row / tensor_.shape[2] % tensor_.shape[1];
        const int64_t batch = row / tensor_.shape[2] / tensor_.shape[1];
        const auto* source = static_cast<const Element*>(tensor_.data) +
                             batch * tensor_.strides[0] + head * tensor_.strides[1] +
                             i * tensor_.strides[2];
        T* target = copy_.get() + row * width_;
        for (int64_t e = 0; e < tensor_.shape[3]; ++e) {
          target[e] = Convert(source[e * tensor_.strides[3]]);
        }
        std::fill(target + tensor_.shape[3], target + width_, T{0});
      }
    });
  }

  static T Convert(double x) { return static_cast<T>(x); }
  static T Convert(float x) { return static_cast<T>(x); }
  static T Convert(BFloat16 x) { return static_cast<T>(ToFloat(x)); }
  static T Convert(Float16 x) { return static_cast<T>(ToFloat(x)); }

  TensorView tensor_;
  int64_t width_;
  std::unique_ptr<T[]> copy_;
};

// Rows to add to: in place where they can be, otherwise in T until Finish() rounds them once.
template <typename T>
class OutputRows {
 public:
  // `like` is what it is the gradient of.
  OutputRows(const MutableTensorView& tensor, const TensorView& like, int64_t multiple)
      : tensor_(tensor),
        width_(PaddedWidth(like.shape[3], multiple)),
        wanted_(static_cast<bool>(tensor)) {
    if (!wanted_ || RowsInPlace<T>(tensor.dtype, tensor.shape[3], tensor.strides[3], multiple)) {
      return;
    }
    work_.reset(new T[static_cast<size_t>(rows() * width_)]);
  }

  bool wanted() const { return wanted_; }
  int64_t rows() const { return tensor_.shape[0] * tensor_.shape[1] * tensor_.shape[2]; }
  int64_t width() const { return width_; }

  RowsView<T> Get(int64_t batch, int64_t head, int64_t first) const {
    if (!wanted_) return {};
    if (work_) {
      const int64_t row = (batch * tensor_.shape[1] + head) * tensor_.shape[2] + first;
      return {work_.get() + row * width_, width_};
    }
    return {static_cast<T*>(tensor_.data) + batch * tensor_.strides[0] + head * tensor_.strides[1] +
                first * tensor_.strides[2],
            tensor_.strides[2]};
  }

  void SetZero(int num_threads) const {
    ForEachRow(num_threads,
               [&](T* row, int64_t, int64_t, int64_t) { std::fill_n(row, width_, T{0}); });
  }

  void Finish(int num_threads) const {
    if (!work_) return;
    ForEachRow(num_threads, [&](const T* row, int64_t batch, int64_t head, int64_t i) {
      const int64_t offset =
          batch * tensor_.strides[0] + head * tensor_.strides[1] + i * tensor_.strides[2];
      for (int64_t e = 0; e < tensor_.shape[3]; ++e) {
        WriteElement(tensor_, offset + e * tensor_.strides[3], static_cast<double>(row[e]));
      }
    });
  }

 private:
  template <typename Body>
  void ForEachRow(int num_threads, const Body& body) const {
    if (!wanted_) return;
    constexpr int64_t kGrain = 256;
    ParallelFor(rows(), kGrain, num_threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t i = row % tensor_.shape[2];
        const int64_t head = row / tensor_.shape[2] % tensor_.shape[1];
        const int64_t batch = row / tensor_.shape[2] / tensor_.shape[1];
        body(Get(batch, head, 0).Row(i), batch, head, i);
      }
    });
  }

  MutableTensorView tensor_;
  int64_t width_;
  bool wanted_;
  std::unique_ptr<T[]> work_;
};

// Rows [0, rows) as tiles of the right operand of a product: blocks of `block` rows, each as
// [size][block], with zeros behind the last row.
template <typename T>
void PackTransposed(const RowsView<const T>& rows, int64_t first, int64_t end, int64_t size,
                    int64_t block, T* target) {
  for (int64_t j = first; j < first + block; ++j) {
    if (j < end) {
      const T* source = rows.Row(j);
      for (int64_t e = 0; e < size; ++e) target[e * block + j - first] = source[e];
    } else {
      for (int64_t e = 0; e < size; ++e) target[e * block + j - first] = T{0};
    }
  }
}

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_BACKWARD_INPUTS_H_
