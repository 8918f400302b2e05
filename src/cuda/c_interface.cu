#include <initializer_list>
#include <type_traits>

#include "c_interface.h"
#include "launch.h"

namespace flash_entmax::cuda {
namespace {

template <class Body>
int ForElementAndHeadDim(const FlashEntmaxProblem& problem, Body body) {
  const auto for_head_dim = [&](auto element) {
    using Element = decltype(element);
    switch (problem.head_dim) {
      case 32:
        return body(Element(), std::integral_constant<int, 32>());
      case 64:
        return body(Element(), std::integral_constant<int, 64>());
      default:
        return body(Element(), std::integral_constant<int, 128>());
    }
  };
  return problem.element == 0 ? for_head_dim(__nv_bfloat16()) : for_head_dim(__half());
}

// Returns an error code. Strides of dimensions of size 1 are never used.
int CheckTensor(const FlashEntmaxTensor& tensor, int batch, int heads, int rows) {
  constexpr int64_t kElementBytes = 2;
  constexpr int64_t kLargestStride = (int64_t{1} << 40) / kElementBytes;
  constexpr int64_t kLargestRowStride = (int64_t{1} << 32) / kElementBytes;
  if (reinterpret_cast<uintptr_t>(tensor.data) % 16 != 0) return FLASH_ENTMAX_BAD_ALIGNMENT;
  const int sizes[3] = {batch, heads, rows};
  for (int i = 0; i < 3; ++i) {
    if (sizes[i] == 1) continue;
    if (tensor.stride[i] <= 0 ||
        tensor.stride[i] >= (i == 2 ? kLargestRowStride : kLargestStride)) {
      return FLASH_ENTMAX_BAD_STRIDE;
    }
    if (tensor.stride[i] % 8 != 0) return FLASH_ENTMAX_BAD_ALIGNMENT;
  }
  return FLASH_ENTMAX_OK;
}

int CheckTensors(int batch, int heads, int rows,
                 std::initializer_list<const FlashEntmaxTensor*> tensors) {
  for (const FlashEntmaxTensor* tensor : tensors) {
    const int error = CheckTensor(*tensor, batch, heads, rows);
    if (error != FLASH_ENTMAX_OK) return error;
  }
  return FLASH_ENTMAX_OK;
}

int CheckQueries(const FlashEntmaxProblem& problem,
                 std::initializer_list<const FlashEntmaxTensor*> tensors) {
  return CheckTensors(problem.batch, problem.heads, problem.queries, tensors);
}

int CheckKeys(const FlashEntmaxProblem& problem,
              std::initializer_list<const FlashEntmaxTensor*> tensors) {
  return CheckTensors(problem.batch, problem.kv_heads, problem.keys, tensors);
}

int FindDevice(DeviceLimits* device) {
  int index = 0, major = 0, minor = 0;
  if (cudaGetDevice(&index) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) != cudaSuccess ||
      cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index) !=
          cudaSuccess) {
    return FLASH_ENTMAX_CUDA_FAILURE;
  }
  return major == 9 && minor == 0 ? FLASH_ENTMAX_OK : FLASH_ENTMAX_BAD_DEVICE;
}

}  // namespace
}  // namespace flash_entmax::cuda

using flash_entmax::cuda::Plan;

extern "C" {

int flash_entmax_cuda_plan(const FlashEntmaxProblem* problem, FlashEntmaxPlan* result) {
  Plan plan;
  if (const int error = flash_entmax::cuda::MakePlan(*problem, &plan)) return error;
  size_t forward = 0, backward = 0;
  plan.Forward(nullptr, &forward);
  if (plan.save) plan.Backward(nullptr, &backward);
  result->saved_bytes = static_cast<int64_t>(plan.Saved(nullptr).bytes);
  result->forward_bytes = static_cast<int64_t>(forward);
  result->backward_bytes = static_cast<int64_t>(backward);
  return FLASH_ENTMAX_OK;
}

int flash_entmax_cuda_saved_layout(const FlashEntmaxProblem* problem,
                                   FlashEntmaxSavedLayout* layout) {
  Plan plan;
  if (const int error = flash_entmax::cuda::MakePlan(*problem, &plan)) return error;
  const auto saved = plan.Saved(nullptr);
  const auto offset = [](const void* p) { return reinterpret_cast<int64_t>(p); };
  layout->threshold = offset(saved.state.threshold);
  layout->support_offset = offset(saved.state.support_offset);
  layout->support_count = offset(saved.state.support_count);
  layout->support_key = offset(saved.state.support_key);
  layout->support_excess = offset(saved.state.support_excess);
  layout->unit_flag = offset(saved.state.unit_flag);
  layout->padded_queries = plan.shape.padded_queries;
  layout->unit_rows = flash_entmax::cuda::Shape::kUnitRows;
  return FLASH_ENTMAX_OK;
}

int flash_entmax_cuda_forward(const FlashEntmaxProblem* problem,
                              const FlashEntmaxForwardTensors* tensors, void* saved,
                              int64_t saved_bytes, void* workspace, int64_t workspace_bytes,
                              void* stream) {
  namespace fe = flash_entmax::cuda;
  Plan plan;
  fe::DeviceLimits device;
  if (const int error = fe::MakePlan(*problem, &plan)) return error;
  if (const int error = fe::FindDevice(&device)) return error;
  if (const int error = fe::CheckQueries(*problem, {&tensors->query, &tensors->output})) {
    return error;
  }
  if (const int error = fe::CheckKeys(*problem, {&tensors->key, &tensors->value})) return error;
  const fe::SavedBuffers buffers = plan.Saved(saved);
  size_t bytes = 0;
  const fe::ForwardScratch scratch = plan.Forward(workspace, &bytes);
  if (static_cast<int64_t>(buffers.bytes) > saved_bytes ||
      static_cast<int64_t>(bytes) > workspace_bytes) {
    return FLASH_ENTMAX_SMALL_WORKSPACE;
  }
  return fe::ForElementAndHeadDim(*problem, [&](auto element, auto head_dim) {
    return fe::LaunchForward<decltype(element), decltype(head_dim)::value>(
        plan, device, *tensors, buffers, scratch, static_cast<cudaStream_t>(stream));
  });
}

int flash_entmax_cuda_backward(const FlashEntmaxProblem* problem,
                               const FlashEntmaxBackwardTensors* tensors, void* saved,
                               int64_t saved_bytes, void* workspace, int64_t workspace_bytes,
                               void* stream) {
  namespace fe = flash_entmax::cuda;
  Plan plan;
  fe::DeviceLimits device;
  if (const int error = fe::MakePlan(*problem, &plan)) return error;
  if (const int error = fe::FindDevice(&device)) return error;
  if (const int error = fe::CheckQueries(
          *problem, {&tensors->query, &tensors->output_gradient, &tensors->query_gradient})) {
    return error;
  }
  if (const int error = fe::CheckKeys(
          *problem,
          {&tensors->key, &tensors->value, &tensors->key_gradient, &tensors->value_gradient})) {
    return error;
  }
  const fe::SavedBuffers buffers = plan.Saved(saved);
  size_t bytes = 0;
  const fe::BackwardScratch scratch = plan.Backward(workspace, &bytes);
  if (!plan.save || static_cast<int64_t>(buffers.bytes) > saved_bytes ||
      static_cast<int64_t>(bytes) > workspace_bytes) {
    return FLASH_ENTMAX_SMALL_WORKSPACE;
  }
  return fe::ForElementAndHeadDim(*problem, [&](auto element, auto head_dim) {
    return fe::LaunchBackward<decltype(element), decltype(head_dim)::value>(
        plan, device, *tensors, buffers, scratch, static_cast<cudaStream_t>(stream));
  });
}

const char* flash_entmax_cuda_error_text(int code) {
  switch (code) {
    case FLASH_ENTMAX_OK:
      return "ok";
    case FLASH_ENTMAX_BAD_SHAPE:
      return "sizes must be at least 1 and heads a multiple of kv_heads";
    case FLASH_ENTMAX_BAD_HEAD_DIM:
      return "head_dim must be 32, 64 or 128";
    case FLASH_ENTMAX_BAD_ALPHA:
      return "alpha must be in (1, 2]";
    case FLASH_ENTMAX_BAD_SCALE:
      return "scale must be finite and positive";
    case FLASH_ENTMAX_BAD_ELEMENT:
      return "element must be 0 (bf16) or 1 (fp16)";
    case FLASH_ENTMAX_BAD_ALIGNMENT:
      return "tensors must be aligned to 16 bytes, strides to 8 elements";
    case FLASH_ENTMAX_SMALL_WORKSPACE:
      return "a buffer is smaller than the plan says, or nothing was saved for the backward";
    case FLASH_ENTMAX_BAD_DEVICE:
      return "a device of compute capability 9.0 is needed";
    case FLASH_ENTMAX_CUDA_FAILURE:
      return "a CUDA call failed";
    case FLASH_ENTMAX_TOO_LARGE:
      return "batch * heads * queries and batch * kv_heads * keys must stay below 2^31";
    case FLASH_ENTMAX_BAD_STRIDE:
      return "strides must be positive, of rows below 4 GiB, of heads and batches below 1 TiB";
    default:
      return "unknown error code";
  }
}

}  // extern "C"
