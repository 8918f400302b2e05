#include "cpu/cache_size.h"

#if defined(__linux__)
#include <unistd.h>
#endif

namespace flash_entmax::cpu {

int64_t SecondLevelCacheBytes() {
  static const int64_t bytes = [] {
    constexpr int64_t kUsual = int64_t{1} << 20;
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
    // 0 or −1 where it is not known.
    const int64_t reported = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (reported >= kUsual / 8 && reported <= 64 * kUsual) return reported;
#endif
    return kUsual;
  }();
  return bytes;
}

}  // namespace flash_entmax::cpu
