// Which keys a query may see: causal and window masks as a range.

#ifndef FLASH_ENTMAX_SRC_MATH_VISIBLE_KEYS_H_
#define FLASH_ENTMAX_SRC_MATH_VISIBLE_KEYS_H_

#include <cstdint>

#include "math/host_device.h"

namespace flash_entmax {

// The position masks of one sequence. Unlimited windows are kNoWindow.
struct PositionMask {
  static constexpr int64_t kNoWindow = int64_t{1} << 60;

  int64_t query_length = 0;
  int64_t key_length = 0;
  bool causal = false;
  int64_t window_left = kNoWindow;
  int64_t window_right = kNoWindow;

  // Position of query i among the keys: the last query stands at the last key.
  FLASH_ENTMAX_HOST_DEVICE int64_t Position(int64_t query) const {
    return query + key_length - query_length;
  }
  // Keys [First(i), End(i)) are visible; the range may be empty, with End ≤ First.
  FLASH_ENTMAX_HOST_DEVICE int64_t First(int64_t query) const {
    const int64_t first = Position(query) - window_left;
    return first > 0 ? first : 0;
  }
  FLASH_ENTMAX_HOST_DEVICE int64_t End(int64_t query) const {
    const int64_t right = causal ? 0 : window_right;
    const int64_t end = Position(query) + (right < window_right ? right : window_right) + 1;
    return end < key_length ? end : key_length;
  }
};

}  // namespace flash_entmax

#endif  // FLASH_ENTMAX_SRC_MATH_VISIBLE_KEYS_H_
