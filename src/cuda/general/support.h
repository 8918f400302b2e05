// The support in compressed rows, from thresholds that a forward pass wrote.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_SUPPORT_H_
#define FLASH_ENTMAX_CUDA_GENERAL_SUPPORT_H_

#include <cuda_runtime_api.h>

#include "flash_entmax/tensor.h"
#include "general/problem.h"

namespace flash_entmax::cuda {

struct SupportCall {
  GeneralProblem problem;
  StridedTensor query, key;
  const float* threshold = nullptr;  // tau in z; NaN: the row has no support
  int64_t threshold_stride[3] = {};  // batch, head, row
};

int64_t SupportOffsetsBytes(int64_t rows);

// row_offsets: [rows + 1], exclusive sums of the rows' counts; rows = batch * heads * queries.
cudaError_t LaunchSupportOffsets(const SupportCall& call, DType dtype, int64_t* row_offsets,
                                 void* workspace, int64_t workspace_bytes, cudaStream_t stream);

// Entries past `capacity` are left out. Keys ascend within a row.
cudaError_t LaunchSupportEntries(const SupportCall& call, DType dtype, const int64_t* row_offsets,
                                 int* key_index, float* probability, int64_t capacity,
                                 cudaStream_t stream);

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_SUPPORT_H_
