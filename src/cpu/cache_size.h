// How large this machine's caches are, for choices that change the speed but no result.

#ifndef FLASH_ENTMAX_SRC_CPU_CACHE_SIZE_H_
#define FLASH_ENTMAX_SRC_CPU_CACHE_SIZE_H_

#include <cstdint>

namespace flash_entmax::cpu {

// Bytes of a core's second-level cache; a megabyte where the system does not say.
int64_t SecondLevelCacheBytes();

// Of groups of dense rows whose scores take so many bytes each, how many go together: they share
// keys and values, which long rows read from the third-level cache. At least one.
int64_t DenseGroupsTogether(int64_t score_bytes);

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_CACHE_SIZE_H_
