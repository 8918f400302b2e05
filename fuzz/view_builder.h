// Random views over one small buffer, for fuzzing the checks of arguments.

#ifndef FLASH_ENTMAX_FUZZ_VIEW_BUILDER_H_
#define FLASH_ENTMAX_FUZZ_VIEW_BUILDER_H_

#include <fuzzer/FuzzedDataProvider.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "flash_entmax/tensor.h"

namespace flash_entmax::fuzz {

// Makes views that either stay inside the buffer or are broken in a way that the library must
// notice: too many dimensions, negative sizes, spans beyond 63 bits, misaligned pointers. Views
// that reach beyond the buffer without being broken are the caller's lie, which no check can see,
// so they are not made.
class ViewBuilder {
 public:
  explicit ViewBuilder(FuzzedDataProvider& input) : input_(input) {
    // Exactly as large as needed, so that the address sanitizer sees the first byte beyond.
    memory_.reset(new std::byte[kBytes]);
    std::vector<uint8_t> pattern = input.ConsumeBytes<uint8_t>(kPatternBytes);
    if (pattern.empty()) pattern.push_back(0);
    for (size_t i = 0; i < kBytes; ++i) {
      memory_[i] = static_cast<std::byte>(pattern[i % pattern.size()]);
    }
  }

  DType AnyType() { return static_cast<DType>(input_.ConsumeIntegralInRange(0, 6)); }
  DType FloatingType() { return static_cast<DType>(input_.ConsumeIntegralInRange(0, 3)); }

  // Numbers that make trouble, and some that do not.
  double AnyDouble() {
    constexpr double kDoubles[] = {0.0,
                                   -1.0,
                                   0.5,
                                   1.0,
                                   1.25,
                                   1.5,
                                   2.0,
                                   3.0,
                                   1e-300,
                                   1e300,
                                   -0.0,
                                   std::numeric_limits<double>::infinity(),
                                   -std::numeric_limits<double>::infinity(),
                                   std::numeric_limits<double>::quiet_NaN()};
    return input_.PickValueInArray(kDoubles);
  }

  // A view of the shape, now and then of another one, and now and then broken.
  MutableTensorView View(DType dtype, std::vector<int64_t> shape) {
    const int flaw = input_.ConsumeIntegralInRange(0, 63);
    if (flaw == 0 && !shape.empty()) shape.pop_back();
    if (flaw == 1) shape.insert(shape.begin(), input_.ConsumeIntegralInRange<int64_t>(0, 2));
    if (flaw == 2 && !shape.empty()) {
      shape[input_.ConsumeIntegralInRange<size_t>(0, shape.size() - 1)] =
          input_.ConsumeIntegralInRange<int64_t>(0, 5);
    }
    if (flaw == 3) dtype = AnyType();
    if (shape.size() > static_cast<size_t>(kMaxRank)) shape.resize(kMaxRank);
    MutableTensorView view = Inside(dtype, shape);
    if (flaw >= 4 && flaw <= 7) Break(view, flaw - 4);
    return view;
  }

  // True if a view was made that no function may accept.
  bool broken() const { return broken_; }

  // Takes note of the buffer's bytes, and marks those that a function may write.
  void Remember() {
    before_.assign(memory_.get(), memory_.get() + kBytes);
    writable_.assign(kBytes, false);
  }
  void Allow(const MutableTensorView& view) {
    if (!view || view.num_elements() == 0) return;
    const int64_t element = SizeOf(view.dtype);
    std::array<int64_t, kMaxRank> index{};
    for (int64_t i = 0; i < view.num_elements(); ++i) {
      int64_t offset = 0;
      for (int d = 0; d < view.rank; ++d) offset += index[d] * view.strides[d];
      const auto* at = static_cast<const std::byte*>(view.data) + offset * element;
      for (int64_t b = 0; b < element; ++b) {
        writable_[static_cast<size_t>(at - memory_.get() + b)] = true;
      }
      for (int d = view.rank - 1; d >= 0; --d) {
        if (++index[d] < view.shape[d]) break;
        index[d] = 0;
      }
    }
  }
  // True if nothing else was written.
  bool OnlyAllowedBytesChanged() const {
    for (size_t i = 0; i < kBytes; ++i) {
      if (!writable_[i] && before_[i] != memory_[i]) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kBytes = 4096;
  static constexpr size_t kPatternBytes = 64;

  // Any strides that keep the view inside.
  MutableTensorView Inside(DType dtype, const std::vector<int64_t>& shape) {
    MutableTensorView view;
    view.dtype = dtype;
    view.rank = static_cast<int>(shape.size());
    const auto capacity = static_cast<int64_t>(kBytes) / SizeOf(dtype);
    const bool reversed = input_.ConsumeIntegralInRange(0, 7) == 0;
    const int64_t gap = input_.ConsumeIntegralInRange(0, 7) == 0 ? 2 : 1;
    const bool repeated = input_.ConsumeIntegralInRange(0, 15) == 0;
    int64_t low = 0;
    int64_t high = 0;
    int64_t stride = gap;
    for (int d = view.rank - 1; d >= 0; --d) {
      const int64_t size = shape[static_cast<size_t>(d)];
      view.shape[d] = size;
      view.strides[d] = reversed ? -stride : stride;
      // Too large for the buffer: repeat instead, which a writable view must not.
      if (repeated || high - low + (size - 1) * stride >= capacity) view.strides[d] = 0;
      if (size > 0) (view.strides[d] < 0 ? low : high) += (size - 1) * view.strides[d];
      stride *= size > 0 ? size : 1;
    }
    const int64_t room = capacity - (high - low) - 1;
    const int64_t start = -low + (room > 0 ? input_.ConsumeIntegralInRange<int64_t>(0, room) : 0);
    view.data = memory_.get() + start * SizeOf(dtype);
    return view;
  }

  void Break(MutableTensorView& view, int kind) {
    constexpr int64_t kHuge = int64_t{1} << 62;
    if (kind == 0) {
      view.rank = input_.ConsumeBool() ? kMaxRank + 1 : -1;
      broken_ = true;
    } else if (kind == 1 && view.rank > 0) {
      view.shape[0] = input_.ConsumeBool() ? -1 : std::numeric_limits<int64_t>::min();
      broken_ = true;
    } else if (kind == 2 && view.rank > 0 && view.num_elements() > 0) {
      view.shape[0] = 5;
      view.strides[0] = input_.ConsumeBool() ? kHuge : -kHuge;
      broken_ = true;
    } else if (kind == 3 && SizeOf(view.dtype) > 1 && view.num_elements() > 0) {
      view.data = static_cast<std::byte*>(view.data) + 1;
      broken_ = true;
    }
  }

  FuzzedDataProvider& input_;
  std::unique_ptr<std::byte[]> memory_;
  std::vector<std::byte> before_;
  std::vector<bool> writable_;
  bool broken_ = false;
};

}  // namespace flash_entmax::fuzz

#endif  // FLASH_ENTMAX_FUZZ_VIEW_BUILDER_H_
