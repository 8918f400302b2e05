// The keys a screening thread could not prove zero: one entry a step with a hit, in the thread's
// own list (no atomics, no votes). Entry i of lane l of a strip lies at [i][l], so that the lanes
// of a warp that append at the same time write to the same lines.
//
// A list has a fixed size. When it is full, entries that the bound has overtaken are dropped; when
// that does not make room the caller hands the unit to the tile path.
#ifndef FLASH_ENTMAX_CUDA_CANDIDATE_LIST_CUH_
#define FLASH_ENTMAX_CUDA_CANDIDATE_LIST_CUH_

#include "bounds.cuh"

namespace flash_entmax::cuda {

constexpr int kStripListEntries = kListCapacity * kWarpSize;

// The scores of a row above its bound, as CandidateEntry::mask.
__device__ __forceinline__ uint32_t HitMask(const uint32_t (&scores)[32], int row, __half2 bound) {
  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    mask |= __hgt2_mask(AsHalf2(scores[2 * i + row]), bound) & (0x00010001u << i);
  }
  return mask;
}

// Appends when a mask has a bit; straight-line, the list must have room.
__device__ __forceinline__ void Append(CandidateEntry* list, int& count, uint32_t mask0,
                                       uint32_t mask1, const uint32_t (&maximum)[2], int step) {
  CandidateEntry* entry = list + count * kWarpSize;
  const __half2 rows = __hmax2(AsHalf2(__byte_perm(maximum[0], maximum[1], 0x5410)),
                               AsHalf2(__byte_perm(maximum[0], maximum[1], 0x7632)));
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %6, 0;\n@p st.global.v4.b32 [%1], {%2, %3, %4, %5};\n"
      "@p add.s32 %0, %0, 1;\n}"
      : "+r"(count)
      : "l"(entry), "r"(mask0), "r"(mask1), "r"(AsBits(rows)), "r"(step), "r"(mask0 | mask1)
      : "memory");
}

// Drops the entries whose maxima are at or below the present bounds; keeps the order.
// Inlined: a call would serialise the products in flight.
__device__ __forceinline__ int Compact(CandidateEntry* list, int count, const RowBounds& bounds) {
  constexpr int kBatch = 4;
  const __half2 bound = __lows2half2(bounds.screen[0], bounds.screen[1]);
  int kept = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += kBatch) {
    uint4 entry[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      entry[i] = *reinterpret_cast<const uint4*>(list + min(first + i, count - 1) * kWarpSize);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < count && __hgt2_mask(AsHalf2(entry[i].z), bound) != 0) {
        *reinterpret_cast<uint4*>(list + kept * kWarpSize) = entry[i];
        ++kept;
      }
    }
  }
  return kept;
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_CANDIDATE_LIST_CUH_
