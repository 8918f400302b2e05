// Tiles proved zero before the product (fact F3 of DESIGN.md).
//
// For a head with an ALiBi slope m > 0, every z of a pair of tiles is at most
//
//   U = cap'(|f| |q| |k|) - (alpha - 1) m distance,   f = (alpha - 1) scale query_scale,
//
// with the largest |f| |q| of the queries, the largest |k| of the keys, the smallest distance of a
// pair and cap' the cap at (alpha - 1) softcap. U <= a lower bound of every query's threshold: all
// weights of the pair of tiles are zero, also as the kernels round them, and leaving it out changes
// no bit of the result:
//   - a dot product of up to 256 columns is off by less than 2^-11 |q| |k|, however the tensor
//     cores add (products of 16-bit numbers are exact; sums of 256 terms that are cut off instead
//     of rounded lose less than 2^-14, the three TF32 products 2^-20 more), a norm by less than
//     2^-14. Norms of keys are taken 2^-9 larger, which covers all of it;
//   - the rounding of the products in f and with it is covered by this too; tanh, which may err by
//     a few units in the last place, gets 2^-13 more;
//   - the slope's step is that of ToZ, which rises with the score and falls with the distance; the
//     distance is taken 2^-22 smaller, since those of 2^24 and more are rounded there.
// A norm that is not finite makes U infinite or NaN, and the tile is visited: a NaN or an infinity
// in a key reaches every row that sees it.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_TILE_BOUNDS_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_TILE_BOUNDS_CUH_

#include <climits>

#include "general/score.cuh"

namespace flash_entmax::cuda {

// An upper bound of a norm from its square; NaN becomes infinite. Squares below the smallest number
// are lost: they add up to less than 2^-58 in the norm. `slack`: what else to allow for.
__device__ __forceinline__ float NormBound(float squares, float slack) {
  const float norm = fmaf(sqrtf(squares), slack, 0x1p-58f);
  return norm < INFINITY ? norm : INFINITY;
}
constexpr float kKeyNormSlack = 1.0f + 0x1p-9f;
constexpr float kQueryNormSlack = 1.0f;

// Bounds the scores of one head.
struct ScoreBound {
  float order;
  float softcap;
  float slope;

  static __device__ __forceinline__ ScoreBound Of(const GeneralProblem& problem, float order,
                                                  int head) {
    return {order, problem.softcap, SlopeOf(problem, head)};
  }
  // Without a slope norms alone prove next to nothing; a negative one lifts far keys.
  __device__ __forceinline__ bool Skips() const { return slope > 0.0f; }

  // U of the comment above; query_size: |f| |q|. Not a number, or infinite, if nothing can be said.
  __device__ __forceinline__ float Largest(float query_size, float key_norm, int distance) const {
    float s = __fmul_ru(query_size, key_norm);
    if (!(s < INFINITY)) return INFINITY;  // before the cap makes it finite
    if (softcap > 0.0f) s = (1.0f + 0x1p-13f) * Capped(order * softcap, s);
    const float least = __fmul_rd(static_cast<float>(distance), 1.0f - 0x1p-22f);
    return fmaf(-order * slope, least, s);
  }
};

// The smallest distance of positions in [first, last] and [other_first, other_last].
__device__ __forceinline__ int SmallestDistance(int first, int last, int other_first,
                                                int other_last) {
  return max(0, max(first - other_last, other_first - last));
}

// The largest number of the groups that rows [first, last] of a sequence lie in; at most a few.
__device__ __forceinline__ float LargestOfGroups(const float* groups, int first, int last) {
  float largest = 0.0f;
  for (int group = first / BoundGroups::kRows; group <= last / BoundGroups::kRows; ++group) {
    largest = fmaxf(largest, groups[group]);
  }
  return largest;
}
__device__ __forceinline__ float SmallestOfGroups(const float* groups, int first, int last) {
  float smallest = INFINITY;
  for (int group = first / BoundGroups::kRows; group <= last / BoundGroups::kRows; ++group) {
    smallest = fminf(smallest, groups[group]);
  }
  return smallest;
}

// Marks of tiles in shared memory: bit tile >> shift says whether any of 2^shift neighbouring tiles
// has to be visited.
//
// The first tile from `tile` on that is marked, below `end`; `end` if there is none.
__device__ __forceinline__ int FindMark(const uint32_t* marks, int shift, int tile, int end) {
  while (tile < end) {
    int mark = tile >> shift;
    const uint32_t word = marks[mark / 32] >> (mark % 32);
    if (word & 1) return tile;
    mark = word != 0 ? mark + __ffs(word) - 1 : (mark / 32 + 1) * 32;
    tile = mark << shift;
  }
  return end;
}

// The shift with which `count` tiles fit in `marks` bits.
__device__ __forceinline__ int ShiftOfMarks(int count, int marks) {
  int shift = 0;
  while (count >> shift > marks - 1) ++shift;
  return shift;
}

// From the first marked tile to after the last one. In shared memory while it is found.
struct MarkedRange {
  int begin;
  int end;

  __device__ __forceinline__ void Clear() {
    begin = INT_MAX;
    end = 0;
  }
};

// Marks the tiles of [0, count), count > 0, for which possible(tile). All threads of the block call
// it, after a barrier that follows the last use of the marks and the call of range->Clear(); the
// result is there after the barrier with which this ends.
template <class Possible>
__device__ __forceinline__ MarkedRange MarkTiles(uint32_t* marks, MarkedRange* range, int count,
                                                 int shift, Possible possible) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  const int words = ((count - 1) >> shift) / 32 + 1;
#pragma unroll 1
  for (int word = static_cast<int>(threadIdx.x) / 32; word < words; word += warps) {
    const int first = (32 * word + lane) << shift;
    bool any = false;
#pragma unroll 1
    for (int tile = first; tile < min(count, first + (1 << shift)); ++tile) any |= possible(tile);
    const uint32_t bits = __ballot_sync(0xffffffffu, any);
    if (lane == 0) {
      marks[word] = bits;
      if (bits != 0) {
        atomicMin(&range->begin, (32 * word + __ffs(bits) - 1) << shift);
        atomicMax(&range->end, min(count, (32 * word + 32 - __clz(bits)) << shift));
      }
    }
  }
  __syncthreads();
  return {min(range->begin, count), range->end};
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_TILE_BOUNDS_CUH_
