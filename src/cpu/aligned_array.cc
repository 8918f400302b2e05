#include "cpu/aligned_array.h"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace flash_entmax::cpu {

void* AllocateAligned(size_t bytes) {
  constexpr size_t kCacheLine = 64;
  constexpr size_t kLargePage = size_t{1} << 21;
  const bool large = bytes >= kLargePage;
  const size_t alignment = large ? kLargePage : kCacheLine;
  void* data = nullptr;
  if (posix_memalign(&data, alignment, std::max<size_t>(bytes, 1)) != 0) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // A wish: without such pages everything works as well. Of the last page only a part is used.
  if (large) madvise(data, bytes / kLargePage * kLargePage, MADV_HUGEPAGE);
#endif
  return data;
}

}  // namespace flash_entmax::cpu
