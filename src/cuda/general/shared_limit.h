#ifndef FLASH_ENTMAX_CUDA_GENERAL_SHARED_LIMIT_H_
#define FLASH_ENTMAX_CUDA_GENERAL_SHARED_LIMIT_H_

#include <cuda_runtime_api.h>

#include <mutex>

namespace flash_entmax::cuda {

// Lets launches of a kernel have `bytes` of dynamic shared memory. The limit belongs to the kernel,
// not to a launch, so it is only ever raised: another thread may be about to launch with more.
template <class Kernel>
cudaError_t AllowShared(Kernel* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;  // what every kernel may have
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  const auto wanted = static_cast<int>(bytes);
  if (error != cudaSuccess || attributes.maxDynamicSharedSizeBytes >= wanted) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, wanted);
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_SHARED_LIMIT_H_
