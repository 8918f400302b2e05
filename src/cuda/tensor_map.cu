#include <cuda_runtime.h>

#include <algorithm>

#include "tensor_map.h"

namespace flash_entmax::cuda {
namespace {

using EncodeFunction = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, found through the runtime so that nothing links against libcuda.
EncodeFunction FindEncoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                       cudaEnableDefault, &result) != cudaSuccess ||
      result != cudaDriverEntryPointSuccess) {
    return nullptr;
  }
  return reinterpret_cast<EncodeFunction>(function);
}

}  // namespace

bool MakeTensorMap(const FlashEntmaxTensor& tensor, bool is_fp16, const TensorExtent& extent,
                   int box_rows, CUtensorMap* map) {
  static const EncodeFunction encode = FindEncoder();
  if (encode == nullptr) return false;
  const cuuint64_t sizes[4] = {
      static_cast<cuuint64_t>(extent.head_dim), static_cast<cuuint64_t>(extent.rows),
      static_cast<cuuint64_t>(extent.heads), static_cast<cuuint64_t>(extent.batch)};
  // The stride of a dimension of size 1 is never used, but it must look valid.
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(extent.head_dim) * 2;
  const auto bytes = [&](int64_t stride, int size) {
    return size > 1 ? static_cast<cuuint64_t>(stride) * 2 : row_bytes;
  };
  const cuuint64_t strides[3] = {bytes(tensor.stride[2], extent.rows),
                                 bytes(tensor.stride[1], extent.heads),
                                 bytes(tensor.stride[0], extent.batch)};
  const int columns = std::min(extent.head_dim, 64);
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(box_rows), 1,
                             1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const auto make = [&] {
    return encode(map, is_fp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                  4, tensor.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  };
  if (make()) return true;
  // The driver refuses where no context is current yet, as in a thread whose first call this is.
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess && make();
}

}  // namespace flash_entmax::cuda
