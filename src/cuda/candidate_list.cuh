// The keys a screening thread could not prove zero: two lists, one for each of its rows, with one
// entry a step with a hit (no atomics, no votes). Entry i of lane l lies at [i][l] of the lists of
// its strip and row half, so that the lanes of a warp that append at the same time write to the
// same lines, and a warp that finishes eight rows reads only entries of these rows.
//
// A list has a fixed size. When it is full, entries that the bound has overtaken are dropped; when
// that does not make room the caller hands the unit to the tile path.
#ifndef FLASH_ENTMAX_CUDA_CANDIDATE_LIST_CUH_
#define FLASH_ENTMAX_CUDA_CANDIDATE_LIST_CUH_

#include "bounds.cuh"

namespace flash_entmax::cuda {

constexpr int kHalfListEntries = kListCapacity * kWarpSize;  // the lists of 8 rows of a strip
constexpr int kStripListEntries = 2 * kHalfListEntries;

// The scores of a row above its bound, as CandidateEntry::mask.
__device__ __forceinline__ uint32_t HitMask(const uint32_t (&scores)[32], int row, __half2 bound) {
  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    mask |= __hgt2_mask(AsHalf2(scores[2 * i + row]), bound) & (0x00010001u << i);
  }
  return mask;
}

// Appends an entry when its mask has a bit; straight-line, the list must have room.
__device__ __forceinline__ void Append(CandidateEntry* list, int& count, uint32_t mask,
                                       uint32_t step_and_maximum) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b64 entry;\nsetp.ne.u32 p, %2, 0;\n"
      "mad.wide.u32 entry, %0, %4, %1;\n@p st.global.v2.b32 [entry], {%2, %3};\n"
      "@p add.s32 %0, %0, 1;\n}"
      : "+r"(count)
      : "l"(list), "r"(mask), "r"(step_and_maximum),
        "n"(kWarpSize * static_cast<int>(sizeof(CandidateEntry)))
      : "memory");
}

// The hits of one step, kept until the next product is on its way.
struct StepHits {
  uint32_t mask[2] = {0, 0};
  uint32_t maximum[2] = {0, 0};  // of each row's even and odd scores
  int step = 0;

  __device__ __forceinline__ void AppendTo(CandidateEntry* lists, int (&count)[2]) const {
    const uint32_t rows = AsBits(__hmax2(AsHalf2(__byte_perm(maximum[0], maximum[1], 0x5410)),
                                         AsHalf2(__byte_perm(maximum[0], maximum[1], 0x7632))));
    Append(lists, count[0], mask[0], __byte_perm(rows, step, 0x5410));
    Append(lists + kHalfListEntries, count[1], mask[1], __byte_perm(rows, step, 0x5432));
  }
};

// The largest screening score of an entry's keys.
__device__ __forceinline__ __half EntryMaximum(uint32_t step_and_maximum) {
  return __ushort_as_half(static_cast<unsigned short>(step_and_maximum));
}

// Drops the entries whose maxima are at or below the bound; keeps the order.
// Inlined: a call would serialise the products in flight.
__device__ __forceinline__ int Compact(CandidateEntry* list, int count, __half bound) {
  constexpr int kBatch = 4;
  int kept = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += kBatch) {
    uint2 entry[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      entry[i] = *reinterpret_cast<const uint2*>(list + min(first + i, count - 1) * kWarpSize);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < count && __hgt(EntryMaximum(entry[i].y), bound)) {
        *reinterpret_cast<uint2*>(list + kept * kWarpSize) = entry[i];
        ++kept;
      }
    }
  }
  return kept;
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_CANDIDATE_LIST_CUH_
