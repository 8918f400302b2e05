// First step of the backward's transposition: how many support entries every key has, and the place
// of each entry among those of its key. Units on the tile path have none. The places depend on the
// order of the atomic additions; what reads the entries sorts them first.
// Traffic: 4 bytes read, 4 bytes written and an atomic addition in the level-2 cache an entry.
#ifndef FLASH_ENTMAX_CUDA_COUNT_COLUMNS_CUH_
#define FLASH_ENTMAX_CUDA_COUNT_COLUMNS_CUH_

#include "gather.cuh"
#include "pipeline.cuh"

namespace flash_entmax::cuda {

constexpr int kCountColumnsThreads = 128;
constexpr int kCountColumnsRows = kCountColumnsThreads / kLanesPerRow;  // of a block

// column_count: (batch * kv_heads) x keys, zero before; slot: pool.
static __global__ void __launch_bounds__(kCountColumnsThreads)
    CountColumnsKernel(const __grid_constant__ Shape shape,
                       const __grid_constant__ SavedState saved, int* column_count, int* slot) {
  const int64_t padded_row = static_cast<int64_t>(blockIdx.x) * kCountColumnsRows +
                             static_cast<int>(threadIdx.x) / kLanesPerRow;
  const int lane = threadIdx.x % kLanesPerRow;
  const int head = static_cast<int>(padded_row / shape.padded_queries);
  const int row = static_cast<int>(padded_row % shape.padded_queries);
  if (row >= shape.queries ||
      saved.unit_flag[head * shape.Units() + row / Shape::kUnitRows] != kListPath) {
    return;
  }
  const int kv_head = head / shape.heads * shape.kv_heads + head % shape.heads / shape.group;
  int* const counts = column_count + static_cast<int64_t>(kv_head) * shape.keys;
  const int count = saved.support_count[padded_row];
  const int64_t offset = saved.support_offset[padded_row];
  for (int i = lane; i < count; i += kLanesPerRow) {
    slot[offset + i] = atomicAdd(&counts[saved.support_key[offset + i]], 1);
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_COUNT_COLUMNS_CUH_
