// Where rows of the list path keep their supports for the backward.
//
// Every unit of 128 queries has a part of the pool of its own. What does not fit there goes to a
// part that all units share. Whether a warp finds room depends on the order in which warps arrive;
// what becomes of a unit must not, or results would differ from run to run in their last digits.
// So the support of wide units, those with more entries than their own part holds, is counted as a
// whole. If all of it would fit in the shared part, then everything did, whatever the order.
// Otherwise every wide unit goes to the tile path; the last warp of the forward sends them there.
#ifndef FLASH_ENTMAX_CUDA_SUPPORT_POOL_CUH_
#define FLASH_ENTMAX_CUDA_SUPPORT_POOL_CUH_

#include "pipeline.cuh"

namespace flash_entmax::cuda {

// First of `entries` places for rows of a unit. Places at or past the pool's capacity do not exist.
__device__ __forceinline__ int64_t ReserveSupport(const SavedState& saved, Control* control,
                                                  int unit, int entries) {
  const int before = atomicAdd(&saved.unit_support[unit], entries);
  const int own = saved.unit_capacity;
  if (before + entries <= own) return static_cast<int64_t>(unit) * own + before;
  const int wide = before <= own ? before + entries : entries;
  atomicAdd(&control->wide_support, static_cast<unsigned long long>(wide));
  return saved.shared_first + static_cast<int64_t>(atomicAdd(
                                  &control->shared_used, static_cast<unsigned long long>(entries)));
}

// Whether wide units went to the tile path. Known when the forward is done.
__device__ __forceinline__ bool PoolOverflowed(const SavedState& saved, const Control* control) {
  return __ldcg(&control->wide_support) >
         static_cast<unsigned long long>(saved.support_capacity - saved.shared_first);
}

// Called by every warp of the forward when it has reserved all it needs. `warps`: their number.
__device__ __forceinline__ void ClosePool(const SavedState& saved, Control* control, int warps,
                                          int units) {
  const int lane = threadIdx.x % kWarpSize;
  int before = 0;
  __syncwarp();
  if (lane == 0) {
    __threadfence();
    before = atomicAdd(&control->closed_warps, 1);
    __threadfence();
  }
  if (__shfl_sync(kFullWarp, before, 0) != warps - 1) return;
  if (!PoolOverflowed(saved, control)) return;
  for (int unit = lane; unit < units; unit += kWarpSize) {
    if (__ldcg(&saved.unit_support[unit]) > saved.unit_capacity) {
      FlagUnit(saved, control, unit, kFlaggedByFinish);
    }
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_SUPPORT_POOL_CUH_
