// Certified lower bounds of the thresholds of two query rows while their keys arrive.
//
// Screening scores are fp16 sums of fp16 products: row i's queries are scaled by a power of two so
// that no sum can overflow, and |screening score - 2^e q . k| <= error is known from the norms.
//
// The maxima of disjoint groups of keys are scores of distinct keys, so the threshold of those
// maxima alone can only be lower than the row's (a threshold never goes down as keys arrive), and
// Newton from the left stays below it. `slack` (in z) covers the error of both sides of the
// comparison.
#ifndef FLASH_ENTMAX_CUDA_BOUNDS_CUH_
#define FLASH_ENTMAX_CUDA_BOUNDS_CUH_

#include <cfloat>

#include "pipeline.cuh"
#include "threshold.cuh"

namespace flash_entmax::cuda {

constexpr int kMaximumSlots = 8;                // pairs of running group maxima of a row and thread
constexpr float kLargestScreenScore = 16384;    // |screening score| stays below this
constexpr unsigned short kLowestHalf = 0xfbff;  // the lowest finite number: nothing is known

struct RowBounds {
  __half2 screen[2];  // keys at or below are not in the support; the same number twice
  float to_z[2];      // z of a screening score
};

__device__ __forceinline__ __half2 AsHalf2(uint32_t bits) {
  return *reinterpret_cast<const __half2*>(&bits);
}

__device__ __forceinline__ uint32_t AsBits(__half2 pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Largest of each row's 16 even-numbered and of its 16 odd-numbered scores. Integer comparison
// takes three operands; it is right when the maximum is not negative, otherwise it returns some
// negative score of the group, which is still a valid member. `signed_scores` asks for the exact
// maximum. NaN wins in both.
__device__ __forceinline__ void RowMaxima(const uint32_t (&scores)[32], bool signed_scores,
                                          uint32_t (&maximum)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const uint32_t* s = scores + row;
    if (signed_scores) {
      __half2 m = AsHalf2(s[0]);
#pragma unroll
      for (int i = 1; i < 16; ++i) m = __hmax2_nan(m, AsHalf2(s[2 * i]));
      maximum[row] = AsBits(m);
    } else {
      const uint32_t a = __vimax3_s16x2(s[0], s[2], s[4]);
      const uint32_t b = __vimax3_s16x2(s[6], s[8], s[10]);
      const uint32_t c = __vimax3_s16x2(s[12], s[14], s[16]);
      const uint32_t d = __vimax3_s16x2(s[18], s[20], s[22]);
      const uint32_t e = __vimax3_s16x2(s[24], s[26], s[28]);
      maximum[row] = __vimax3_s16x2(__vimax3_s16x2(a, b, c), __vimax3_s16x2(d, e, s[30]), a);
    }
  }
}

// Which running maximum takes the keys of a step. Any fixed map keeps the groups disjoint.
__device__ __forceinline__ int MaximumSlot(int step) { return (step + (step >> 3)) & 7; }

// Folds a step's maxima into the running ones (shared memory, [slot][thread]).
__device__ __forceinline__ void RecordMaxima(uint2* running, const uint32_t (&maximum)[2]) {
  uint2 m = *running;
  m.x = AsBits(__hmax2_nan(AsHalf2(m.x), AsHalf2(maximum[0])));
  m.y = AsBits(__hmax2_nan(AsHalf2(m.y), AsHalf2(maximum[1])));
  *running = m;
}

// Raises the bounds by Newton on the group maxima (value(row, slot): two screening scores).
template <AlphaMode kAlpha, class Value>
__device__ __forceinline__ void RaiseBounds(const AlphaRule<kAlpha>& rule, int steps,
                                            const float2& slack, RowBounds& bounds, Value value) {
  float threshold[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    __half2 m = bounds.screen[row];
#pragma unroll
    for (int i = 0; i < kMaximumSlots; ++i) m = __hmax2(m, value(row, i));
    const float largest = QuadMax(__half2float(__hmax(__low2half(m), __high2half(m))));
    threshold[row] = bounds.to_z[row] * fmaxf(largest - __fdividef(1.0f, bounds.to_z[row]),
                                              __low2float(bounds.screen[row]));
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float mass = 0, slope = 0;
#pragma unroll
      for (int i = 0; i < kMaximumSlots; ++i) {
        const float2 pair = __half22float2(value(row, i));
        rule.Add(__saturatef(fmaf(bounds.to_z[row], pair.x, -threshold[row])), &mass, &slope);
        rule.Add(__saturatef(fmaf(bounds.to_z[row], pair.y, -threshold[row])), &mass, &slope);
      }
      const float delta = rule.Step(QuadSum(mass), QuadSum(slope));
      if (delta > 0) threshold[row] += delta;
    }
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float raised = __fdividef(threshold[row] - (row ? slack.y : slack.x), bounds.to_z[row]);
    bounds.screen[row] = __hmax2(bounds.screen[row], __half2half2(__float2half_rd(raised)));
  }
}

// How many groups of a warp's rows have seen a key, and how many maxima of those are above the
// bounds.
struct GroupCounts {
  unsigned seen, above;
};

template <class Value>
__device__ __forceinline__ GroupCounts CountGroups(const RowBounds& bounds, Value value) {
  const __half2 lowest = __half2half2(__ushort_as_half(kLowestHalf));
  uint32_t seen = 0, above = 0;  // two counts of 16 bits
#pragma unroll
  for (int slot = 0; slot < kMaximumSlots; ++slot) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const __half2 maximum = value(row, slot);
      seen += __hgt2_mask(maximum, lowest) & 0x00010001u;
      above += __hgt2_mask(maximum, bounds.screen[row]) & 0x00010001u;
    }
  }
  return {__reduce_add_sync(kFullWarp, (seen & 0xffff) + (seen >> 16)),
          __reduce_add_sync(kFullWarp, (above & 0xffff) + (above >> 16))};
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_BOUNDS_CUH_
