// The numbers behind tile_bounds.cuh, one for each group of 64 rows: norms of keys; for the
// backward also sizes of queries and their lowest thresholds.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_PREPARE_BOUNDS_H_
#define FLASH_ENTMAX_CUDA_GENERAL_PREPARE_BOUNDS_H_

#include <cuda_runtime_api.h>

#include "general/problem.h"

namespace flash_entmax::cuda {

struct PrepareBounds {
  GeneralProblem problem;
  StridedTensor key;
  float* key_norms = nullptr;
  // Only for the backward; otherwise null.
  StridedTensor query;
  const float* threshold = nullptr;  // GeneralSaved::threshold
  float* query_sizes = nullptr;
  float* lowest_thresholds = nullptr;
};

// Element: __nv_bfloat16, __half, float.
template <class Element>
cudaError_t LaunchPrepareBounds(const PrepareBounds& call, cudaStream_t stream);

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_PREPARE_BOUNDS_H_
