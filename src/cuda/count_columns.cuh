// Places of the support entries among those of their keys, given out again after the pool has
// overflowed: then some entries of units that went to the tile path were counted, and which ones
// depended on the order of blocks. Sums over a key's entries are grouped by their number, so that
// it must not. Without an overflow both kernels do nothing. Traffic: 4 bytes read, 4 bytes written
// and an atomic addition in the level-2 cache an entry.
#ifndef FLASH_ENTMAX_CUDA_COUNT_COLUMNS_CUH_
#define FLASH_ENTMAX_CUDA_COUNT_COLUMNS_CUH_

#include "gather.cuh"
#include "launch_order.cuh"
#include "support_pool.cuh"

namespace flash_entmax::cuda {

constexpr int kCountColumnsThreads = 256;

static __global__ void __launch_bounds__(kCountColumnsThreads)
    ClearColumnsKernel(const __grid_constant__ SavedState saved, const Control* control,
                       int64_t columns) {
  WaitForEarlierKernels();
  if (!PoolOverflowed(saved, control)) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kCountColumnsThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kCountColumnsThreads + threadIdx.x;
       i < columns; i += step) {
    saved.column_count[i] = 0;
  }
}

// Eight lanes take the entries of a row.
static __global__ void __launch_bounds__(kCountColumnsThreads)
    CountColumnsKernel(const __grid_constant__ Shape shape,
                       const __grid_constant__ SavedState saved, const Control* control) {
  WaitForEarlierKernels();
  if (!PoolOverflowed(saved, control)) return;
  constexpr int kRows = kCountColumnsThreads / kLanesPerRow;  // of a block at a time
  const int lane = threadIdx.x % kLanesPerRow;
  const int64_t rows = static_cast<int64_t>(shape.BatchHeads()) * shape.padded_queries;
  for (int64_t padded_row =
           static_cast<int64_t>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x) / kLanesPerRow;
       padded_row < rows; padded_row += static_cast<int64_t>(gridDim.x) * kRows) {
    const int head = static_cast<int>(padded_row / shape.padded_queries);
    const int row = static_cast<int>(padded_row % shape.padded_queries);
    if (row >= shape.queries ||
        saved.unit_flag[head * shape.Units() + row / Shape::kUnitRows] != kListPath) {
      continue;
    }
    const int kv_head = head / shape.heads * shape.kv_heads + head % shape.heads / shape.group;
    int* const counts = saved.column_count + static_cast<int64_t>(kv_head) * shape.keys;
    const int count = saved.support_count[padded_row];
    const int64_t offset = saved.support_offset[padded_row];
    for (int i = lane; i < count; i += kLanesPerRow) {
      saved.support_slot[offset + i] = atomicAdd(&counts[saved.support_key[offset + i]], 1);
    }
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_COUNT_COLUMNS_CUH_
