#include "flash_entmax_c.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "flash_entmax/gpu.h"

namespace {

namespace fe = flash_entmax;

thread_local std::string last_error;

int Report(const fe::Status& status) {
  if (status.ok()) return 0;
  last_error = status.message();
  return static_cast<int>(status.code());
}

template <class View>
View To(const FlashEntmaxCTensor& tensor) {
  View view;
  view.data = tensor.data;
  view.dtype = static_cast<fe::DType>(tensor.dtype);
  view.rank = tensor.rank;
  for (int i = 0; i < std::clamp(tensor.rank, 0, 4); ++i) {
    view.shape[static_cast<size_t>(i)] = tensor.shape[i];
    view.strides[static_cast<size_t>(i)] = tensor.strides[i];
  }
  return view;
}

fe::TensorView In(const FlashEntmaxCTensor& tensor) { return To<fe::TensorView>(tensor); }
fe::MutableTensorView Out(const FlashEntmaxCTensor& tensor) {
  return To<fe::MutableTensorView>(tensor);
}

fe::AttentionProblem In(const FlashEntmaxCProblem& problem) {
  fe::AttentionProblem result;
  result.query = In(problem.query);
  result.key = In(problem.key);
  result.value = In(problem.value);
  result.alpha = problem.alpha;
  result.alpha_per_head = In(problem.alpha_per_head);
  if (!std::isnan(problem.scale)) result.scale = problem.scale;
  result.query_scale = In(problem.query_scale);
  result.causal = problem.causal != 0;
  if (problem.window_left >= 0) result.window_left = problem.window_left;
  if (problem.window_right >= 0) result.window_right = problem.window_right;
  result.key_lengths = In(problem.key_lengths);
  result.key_mask = In(problem.key_mask);
  result.bias = In(problem.bias);
  result.alibi_slopes = In(problem.alibi_slopes);
  result.softcap = problem.softcap;
  result.cu_query = In(problem.cu_query);
  result.cu_key = In(problem.cu_key);
  return result;
}

fe::gpu::AttentionOptions In(const FlashEntmaxCOptions& options) {
  fe::gpu::AttentionOptions result;
  result.stream = options.stream;
  result.save_for_backward = options.save_for_backward != 0;
  result.alpha_gradient = options.alpha_gradient != 0;
  result.max_query_length = options.max_query_length;
  result.max_key_length = options.max_key_length;
  result.support_capacity = options.support_capacity;
  result.engine = static_cast<fe::gpu::Engine>(options.engine);
  result.visit_all_tiles = options.visit_all_tiles != 0;
  return result;
}

fe::gpu::DeviceBuffer In(const FlashEntmaxCBuffer& buffer) { return {buffer.data, buffer.bytes}; }

}  // namespace

extern "C" {

const char* flash_entmax_last_error(void) { return last_error.c_str(); }

int flash_entmax_gpu_describe(char* text, int64_t size) {
  const fe::Expected<std::string> device = fe::gpu::DescribeDevice();
  if (!device.ok()) return Report(device.status());
  if (size > 0) {
    const size_t length = std::min(device->size(), static_cast<size_t>(size - 1));
    std::memcpy(text, device->data(), length);
    text[length] = '\0';
  }
  return 0;
}

int flash_entmax_gpu_plan(const FlashEntmaxCProblem* problem, const FlashEntmaxCOptions* options,
                          FlashEntmaxCPlan* plan) {
  const fe::Expected<fe::gpu::AttentionPlan> result =
      fe::gpu::PlanAttention(In(*problem), In(*options));
  if (!result.ok()) return Report(result.status());
  plan->engine = static_cast<int32_t>(result->engine);
  plan->saved_bytes = result->saved_bytes;
  plan->forward_bytes = result->forward_bytes;
  plan->backward_bytes = result->backward_bytes;
  plan->support_capacity = result->support_capacity;
  return 0;
}

int flash_entmax_gpu_forward(const FlashEntmaxCProblem* problem, const FlashEntmaxCOptions* options,
                             const FlashEntmaxCTensor* output, const FlashEntmaxCTensor* threshold,
                             FlashEntmaxCBuffer saved, FlashEntmaxCBuffer workspace) {
  return Report(fe::gpu::AttentionForward(In(*problem), {Out(*output), Out(*threshold)},
                                          In(*options), In(saved), In(workspace)));
}

int flash_entmax_gpu_backward(const FlashEntmaxCProblem* problem,
                              const FlashEntmaxCOptions* options,
                              const FlashEntmaxCGradients* gradients, FlashEntmaxCBuffer saved,
                              FlashEntmaxCBuffer workspace) {
  fe::gpu::AttentionGradients result;
  result.output = In(gradients->output);
  result.query = Out(gradients->query);
  result.key = Out(gradients->key);
  result.value = Out(gradients->value);
  result.alpha = Out(gradients->alpha);
  result.alibi_slopes = Out(gradients->alibi_slopes);
  result.query_scale = Out(gradients->query_scale);
  return Report(
      fe::gpu::AttentionBackward(In(*problem), result, In(*options), In(saved), In(workspace)));
}

int flash_entmax_gpu_support_workspace(const FlashEntmaxCProblem* problem, int64_t* bytes) {
  const fe::Expected<int64_t> result = fe::gpu::SupportWorkspaceBytes(In(*problem));
  if (!result.ok()) return Report(result.status());
  *bytes = *result;
  return 0;
}

int flash_entmax_gpu_support_offsets(const FlashEntmaxCProblem* problem,
                                     const FlashEntmaxCOptions* options,
                                     const FlashEntmaxCTensor* threshold,
                                     const FlashEntmaxCTensor* row_offsets,
                                     FlashEntmaxCBuffer workspace) {
  return Report(fe::gpu::SupportOffsets(In(*problem), In(*threshold), In(*options),
                                        Out(*row_offsets), In(workspace)));
}

int flash_entmax_gpu_support_entries(const FlashEntmaxCProblem* problem,
                                     const FlashEntmaxCOptions* options,
                                     const FlashEntmaxCTensor* threshold,
                                     const FlashEntmaxCTensor* row_offsets,
                                     const FlashEntmaxCTensor* key_index,
                                     const FlashEntmaxCTensor* probability) {
  return Report(fe::gpu::SupportEntries(In(*problem), In(*threshold), In(*options),
                                        In(*row_offsets), Out(*key_index), Out(*probability)));
}

}  // extern "C"
