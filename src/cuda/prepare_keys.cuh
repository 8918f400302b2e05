// What screening needs of the keys, in one pass over them: the largest norm of each key/value head,
// which turns the certified error of a screening score into one number a query row, and for bf16 a
// copy in fp16 (exact but for values below 2^-14 in size; larger than fp16 become infinite, and
// their queries go to the tile path). NaN keys are ignored here; their scores are found by the
// screen.
#ifndef FLASH_ENTMAX_CUDA_PREPARE_KEYS_CUH_
#define FLASH_ENTMAX_CUDA_PREPARE_KEYS_CUH_

#include <cfloat>

#include "gather.cuh"

namespace flash_entmax::cuda {

constexpr int kPrepareKeysThreads = 256;
constexpr int kPrepareKeysRows = 256;  // keys of a block

// norm[batch * kv_heads] must be zero before the launch. `copy`: (batch * kv_heads) x keys x
// head_dim, null for fp16 keys.
template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kPrepareKeysThreads)
    PrepareKeysKernel(const __grid_constant__ Shape shape, const Tensor<const Element> key,
                      uint32_t* norm, __half* copy) {
  constexpr int kPart = kHeadDim / kLanesPerRow;
  constexpr int kRowsAtOnce = kPrepareKeysThreads / kLanesPerRow;
  const int kv = blockIdx.y;
  const Element* const head = key.Row(kv / shape.kv_heads, kv % shape.kv_heads, 0);
  const int lane = threadIdx.x % kLanesPerRow;
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kPrepareKeysRows; i += kRowsAtOnce) {
    const int row = blockIdx.x * kPrepareKeysRows + i + threadIdx.x / kLanesPerRow;
    float vector[kPart] = {};
    if (row < shape.keys) {
      LoadVector<Element, kPart>(head + row * key.strides.row + lane * kPart, vector);
      if (copy) {
        StoreVector<__half, kPart>(
            vector, 1.0f,
            copy + (static_cast<int64_t>(kv) * shape.keys + row) * kHeadDim + lane * kPart);
      }
    }
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kPart; ++j) sum = fmaf(vector[j], vector[j], sum);
    largest = fmaxf(largest, RowSum(sum));
  }
#pragma unroll
  for (int offset = 16; offset >= kLanesPerRow; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, offset));
  }
  __shared__ float warp_largest[kPrepareKeysThreads / kWarpSize];
  if (threadIdx.x % kWarpSize == 0) warp_largest[threadIdx.x / kWarpSize] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kPrepareKeysThreads / kWarpSize; ++i) {
      largest = fmaxf(largest, warp_largest[i]);
    }
    // Rounded up; positive floats order like their bits.
    atomicMax(norm + kv, __float_as_uint(fminf(sqrtf(largest) * 1.0001f, FLT_MAX)));
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_PREPARE_KEYS_CUH_
