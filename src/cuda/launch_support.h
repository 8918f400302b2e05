// Small helpers shared by the launch sequences.
#ifndef FLASH_ENTMAX_CUDA_LAUNCH_SUPPORT_H_
#define FLASH_ENTMAX_CUDA_LAUNCH_SUPPORT_H_

#include <algorithm>
#include <type_traits>

#include "launch.h"
#include "tensor_map.h"

namespace flash_entmax::cuda {

template <class Element>
Tensor<Element> AsTensor(const FlashEntmaxTensor& tensor) {
  return {static_cast<Element*>(tensor.data),
          {tensor.stride[0], tensor.stride[1], tensor.stride[2]}};
}

// Calls `body` with the alpha mode as a compile-time constant.
template <class Body>
int ForAlphaMode(AlphaMode mode, Body body) {
  switch (mode) {
    case AlphaMode::kOneAndHalf:
      return body(std::integral_constant<AlphaMode, AlphaMode::kOneAndHalf>());
    case AlphaMode::kTwo:
      return body(std::integral_constant<AlphaMode, AlphaMode::kTwo>());
    default:
      return body(std::integral_constant<AlphaMode, AlphaMode::kGeneral>());
  }
}

// Launches with `shared_bytes` of dynamic shared memory; arguments must match the kernel's. The
// kernel must begin with WaitForEarlierKernels (launch_order.cuh).
template <class... Parameters, class... Arguments>
bool Launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shared_bytes)) != cudaSuccess) {
    return false;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...) == cudaSuccess;
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Element>
inline constexpr bool kIsFp16 = std::is_same_v<Element, __half>;

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_LAUNCH_SUPPORT_H_
