// Gathers over a short list of keys: four rows a warp, eight lanes a row.
//
// A lane owns head_dim / 8 dimensions of its row. Sums over a list therefore need no exchange at
// all; dot products are taken eight list entries at a time, and a transposing reduction (7 shuffles
// for 8 entries) leaves the product of entry i in lane i.
#ifndef FLASH_ENTMAX_CUDA_GATHER_CUH_
#define FLASH_ENTMAX_CUDA_GATHER_CUH_

#include "element.cuh"
#include "pipeline.cuh"

namespace flash_entmax::cuda {

constexpr int kLanesPerRow = 8;
constexpr int kRowsPerWarp = kWarpSize / kLanesPerRow;
// Padding, in words, that puts the lists of a warp's four rows into different banks.
constexpr int kListPadding = 8;

// Reduction over the eight lanes of a row.
__device__ __forceinline__ float RowSum(float x) {
#pragma unroll
  for (int offset = 4; offset; offset >>= 1) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

__device__ __forceinline__ float RowMax(float x) {
#pragma unroll
  for (int offset = 4; offset; offset >>= 1) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  }
  return x;
}

// sum[i] of the eight lanes -> the total of sum[lane] in every lane.
__device__ __forceinline__ float TransposeReduce(float (&sum)[8], int lane) {
#pragma unroll
  for (int width = 4; width; width >>= 1) {
    const bool upper = lane & width;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float send = upper ? sum[i] : sum[i + width];
      const float keep = upper ? sum[i + width] : sum[i];
      sum[i] = keep + __shfl_xor_sync(kFullWarp, send, width);
    }
  }
  return sum[0];
}

// Rows of one head, addressed by 32-bit row numbers and a row size in bytes below 4 GiB.
struct RowBase {
  const char* data;
  uint32_t row_bytes;

  template <class Element>
  static __device__ __forceinline__ RowBase Of(const Tensor<const Element>& tensor, int batch,
                                               int head, int lane, int part) {
    return {reinterpret_cast<const char*>(tensor.Row(batch, head, 0) + lane * part),
            static_cast<uint32_t>(tensor.strides.row * 2)};
  }
  __device__ __forceinline__ const char* Row(int row) const {
    return data + static_cast<uint64_t>(static_cast<uint32_t>(row)) * row_bytes;
  }
};

// Dot products of `vector` with rows key[first + i], i < 8; lane i gets the i-th. Past the end of
// the list the last entry is taken again and the caller drops the result; key[0] must be a valid
// row even if the list is empty.
template <class Element, int kHeadDim>
__device__ __forceinline__ float GatherDots(const RowBase& base, const int* key, int first,
                                            int count, const float (&vector)[kHeadDim / 8],
                                            int lane) {
  constexpr int kPart = kHeadDim / kLanesPerRow;
  Chunk<kPart> chunk[8];
  const int last = max(count - 1, 0);
#pragma unroll
  for (int i = 0; i < 8; ++i) chunk[i].Load(base.Row(key[min(first + i, last)]));
  float sum[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = Dot<Element, kPart>(chunk[i], vector);
  return TransposeReduce(sum, lane);
}

// sum += weight[i] * row key[i] over the list, several rows in flight.
template <class Element, int kHeadDim>
__device__ __forceinline__ void GatherAccumulate(const RowBase& base, const int* key,
                                                 const float* weight, int count,
                                                 float (&sum)[kHeadDim / 8]) {
  constexpr int kPart = kHeadDim / kLanesPerRow;
  constexpr int kInFlight = kHeadDim <= 64 ? 8 : 4;
#pragma unroll 1
  for (int first = 0; first < count; first += kInFlight) {
    Chunk<kPart> chunk[kInFlight];
    float w[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int place = min(first + i, count - 1);
      chunk[i].Load(base.Row(key[place]));
      w[i] = first + i < count ? weight[place] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) Accumulate<Element, kPart>(w[i], chunk[i], sum);
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GATHER_CUH_
