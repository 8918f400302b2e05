#include "views.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace flash_entmax {
namespace {

// Offsets in elements of the first and last element addressed, relative to the pointer. False if
// they do not fit in 63 bits of bytes.
bool ElementRange(const TensorView& tensor, int64_t* lowest, int64_t* highest) {
  __extension__ using Wide = __int128;
  Wide low = 0;
  Wide high = 0;
  if (SizeOf(tensor.dtype) == 0) return false;
  const Wide limit = std::numeric_limits<int64_t>::max() / SizeOf(tensor.dtype) / 4;
  for (int i = 0; i < tensor.rank; ++i) {
    const Wide extent = (Wide{tensor.shape[i]} - 1) * tensor.strides[i];
    (extent < 0 ? low : high) += extent;
    if (low < -limit || high > limit) return false;
  }
  *lowest = static_cast<int64_t>(low);
  *highest = static_cast<int64_t>(high);
  return true;
}

bool HasNoElements(const TensorView& tensor) {
  return std::any_of(tensor.shape.begin(), tensor.shape.begin() + tensor.rank,
                     [](int64_t size) { return size == 0; });
}

}  // namespace

std::string Number(double value) {
  char text[32];
  // What came in as a float needs a float's digits only.
  constexpr auto kLargest = static_cast<double>(std::numeric_limits<float>::max());
  if (std::abs(value) <= kLargest && static_cast<double>(static_cast<float>(value)) == value) {
    return {text, std::to_chars(text, text + sizeof(text), static_cast<float>(value)).ptr};
  }
  return {text, std::to_chars(text, text + sizeof(text), value).ptr};
}

Status BadArgument(const std::string& name, const std::string& got, const std::string& allowed) {
  return Status::InvalidArgument(name + ": got " + got + "; must be " + allowed);
}

Status CheckView(const std::string& name, const TensorView& tensor) {
  if (tensor.rank < 0 || tensor.rank > kMaxRank) {
    return BadArgument(name, "rank " + std::to_string(tensor.rank), "of rank 0 to 8");
  }
  if (SizeOf(tensor.dtype) == 0) {
    return BadArgument(name, "an unknown element type", "a type of DType");
  }
  __extension__ using Wide = __int128;
  Wide elements = 1;
  for (int i = 0; i < tensor.rank; ++i) {
    if (tensor.shape[i] < 0) {
      return BadArgument(name, "shape " + ShapeToString(tensor), "of sizes ≥ 0");
    }
    elements *= tensor.shape[i];
    if (elements > std::numeric_limits<int64_t>::max() / 16) {
      return BadArgument(name, "shape " + ShapeToString(tensor), "small enough to address");
    }
  }
  if (HasNoElements(tensor)) return Status::Ok();
  if (tensor.data == nullptr) return BadArgument(name, "no data", "a tensor with memory");
  int64_t lowest = 0;
  int64_t highest = 0;
  if (!ElementRange(tensor, &lowest, &highest)) {
    return BadArgument(name, "shape " + ShapeToString(tensor) + " with its strides",
                       "small enough to address");
  }
  if (reinterpret_cast<uintptr_t>(tensor.data) % SizeOf(tensor.dtype) != 0) {
    return BadArgument(name, "a misaligned pointer",
                       std::string("aligned for ") + NameOf(tensor.dtype));
  }
  return Status::Ok();
}

Status CheckWritable(const std::string& name, const MutableTensorView& tensor) {
  if (Status status = CheckView(name, tensor.view()); !status.ok()) return status;
  if (HasNoElements(tensor.view())) return Status::Ok();
  std::vector<std::pair<int64_t, int64_t>> steps;  // |stride|, size
  for (int i = 0; i < tensor.rank; ++i) {
    if (tensor.shape[i] > 1) steps.emplace_back(std::abs(tensor.strides[i]), tensor.shape[i]);
  }
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;  // The largest offset that the dimensions so far can make.
  for (const auto& [stride, size] : steps) {
    if (stride <= reach) {
      return BadArgument(name, "strides that address an element twice",
                         "a tensor whose elements are all distinct");
    }
    reach += stride * (size - 1);
  }
  return Status::Ok();
}

namespace {

// True if both views lie in rows of one pitch, in columns that do not meet: parts of one tensor, as
// query, key and value of one projection are. What it does not recognise may be disjoint all the
// same.
bool LieInSeparateColumns(const TensorView& a, const TensorView& b) {
  if (SizeOf(a.dtype) != SizeOf(b.dtype)) return false;
  const auto size = static_cast<int64_t>(SizeOf(a.dtype));
  // Elements from the first to the last of a row; 0 if the view is not made of such rows.
  const auto columns = [](const TensorView& view, int64_t pitch) {
    int64_t count = 1;
    for (int i = 0; i < view.rank; ++i) {
      const int64_t extent = view.shape[static_cast<size_t>(i)];
      const int64_t stride = view.strides[static_cast<size_t>(i)];
      if (extent == 1) continue;
      if (stride <= 0 || (stride >= pitch && stride % pitch != 0)) return int64_t{0};
      if (stride < pitch) count += (extent - 1) * stride;
    }
    return count;
  };
  const auto distance = static_cast<int64_t>(reinterpret_cast<uintptr_t>(b.data) -
                                             reinterpret_cast<uintptr_t>(a.data));
  for (int i = 0; i < a.rank; ++i) {
    const int64_t pitch = a.strides[static_cast<size_t>(i)];
    if (pitch <= 0 || a.shape[static_cast<size_t>(i)] == 1) continue;
    const int64_t a_columns = columns(a, pitch), b_columns = columns(b, pitch);
    if (a_columns == 0 || b_columns == 0) continue;
    const int64_t bytes = pitch * size;
    const int64_t offset = (distance % bytes + bytes) % bytes;  // of b's columns from a's
    if (a_columns * size <= offset && offset + b_columns * size <= bytes) return true;
  }
  return false;
}

}  // namespace

Status CheckDisjoint(const std::string& name, const TensorView& a, const std::string& other_name,
                     const TensorView& b) {
  if (a.data == nullptr || b.data == nullptr || HasNoElements(a) || HasNoElements(b)) {
    return Status::Ok();
  }
  int64_t a_low = 0;
  int64_t a_high = 0;
  int64_t b_low = 0;
  int64_t b_high = 0;
  if (!ElementRange(a, &a_low, &a_high) || !ElementRange(b, &b_low, &b_high)) {
    return BadArgument(name, "a tensor too large to address", "smaller");
  }
  const auto address = [](const TensorView& tensor, int64_t element) {
    return reinterpret_cast<uintptr_t>(tensor.data) +
           static_cast<uintptr_t>(element * SizeOf(tensor.dtype));
  };
  const bool disjoint = address(a, a_high + 1) <= address(b, b_low) ||
                        address(b, b_high + 1) <= address(a, a_low) || LieInSeparateColumns(a, b);
  if (disjoint) return Status::Ok();
  return BadArgument(name, "memory shared with " + other_name, "separate from it");
}

Expected<TensorView> BroadcastTo(const std::string& name, const TensorView& tensor,
                                 const Shape& shape) {
  TensorView result = tensor;
  result.rank = shape.rank;
  result.shape = shape.size;
  result.strides = {};
  bool fits = tensor.rank <= shape.rank;
  for (int i = 0; fits && i < tensor.rank; ++i) {
    const int target = shape.rank - tensor.rank + i;
    if (tensor.shape[i] == shape.size[target]) {
      result.strides[target] = tensor.strides[i];
    } else if (tensor.shape[i] != 1) {
      fits = false;
    }
  }
  if (!fits) {
    TensorView wanted;
    wanted.rank = shape.rank;
    wanted.shape = shape.size;
    return BadArgument(name, "shape " + ShapeToString(tensor),
                       "broadcastable to " + ShapeToString(wanted));
  }
  return result;
}

}  // namespace flash_entmax
