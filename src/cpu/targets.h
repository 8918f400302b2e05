// Which of Highway's instruction sets are compiled. Include before any other Highway header.
//
// Three generations of x86 and a portable fallback; skipping the ones between keeps the build short
// and costs only machines that are rare. On Arm, NEON; SVE would need kernels written for vectors
// whose length is not known when compiling.

#ifndef FLASH_ENTMAX_SRC_CPU_TARGETS_H_
#define FLASH_ENTMAX_SRC_CPU_TARGETS_H_

// This header turns an undefined HWY_DISABLED_TARGETS into 0. The constants that it defines differ
// between versions of Highway, so the choice is made after it.
#include "hwy/detect_targets.h"

#ifdef HWY_AVX3_ZEN4
#define FLASH_ENTMAX_NEWER_X86 (HWY_AVX3_ZEN4 | HWY_AVX3_SPR)
#else
#define FLASH_ENTMAX_NEWER_X86 0
#endif
#ifdef HWY_AVX10_2
#define FLASH_ENTMAX_AVX10 HWY_AVX10_2
#else
#define FLASH_ENTMAX_AVX10 0
#endif
#ifdef HWY_NEON_BF16
#define FLASH_ENTMAX_NEON_BF16 HWY_NEON_BF16
#else
#define FLASH_ENTMAX_NEON_BF16 0
#endif

#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS                                                   \
  (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | \
   FLASH_ENTMAX_NEWER_X86 | FLASH_ENTMAX_AVX10 | FLASH_ENTMAX_NEON_BF16)

#endif  // FLASH_ENTMAX_SRC_CPU_TARGETS_H_
