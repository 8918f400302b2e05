// Small kernels around the engines: one number a row.
#ifndef FLASH_ENTMAX_CUDA_ROW_RESULTS_H_
#define FLASH_ENTMAX_CUDA_ROW_RESULTS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flash_entmax::cuda {

// sums[h] = total of rows[b][h][i] over b and i; rows is (batch, heads, queries), contiguous. The
// order of the sum is fixed.
cudaError_t SumRowsOfHeads(const float* rows, int batch, int heads, int queries, float* sums,
                           int64_t sums_stride, cudaStream_t stream);

// factor[b * heads + h][i] = query_scale[b][h][i], rows of `padded_queries`; 1 past the last query.
cudaError_t CopyRowFactors(const float* query_scale, const int64_t (&strides)[3], int batch,
                           int heads, int queries, int padded_queries, float* factor,
                           cudaStream_t stream);

// threshold[b][h][i] = saved[b * heads + h][i], rows of `padded_queries`; +inf (no key) becomes
// NaN.
cudaError_t CopyThresholds(const float* saved, int batch, int heads, int queries,
                           int padded_queries, float* threshold, const int64_t (&strides)[3],
                           cudaStream_t stream);

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_ROW_RESULTS_H_
