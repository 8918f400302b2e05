// Barriers, tensor copies and warp-group plumbing, on top of CuTe's wrappers.
#ifndef FLASH_ENTMAX_CUDA_PIPELINE_CUH_
#define FLASH_ENTMAX_CUDA_PIPELINE_CUH_

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "problem.h"

namespace flash_entmax::cuda {

constexpr int kWarpSize = 32;
constexpr int kWarpGroupThreads = 128;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr uint64_t kDefaultCachePolicy = 0x1000000000000000ull;  // evict-normal

// Position in a ring of `kStages` shared-memory stages with the parity of the pass over the ring.
template <int kStages>
struct RingPosition {
  int stage = 0;
  int parity = 0;

  __device__ __forceinline__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Head columns of one swizzled shared-memory box: 128-byte rows, 64-byte rows for head size 32.
template <int kHeadDim>
constexpr int kBoxColumns = kHeadDim < 64 ? kHeadDim : 64;

// Bytes of `kRows` rows of a tile, boxes one after the other.
template <int kHeadDim, int kRows>
constexpr int kTileBytes = kRows* kHeadDim * 2;

// Copies rows [row, row + kRows) of one head into `destination`; rows past the end become zero.
template <int kHeadDim, int kRows>
__device__ __forceinline__ void LoadTile(const CUtensorMap& map, uint64_t* barrier,
                                         void* destination, int row, int head, int batch) {
#pragma unroll
  for (int column = 0; column < kHeadDim; column += kBoxColumns<kHeadDim>) {
    cute::SM90_TMA_LOAD_4D::copy(&map, barrier, kDefaultCachePolicy,
                                 static_cast<char*>(destination) + column * kRows * 2, column, row,
                                 head, batch);
  }
}

// OR of a predicate over one warp group; also a barrier for it.
__device__ __forceinline__ bool WarpGroupAny(int barrier_id, int threads, bool predicate) {
  int result;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.s32 p, %3, 0;\nbar.red.or.pred q, %1, %2, p;\n"
      "selp.s32 %0, 1, 0, q;\n}"
      : "=r"(result)
      : "r"(barrier_id), "r"(threads), "r"(static_cast<int>(predicate))
      : "memory");
  // The broadcast tells the compiler that the branch on it is taken by whole warps.
  return __shfl_sync(kFullWarp, result, 0) != 0;
}

// Sum and maximum over the four lanes that share an accumulator row.
__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}

// Maximum that keeps NaN.
__device__ __forceinline__ float MaxKeepNan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Key tiles that some query of a unit sees.
__device__ __forceinline__ int UnitTiles(const Shape& shape, int unit, int tile_keys) {
  const int first_row = unit % shape.Units() * Shape::kUnitRows;
  const int last_row = min(first_row + Shape::kUnitRows, shape.queries) - 1;
  return (shape.VisibleKeys(last_row) + tile_keys - 1) / tile_keys;
}

// Who sent a unit to the tile path. The finish step skips what screening gave up, and only that, so
// that what it leaves behind does not depend on the order in which its blocks run.
enum UnitFlag { kListPath = 0, kFlaggedByScreening = 1, kFlaggedByFinish = 2 };

__device__ inline void FlagUnit(const SavedState& saved, Control* control, int unit,
                                UnitFlag flag) {
  if (atomicCAS(&saved.unit_flag[unit], kListPath, flag) == kListPath) {
    saved.flagged_units[atomicAdd(&control->flagged_count, 1)] = unit;
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_PIPELINE_CUH_
