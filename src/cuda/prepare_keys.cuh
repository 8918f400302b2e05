// What screening needs of the keys, in one pass over them.
//
// Norms: for every eighth of the head dimension, the largest norm over a head's keys of the part of
// the key up to there. They turn the certified error of a screening score into one number a query
// row (screen_forward.cuh). A key that fp16 cannot hold (infinite, NaN, or too large) makes the
// norms of its head infinite: its queries go to the tile path.
// Copy (bf16 only): the keys in fp16, exact but for values below 2^-14 in size.
// Traffic: keys read once, the copy written once.
#ifndef FLASH_ENTMAX_CUDA_PREPARE_KEYS_CUH_
#define FLASH_ENTMAX_CUDA_PREPARE_KEYS_CUH_

#include "gather.cuh"
#include "launch_order.cuh"

namespace flash_entmax::cuda {

constexpr int kPrepareKeysThreads = 256;
constexpr int kPrepareKeysRows = 256;  // keys of a block

// norms[(batch * kv_heads) x kKeyNorms] must be zero before the launch; float bits. `copy`: (batch
// * kv_heads) x keys x head_dim, null for fp16 keys. Block b takes part b % blocks_per_head of head
// b / blocks_per_head.
template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kPrepareKeysThreads)
    PrepareKeysKernel(const __grid_constant__ Shape shape, const Tensor<const Element> key,
                      int blocks_per_head, uint32_t* norms, __half* copy) {
  WaitForEarlierKernels();
  constexpr int kPart = kHeadDim / kLanesPerRow;
  constexpr int kRowsAtOnce = kPrepareKeysThreads / kLanesPerRow;
  constexpr int kWarps = kPrepareKeysThreads / kWarpSize;
  constexpr float kLargestHalf = 65504.0f;
  static_assert(kKeyNorms == kLanesPerRow, "a lane finds one prefix norm");
  const int kv = blockIdx.x / blocks_per_head;
  const int first_row = blockIdx.x % blocks_per_head * kPrepareKeysRows;
  const Element* const head = key.Row(kv / shape.kv_heads, kv % shape.kv_heads, 0);
  const int lane = threadIdx.x % kLanesPerRow;
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kPrepareKeysRows; i += kRowsAtOnce) {
    const int row = first_row + i + threadIdx.x / kLanesPerRow;
    float vector[kPart] = {};
    if (row < shape.keys) {
      LoadVector<Element, kPart>(head + row * key.strides.row + lane * kPart, vector);
      if (copy) {
        StoreVector<__half, kPart>(
            vector, 1.0f,
            copy + (static_cast<int64_t>(kv) * shape.keys + row) * kHeadDim + lane * kPart);
      }
    }
    float square = 0;
    bool representable = true;
#pragma unroll
    for (int j = 0; j < kPart; ++j) {
      square = fmaf(vector[j], vector[j], square);
      representable &= fabsf(vector[j]) <= kLargestHalf;
    }
    if (!representable) square = INFINITY;
#pragma unroll
    for (int offset = 1; offset < kLanesPerRow; offset *= 2) {
      const float lower = __shfl_up_sync(kFullWarp, square, offset, kLanesPerRow);
      if (lane >= offset) square += lower;
    }
    largest = fmaxf(largest, square);
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset >= kLanesPerRow; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, offset));
  }
  __shared__ float warp_largest[kWarps][kLanesPerRow];
  if (threadIdx.x % kWarpSize < kLanesPerRow) {
    warp_largest[threadIdx.x / kWarpSize][lane] = largest;
  }
  __syncthreads();
  if (threadIdx.x < kLanesPerRow) {
    for (int i = 0; i < kWarps; ++i) largest = fmaxf(largest, warp_largest[i][lane]);
    // Rounded up; positive floats order like their bits.
    atomicMax(norms + static_cast<int64_t>(kv) * kKeyNorms + lane,
              __float_as_uint(sqrtf(largest) * 1.0001f));
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_PREPARE_KEYS_CUH_
