// Checks and broadcasts of tensor views that several functions of the API share.

#ifndef FLASH_ENTMAX_SRC_VIEWS_H_
#define FLASH_ENTMAX_SRC_VIEWS_H_

#include <array>
#include <concepts>
#include <cstdint>
#include <string>

#include "flash_entmax/status.h"
#include "flash_entmax/tensor.h"

namespace flash_entmax {

// A shape to broadcast to.
struct Shape {
  int rank = 0;
  std::array<int64_t, kMaxRank> size{};
};

inline Shape ShapeOf(const TensorView& tensor) { return {tensor.rank, tensor.shape}; }

// A number for messages: as many digits as tell it from its neighbours.
std::string Number(double value);
template <std::integral Integer>
std::string Number(Integer value) {
  return std::to_string(value);
}

// "name: got ...; must be ...", the form of every message.
Status BadArgument(const std::string& name, const std::string& got, const std::string& allowed);

// Rank within [0, kMaxRank], no negative size, the number of bytes spanned fits in 63 bits, and
// the pointer is aligned for its type (a tensor with no elements may be null).
Status CheckView(const std::string& name, const TensorView& tensor);

// CheckView, and no two indices address the same element.
Status CheckWritable(const std::string& name, const MutableTensorView& tensor);

// The two share no memory: their ranges of addresses do not intersect, or they are columns of one
// tensor that lie side by side, as the parts of a fused projection do.
Status CheckDisjoint(const std::string& name, const TensorView& a, const std::string& other_name,
                     const TensorView& b);

// The view with the given shape, repeated along dimensions that are missing or have size 1
// (aligned at the right, as NumPy does). An error if the shapes do not fit.
Expected<TensorView> BroadcastTo(const std::string& name, const TensorView& tensor,
                                 const Shape& shape);

}  // namespace flash_entmax

#endif  // FLASH_ENTMAX_SRC_VIEWS_H_
