// How large this machine's caches are, for choices that change the speed but no result.

#ifndef FLASH_ENTMAX_SRC_CPU_CACHE_SIZE_H_
#define FLASH_ENTMAX_SRC_CPU_CACHE_SIZE_H_

#include <cstdint>

namespace flash_entmax::cpu {

// Bytes of a core's second-level cache; a megabyte where the system does not say.
int64_t SecondLevelCacheBytes();

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_CACHE_SIZE_H_
