#include "row_results.h"

namespace flash_entmax::cuda {
namespace {

constexpr int kSumThreads = 1024;

__global__ void __launch_bounds__(kSumThreads)
    SumRowsKernel(const float* rows, int batch, int heads, int queries, float* sums,
                  int64_t sums_stride) {
  __shared__ double warp_sum[kSumThreads / 32];
  const int head = blockIdx.x;
  double sum = 0;
  for (int b = 0; b < batch; ++b) {
    const float* const row = rows + (static_cast<int64_t>(b) * heads + head) * queries;
    for (int i = threadIdx.x; i < queries; i += kSumThreads) sum += static_cast<double>(row[i]);
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kSumThreads / 32; ++i) sum += warp_sum[i];
    sums[head * sums_stride] = static_cast<float>(sum);
  }
}

struct RowStrides {
  int64_t batch, head, row;
};

constexpr int kCopyThreads = 256;

unsigned CopyBlocks(int64_t total) {
  return static_cast<unsigned>((total + kCopyThreads - 1) / kCopyThreads);
}

__global__ void CopyRowFactorsKernel(const float* query_scale, RowStrides strides, int heads,
                                     int queries, int padded_queries, int64_t total,
                                     float* factor) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= total) return;
  const int64_t head = i / padded_queries, row = i % padded_queries;
  factor[i] = row < queries ? query_scale[head / heads * strides.batch +
                                          head % heads * strides.head + row * strides.row]
                            : 1.0f;
}

__global__ void CopyThresholdsKernel(const float* saved, int heads, int queries, int padded_queries,
                                     int64_t total, float* threshold, RowStrides strides) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= total) return;
  const int64_t head = i / queries, row = i % queries;
  const float tau = saved[head * padded_queries + row];
  threshold[head / heads * strides.batch + head % heads * strides.head + row * strides.row] =
      isinf(tau) ? nanf("") : tau;
}

}  // namespace

cudaError_t SumRowsOfHeads(const float* rows, int batch, int heads, int queries, float* sums,
                           int64_t sums_stride, cudaStream_t stream) {
  SumRowsKernel<<<heads, kSumThreads, 0, stream>>>(rows, batch, heads, queries, sums, sums_stride);
  return cudaGetLastError();
}

cudaError_t CopyRowFactors(const float* query_scale, const int64_t (&strides)[3], int batch,
                           int heads, int queries, int padded_queries, float* factor,
                           cudaStream_t stream) {
  const int64_t total = static_cast<int64_t>(batch) * heads * padded_queries;
  CopyRowFactorsKernel<<<CopyBlocks(total), kCopyThreads, 0, stream>>>(
      query_scale, {strides[0], strides[1], strides[2]}, heads, queries, padded_queries, total,
      factor);
  return cudaGetLastError();
}

cudaError_t CopyThresholds(const float* saved, int batch, int heads, int queries,
                           int padded_queries, float* threshold, const int64_t (&strides)[3],
                           cudaStream_t stream) {
  const int64_t total = static_cast<int64_t>(batch) * heads * queries;
  CopyThresholdsKernel<<<CopyBlocks(total), kCopyThreads, 0, stream>>>(
      saved, heads, queries, padded_queries, total, threshold,
      {strides[0], strides[1], strides[2]});
  return cudaGetLastError();
}

}  // namespace flash_entmax::cuda
