// An attention problem on device memory after its checks: what the engines of this folder share.
#ifndef FLASH_ENTMAX_CUDA_ATTENTION_CALL_H_
#define FLASH_ENTMAX_CUDA_ATTENTION_CALL_H_

#include <cuda_runtime_api.h>

#include <string>

#include "flash_entmax/gpu.h"
#include "general/problem.h"

namespace flash_entmax::cuda {

struct DeviceInfo {
  int major = 0;
  int minor = 0;
  int multiprocessors = 0;
};

// The current device, if it can run any kernel of this library.
Expected<DeviceInfo> FindDevice();

// Ok, or the failure in words. `action` says what was being done.
Status FromCuda(cudaError_t error, const std::string& action);

struct AttentionCall {
  GeneralProblem problem;
  DType dtype = DType::kBFloat16;
  StridedTensor query, key, value;
  cudaStream_t stream = nullptr;
  bool save = false;
  bool alpha_gradient = false;
  int64_t support_capacity = -1;
  bool visit_all_tiles = false;

  int64_t Rows() const {
    return static_cast<int64_t>(problem.batch) * problem.heads * problem.queries;
  }
  // No output element and no gradient of a query exists.
  bool Empty() const { return Rows() == 0; }
};

// Everything that can be checked without a device.
Expected<AttentionCall> ResolveCall(const AttentionProblem& problem,
                                    const gpu::AttentionOptions& options);

StridedTensor ToStrided(const TensorView& tensor);

// Hands out pieces of a buffer at multiples of 256 bytes; with a null base only their sizes count.
class BufferPieces {
 public:
  explicit BufferPieces(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* Take(int64_t count) {
    char* const piece = base_ == nullptr ? nullptr : base_ + bytes_;
    constexpr int64_t kAlignment = 256;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(piece);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_ATTENTION_CALL_H_
