// Asking for a row of keys or values before it is needed.

#ifndef FLASH_ENTMAX_SRC_CPU_PREFETCH_H_
#define FLASH_ENTMAX_SRC_CPU_PREFETCH_H_

#include <cstdint>

#include "hwy/cache_control.h"

namespace flash_entmax::cpu {

template <typename T>
inline void PrefetchRow(const T* row, int64_t width) {
  constexpr int64_t kPerLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t e = 0; e < width; e += kPerLine) hwy::Prefetch(row + e);
}

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_PREFETCH_H_
