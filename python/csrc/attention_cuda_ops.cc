// Operators of attention on CUDA devices: the same schemas, run on PyTorch's current stream.
//
// Nothing synchronises, except that the support's number of entries is read back to size its
// tensors. Workspaces are tensors, so that PyTorch's allocator reuses their memory in stream order.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "attention_arguments.h"
#include "flash_entmax/gpu.h"

namespace flash_entmax::python {
namespace {

using torch::stable::accelerator::DeviceGuard;

// Everything that a call needs besides tensors of results.
struct Call {
  Call(const AttentionArguments& arguments, bool save)
      : guard(arguments.query.get_device_index()), problem(arguments.Problem(true)) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(arguments.query.get_device_index(), &stream));
    options.stream = stream;
    options.save_for_backward = save;
    // Always where α is a tensor: what is kept depends on it, and which gradients a caller of
    // autograd wants is not known before the backward pass.
    options.alpha_gradient = save && arguments.alpha.has_value();
    options.max_query_length = arguments.max_query_length;
    options.max_key_length = arguments.max_key_length;
    const Expected<gpu::AttentionPlan> expected = gpu::PlanAttention(problem, options);
    ThrowIfError(expected.status());
    plan = *expected;
  }

  DeviceGuard guard;
  AttentionProblem problem;
  gpu::AttentionOptions options;
  gpu::AttentionPlan plan;
};

// PyTorch aligns memory of CUDA devices to 512 bytes.
Tensor Bytes(const Tensor& like, int64_t bytes) { return Empty(like, {bytes}, ScalarType::Byte); }
gpu::DeviceBuffer Buffer(const Tensor& bytes) { return {bytes.data_ptr(), bytes.numel()}; }

AttentionResult Run(const AttentionArguments& arguments, bool save) {
  const Call call(arguments, save);
  const Tensor& query = arguments.query;
  Tensor output = EmptyOutput(arguments);
  Tensor threshold = Empty(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  // The engine wants the buffer without a backward pass too; then nobody keeps it.
  Tensor saved = Bytes(query, call.plan.saved_bytes);
  const Tensor workspace = Bytes(query, call.plan.forward_bytes);
  gpu::AttentionOutputs outputs;
  outputs.output = MutableView("output", output, true);
  outputs.threshold = MutableView("threshold", threshold, true);
  ThrowIfError(
      gpu::AttentionForward(call.problem, outputs, call.options, Buffer(saved), Buffer(workspace)));
  return {output, threshold, save ? saved : Bytes(query, 0)};
}

AttentionResult Forward(FLASH_ENTMAX_PARAMETERS, bool save) {
  return Run(FLASH_ENTMAX_ARGUMENTS, save);
}

AttentionGradientTensors Backward(FLASH_ENTMAX_PARAMETERS, Tensor grad, Tensor saved,
                                  int64_t wanted) {
  const AttentionArguments arguments = FLASH_ENTMAX_ARGUMENTS;
  const auto want = [wanted](int bit) { return ((wanted >> bit) & 1) != 0; };
  if (saved.numel() == 0) saved = std::get<2>(Run(arguments, true));
  const Call call(arguments, true);
  const auto optional = [&](const std::optional<Tensor>& like, bool wanted_one) {
    return like && wanted_one ? EmptyLike(*like) : Empty(query, {0}, ScalarType::Float);
  };
  // The engine always computes the first three.
  AttentionGradientTensors result{EmptyLike(query),
                                  EmptyLike(key),
                                  EmptyLike(value),
                                  optional(alpha, want(3)),
                                  Empty(query, {0}, ScalarType::Float),
                                  optional(alibi_slopes, want(5)),
                                  optional(query_scale, want(6))};
  const Tensor workspace = Bytes(query, call.plan.backward_bytes);
  gpu::AttentionGradients gradients;
  gradients.output = View("grad_output", grad, true);
  gradients.query = MutableView("grad_query", std::get<0>(result), true);
  gradients.key = MutableView("grad_key", std::get<1>(result), true);
  gradients.value = MutableView("grad_value", std::get<2>(result), true);
  if (want(3)) gradients.alpha = MutableView("grad_alpha", std::get<3>(result), true);
  if (want(5)) gradients.alibi_slopes = MutableView("grad_alibi_slopes", std::get<5>(result), true);
  if (want(6)) gradients.query_scale = MutableView("grad_query_scale", std::get<6>(result), true);
  ThrowIfError(gpu::AttentionBackward(call.problem, gradients, call.options, Buffer(saved),
                                      Buffer(workspace)));
  const Tensor nothing = Empty(query, {0}, query.scalar_type());
  if (!want(0)) std::get<0>(result) = nothing;
  if (!want(1)) std::get<1>(result) = nothing;
  if (!want(2)) std::get<2>(result) = nothing;
  return result;
}

std::tuple<Tensor, Tensor, Tensor> Support(FLASH_ENTMAX_PARAMETERS) {
  const AttentionArguments arguments = FLASH_ENTMAX_ARGUMENTS;
  const AttentionResult forward = Run(arguments, false);
  const Call call(arguments, false);
  const TensorView threshold = View("threshold", std::get<1>(forward), true);
  const int64_t rows = query.size(0) * query.size(1) * query.size(2);
  const Expected<int64_t> bytes = gpu::SupportWorkspaceBytes(call.problem);
  ThrowIfError(bytes.status());
  const Tensor workspace = Bytes(query, *bytes);
  Tensor offsets = Empty(query, {rows + 1}, ScalarType::Long);
  ThrowIfError(gpu::SupportOffsets(call.problem, threshold, call.options,
                                   MutableView("row_offsets", offsets, true), Buffer(workspace)));
  const Tensor last = torch::stable::narrow(offsets, 0, rows, 1);
  int64_t entries = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_item_int64(last.get(), &entries));
  Tensor key_index = Empty(query, {entries}, ScalarType::Int);
  Tensor probability = Empty(query, {entries}, ScalarType::Float);
  if (entries > 0) {
    ThrowIfError(gpu::SupportEntries(
        call.problem, threshold, call.options, View("row_offsets", offsets, true),
        MutableView("key_index", key_index, true), MutableView("probability", probability, true)));
  }
  return {offsets, key_index, probability};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flash_entmax, CUDA, library) {
  library.impl("attention", TORCH_BOX(&Forward));
  library.impl("attention_forward", TORCH_BOX(&Forward));
  library.impl("attention_backward", TORCH_BOX(&Backward));
  library.impl("attention_support", TORCH_BOX(&Support));
}

}  // namespace flash_entmax::python
