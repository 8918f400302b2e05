// Tensor-copy descriptors of (batch, head, row, head_dim) tensors.
#ifndef FLASH_ENTMAX_CUDA_TENSOR_MAP_H_
#define FLASH_ENTMAX_CUDA_TENSOR_MAP_H_

#include <cuda.h>

#include "c_interface.h"

namespace flash_entmax::cuda {

struct TensorExtent {
  int head_dim, rows, heads, batch;
};

// Boxes of `box_rows` rows and min(head_dim, 64) columns, swizzled by their row size.
// Returns false when the driver refuses the tensor.
bool MakeTensorMap(const FlashEntmaxTensor& tensor, bool is_fp16, const TensorExtent& extent,
                   int box_rows, CUtensorMap* map);

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_TENSOR_MAP_H_
