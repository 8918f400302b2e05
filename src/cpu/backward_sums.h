// Gradients of what many rows share: α, slopes, query_scale and the bias, each summed in an order
// that depends on the problem alone.

#ifndef FLASH_ENTMAX_SRC_CPU_BACKWARD_SUMS_H_
#define FLASH_ENTMAX_SRC_CPU_BACKWARD_SUMS_H_

#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "attention_resolved.h"
#include "cpu/backward_kernels.h"
#include "flash_entmax/tensor.h"
#include "math/element.h"

namespace flash_entmax::cpu {

// A view of `tensor` (row-major numbers of its shape) that repeats like the tensor itself where it
// is broadcast: strides of element counts, aligned at the right.
struct BroadcastStrides {
  std::array<int64_t, 4> stride{};
  int64_t elements = 1;

  BroadcastStrides() = default;
  BroadcastStrides(const MutableTensorView& tensor, int rank) {
    for (int d = tensor.rank - 1; d >= 0; --d) {
      const int target = d + rank - tensor.rank;
      if (tensor.shape[d] != 1) stride[static_cast<size_t>(target)] = elements;
      elements *= tensor.shape[d];
    }
  }
};

// Element `index` (row-major) of a tensor of any strides.
inline void WriteRowMajor(const MutableTensorView& tensor, int64_t index, double value) {
  int64_t offset = 0;
  for (int d = tensor.rank - 1; d >= 0; --d) {
    offset += index % tensor.shape[d] * tensor.strides[d];
    index /= tensor.shape[d];
  }
  WriteElement(tensor, offset, value);
}

// out[head] = Σ over batches and queries of values [batch, heads, query_length].
inline void SumOverRows(const ResolvedAttention& resolved, const std::vector<double>& values,
                        const MutableTensorView& out) {
  if (!out) return;
  for (int64_t h = 0; h < resolved.heads; ++h) {
    double sum = 0.0;
    for (int64_t b = 0; b < resolved.batch; ++b) {
      const double* row = values.data() + (b * resolved.heads + h) * resolved.query_length;
      for (int64_t i = 0; i < resolved.query_length; ++i) sum += row[i];
    }
    WriteElement(out, h * out.strides[0], sum);
  }
}

// Sums values [batch, heads, query_length] to the shape of a tensor that broadcasts to it.
inline void SumToShape(const ResolvedAttention& resolved, const std::vector<double>& values,
                       const MutableTensorView& out) {
  if (!out) return;
  const BroadcastStrides to(out, 3);
  std::vector<double> sums(static_cast<size_t>(to.elements), 0.0);
  size_t row = 0;
  for (int64_t b = 0; b < resolved.batch; ++b) {
    for (int64_t h = 0; h < resolved.heads; ++h) {
      for (int64_t i = 0; i < resolved.query_length; ++i, ++row) {
        sums[static_cast<size_t>(b * to.stride[0] + h * to.stride[1] + i * to.stride[2])] +=
            values[row];
      }
    }
  }
  for (size_t e = 0; e < sums.size(); ++e) {
    WriteRowMajor(out, static_cast<int64_t>(e), sums[e]);
  }
}

// The bias's gradient, in its own shape. Two panels with different owners never add to the same
// element, so they may run at the same time; those of one owner run one after another.
template <typename T>
class BiasGradient {
 public:
  BiasGradient(const ResolvedAttention& resolved, const TensorView& bias,
               const MutableTensorView& gradient)
      : batch_(resolved.batch),
        heads_(resolved.heads),
        query_length_(resolved.query_length),
        key_length_(resolved.key_length),
        gradient_(gradient) {
    if (!gradient || !bias) return;
    to_ = BroadcastStrides(gradient, 4);
    // Long sums in double: those over query rows. The others are at most batch·heads long.
    const bool long_sums = to_.stride[2] == 0 && query_length_ > 1;
    if (long_sums || std::is_same_v<T, double>) {
      double_.assign(static_cast<size_t>(to_.elements), 0.0);
    } else {
      single_.assign(static_cast<size_t>(to_.elements), T{0});
    }
  }

  bool wanted() const { return static_cast<bool>(gradient_); }

  // Whether every score has an element of its own, so that anyone may write it at any time.
  bool separate() const {
    return wanted() && (to_.stride[0] != 0 || batch_ == 1) && (to_.stride[1] != 0 || heads_ == 1) &&
           (to_.stride[2] != 0 || query_length_ == 1) && (to_.stride[3] != 0 || key_length_ == 1);
  }
  // If separate(): the element of query 0 and key 0 of a head, and the distances between others.
  T* Head(int64_t batch, int64_t head) {
    std::vector<T>& sums = Sums();
    return sums.data() + batch * to_.stride[0] + head * to_.stride[1];
  }
  int64_t query_stride() const { return to_.stride[2]; }
  int64_t key_stride() const { return to_.stride[3]; }

  // Equal for panels that may add to the same element.
  int64_t Owner(int64_t batch, int64_t head, int64_t first_query) const {
    const int64_t b = to_.stride[0] == 0 ? 0 : batch;
    const int64_t h = to_.stride[1] == 0 ? 0 : head;
    const int64_t i = to_.stride[2] == 0 ? 0 : first_query;
    return (b * heads_ + h) * query_length_ + i;
  }

  void Add(int64_t batch, int64_t head, const std::vector<ColumnEntry<T>>& entries,
           const std::vector<T>& grad_score) {
    for (size_t i = 0; i < entries.size(); ++i) {
      AddOne(batch, head, entries[i].row, entries[i].key, static_cast<double>(grad_score[i]));
    }
  }

  void AddOne(int64_t batch, int64_t head, int64_t query, int64_t key, double value) {
    const auto element = static_cast<size_t>(batch * to_.stride[0] + head * to_.stride[1] +
                                             query * to_.stride[2] + key * to_.stride[3]);
    if (!double_.empty()) {
      double_[element] += value;
    } else {
      single_[element] += static_cast<T>(value);
    }
  }

  void Finish() const {
    if (!wanted()) return;
    for (int64_t e = 0; e < to_.elements; ++e) {
      const auto i = static_cast<size_t>(e);
      WriteRowMajor(gradient_, e, double_.empty() ? static_cast<double>(single_[i]) : double_[i]);
    }
  }

 private:
  // Of separate elements: sums over query rows have none.
  std::vector<T>& Sums() {
    if constexpr (std::is_same_v<T, double>) {
      return double_;
    } else {
      return single_;
    }
  }

  int64_t batch_;
  int64_t heads_;
  int64_t query_length_;
  int64_t key_length_;
  MutableTensorView gradient_;
  BroadcastStrides to_;
  std::vector<double> double_;
  std::vector<T> single_;
};

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_BACKWARD_SUMS_H_
