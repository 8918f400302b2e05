// Launches of the general kernels: one call forward, one backward. Compiled once for each element
// type and padded head size (forward_instance.cu, backward_instance.cu).
#ifndef FLASH_ENTMAX_CUDA_GENERAL_LAUNCH_H_
#define FLASH_ENTMAX_CUDA_GENERAL_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "general/problem.h"
#include "general/short_backward_plan.h"

namespace flash_entmax::cuda {

struct GeneralForward {
  GeneralProblem problem;
  StridedTensor query, key, value, output;
  GeneralSaved saved;               // threshold always, weighted_value may be null
  float* user_threshold = nullptr;  // optional [batch, heads, queries]: tau in z = (alpha - 1) s;
                                    // NaN for rows without keys
  int64_t user_threshold_stride[3] = {};
  // Workspace for the largest norm of each group of keys, BoundGroups::PerHead a key head; null:
  // no tile is skipped. Used by rows that are too long for the short kernels.
  float* key_norms = nullptr;
  // Compute what is proved zero too: the same result, for tests.
  bool visit_all = false;
};

// Optional results are null.
struct GeneralBackward {
  GeneralProblem problem;
  ShortBackwardPlan short_rows;
  StridedTensor query, key, value, output_gradient;
  StridedTensor query_gradient, key_gradient, value_gradient;
  GeneralSaved saved;
  // [batch, heads, queries], contiguous, fp32: the row's share of the gradient in alpha, in the
  // ALiBi slope, and the gradient in query_scale. The caller reduces the first two over rows.
  float* alpha_rows = nullptr;
  float* slope_rows = nullptr;
  float* query_scale_rows = nullptr;
  // Workspace as in the forward, and for the queries; all null or none.
  float* key_norms = nullptr;
  float* query_sizes = nullptr;        // largest |(alpha - 1) scale query_scale| |q|, each group
  float* lowest_thresholds = nullptr;  // -inf where nothing may be skipped
  bool visit_all = false;
};

// `multiprocessors`: of the current device. Errors of the launch are returned, nothing
// synchronises. kHeadDim: head_dim and value_dim rounded up to 32, 64, 128 or 256, the larger of
// the two.
template <class Element, int kHeadDim>
cudaError_t LaunchGeneralForward(const GeneralForward& call, int multiprocessors,
                                 cudaStream_t stream);
template <class Element, int kHeadDim>
cudaError_t LaunchGeneralBackward(const GeneralBackward& call, int multiprocessors,
                                  cudaStream_t stream);

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_LAUNCH_H_
