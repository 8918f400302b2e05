// What the Hopper engine accepts, and its calls in terms of attention.h.

#include <string>
#include <tuple>

#include "c_interface.h"
#include "engines.h"
#include "row_results.h"

namespace flash_entmax::cuda {
namespace {

Status Refuse(const std::string& why) {
  return Status::Unimplemented("engine: the Hopper kernels cannot run this problem: " + why);
}

FlashEntmaxTensor ToInterface(const StridedTensor& tensor) {
  return {tensor.data, {tensor.batch, tensor.head, tensor.row}};
}

FlashEntmaxTensor QueryScale(const GeneralProblem& problem) {
  const int64_t(&strides)[3] = problem.query_scale_stride;
  return {const_cast<float*>(problem.query_scale), {strides[0], strides[1], strides[2]}};
}

// Supports of unstructured inputs keep growing slowly with the length; a row that finds no room is
// computed another way.
int64_t DefaultCapacity(const AttentionCall& call) {
  constexpr int64_t kEntriesPerRow = 64;
  return call.Rows() * kEntriesPerRow;
}

FlashEntmaxProblem ToInterface(const AttentionCall& call, gpu::Engine engine) {
  const GeneralProblem& problem = call.problem;
  FlashEntmaxProblem result = {};
  result.element = call.dtype == DType::kFloat16 ? 1 : 0;
  result.batch = problem.batch;
  result.heads = problem.heads;
  result.kv_heads = problem.kv_heads;
  result.queries = problem.queries;
  result.keys = problem.keys;
  result.head_dim = problem.head_dim;
  result.causal = problem.causal ? 1 : 0;
  result.alpha = problem.alpha;
  result.scale = problem.scale;
  result.path = engine == gpu::Engine::kTiles ? FLASH_ENTMAX_PATH_TILES : FLASH_ENTMAX_PATH_LISTS;
  result.save_for_backward = call.save ? 1 : 0;
  result.support_capacity = !call.save                   ? 0
                            : call.support_capacity >= 0 ? call.support_capacity
                                                         : DefaultCapacity(call);
  result.scaled = problem.query_scale ? 1 : 0;
  return result;
}

Status FromCode(int code) {
  if (code == FLASH_ENTMAX_OK) return Status::Ok();
  if (code == FLASH_ENTMAX_CUDA_FAILURE || code == FLASH_ENTMAX_BAD_DEVICE) {
    return Status::Device(flash_entmax_cuda_error_text(code));
  }
  return Refuse(flash_entmax_cuda_error_text(code));
}

}  // namespace

Status CheckHopper(const AttentionCall& call, const DeviceInfo& device) {
  const GeneralProblem& problem = call.problem;
  if (device.major != 9) return Refuse("the device is not of compute capability 9.0");
  if (call.dtype == DType::kFloat32) return Refuse("float32");
  if (problem.head_dim != problem.value_dim) return Refuse("head_size differs from value_size");
  if (problem.head_dim != 32 && problem.head_dim != 64 && problem.head_dim != 128) {
    return Refuse("head_size is not 32, 64 or 128");
  }
  if (!call.query.vectors || !call.key.vectors || !call.value.vectors) {
    return Refuse("rows are not contiguous or not aligned to 16 bytes");
  }
  const auto strides_rise = [&](const StridedTensor& tensor, int heads, int rows) {
    return (problem.batch <= 1 || tensor.batch > 0) && (heads <= 1 || tensor.head > 0) &&
           (rows <= 1 || tensor.row > 0);
  };
  if (!strides_rise(call.query, problem.heads, problem.queries) ||
      !strides_rise(call.key, problem.kv_heads, problem.keys) ||
      !strides_rise(call.value, problem.kv_heads, problem.keys)) {
    return Refuse("a stride is not positive");
  }
  if (problem.alpha_per_head) return Refuse("alpha_per_head");
  if (call.alpha_gradient) return Refuse("alpha_gradient");
  if (problem.slopes) return Refuse("alibi_slopes");
  if (problem.softcap > 0.0f) return Refuse("softcap");
  if (problem.key_lengths) return Refuse("key_lengths");
  if (problem.cu_query) return Refuse("cu_query");
  if (problem.window_left < GeneralProblem::kUnlimited ||
      (problem.window_right < GeneralProblem::kUnlimited && !problem.causal)) {
    return Refuse("a window");
  }
  if (problem.keys < 1 || problem.queries < 1) return Refuse("no keys or no queries");
  const FlashEntmaxProblem interface = ToInterface(call, gpu::Engine::kScreening);
  FlashEntmaxPlan plan;
  return FromCode(flash_entmax_cuda_plan(&interface, &plan));
}

Expected<gpu::AttentionPlan> PlanHopper(const AttentionCall& call, gpu::Engine engine) {
  const FlashEntmaxProblem problem = ToInterface(call, engine);
  FlashEntmaxPlan sizes;
  if (Status status = FromCode(flash_entmax_cuda_plan(&problem, &sizes)); !status.ok()) {
    return status;
  }
  gpu::AttentionPlan plan;
  plan.engine = engine;
  plan.description = engine == gpu::Engine::kTiles
                         ? "scores recomputed tile by tile, compute capability 9.0"
                         : "one screening product, then the support; compute capability 9.0";
  plan.saved_bytes = sizes.saved_bytes;
  plan.forward_bytes = sizes.forward_bytes;
  plan.backward_bytes = call.save ? sizes.backward_bytes : 0;
  plan.support_capacity = engine == gpu::Engine::kTiles ? 0 : problem.support_capacity;
  return plan;
}

Status ForwardHopper(const AttentionCall& call, const DeviceInfo&, gpu::Engine engine,
                     const gpu::AttentionOutputs& outputs, void* saved, void* workspace) {
  const FlashEntmaxProblem problem = ToInterface(call, engine);
  const StridedTensor output = ToStrided(outputs.output.view());
  if (!output.vectors) return Refuse("output rows are not contiguous or not aligned to 16 bytes");
  const FlashEntmaxForwardTensors tensors = {ToInterface(call.query), ToInterface(call.key),
                                             ToInterface(call.value), ToInterface(output),
                                             QueryScale(call.problem)};
  FlashEntmaxPlan sizes;
  if (Status status = FromCode(flash_entmax_cuda_plan(&problem, &sizes)); !status.ok()) {
    return status;
  }
  if (Status status =
          FromCode(flash_entmax_cuda_forward(&problem, &tensors, saved, sizes.saved_bytes,
                                             workspace, sizes.forward_bytes, call.stream));
      !status.ok()) {
    return status;
  }
  if (!outputs.threshold) return Status::Ok();
  FlashEntmaxSavedLayout layout;
  if (Status status = FromCode(flash_entmax_cuda_saved_layout(&problem, &layout)); !status.ok()) {
    return status;
  }
  const auto* thresholds =
      reinterpret_cast<const float*>(static_cast<const char*>(saved) + layout.threshold);
  const auto& strides = outputs.threshold.strides;
  return FromCuda(
      CopyThresholds(thresholds, call.problem.batch, call.problem.heads, call.problem.queries,
                     layout.padded_queries, static_cast<float*>(outputs.threshold.data),
                     {strides[0], strides[1], strides[2]}, call.stream),
      "copying thresholds");
}

Status BackwardHopper(const AttentionCall& call, const DeviceInfo&, gpu::Engine engine,
                      const gpu::AttentionGradients& gradients, void* saved, void* workspace) {
  const FlashEntmaxProblem problem = ToInterface(call, engine);
  FlashEntmaxBackwardTensors tensors = {ToInterface(call.query),
                                        ToInterface(call.key),
                                        ToInterface(call.value),
                                        {},
                                        {},
                                        {},
                                        {},
                                        static_cast<float*>(gradients.query_scale.data)};
  for (const auto& [target, source, name] :
       {std::tuple{&tensors.output_gradient, gradients.output, "output gradient"},
        std::tuple{&tensors.query_gradient, gradients.query.view(), "query gradient"},
        std::tuple{&tensors.key_gradient, gradients.key.view(), "key gradient"},
        std::tuple{&tensors.value_gradient, gradients.value.view(), "value gradient"}}) {
    const StridedTensor tensor = ToStrided(source);
    if (!tensor.vectors) {
      return Refuse(std::string(name) + " rows are not contiguous or not aligned to 16 bytes");
    }
    *target = ToInterface(tensor);
  }
  FlashEntmaxPlan sizes;
  if (Status status = FromCode(flash_entmax_cuda_plan(&problem, &sizes)); !status.ok()) {
    return status;
  }
  return FromCode(flash_entmax_cuda_backward(&problem, &tensors, saved, sizes.saved_bytes,
                                             workspace, sizes.backward_bytes, call.stream));
}

}  // namespace flash_entmax::cuda
