// The bridge between LibTorch's autograd and this project's engines.
//
// qkv is one tensor, so that one matrix product makes it and one buffer takes its gradient; query,
// key and value are strided views of it. Buffers (saved support, workspace) are tensors, so that on
// GPUs they come from the caching allocator and belong to a captured graph's pool. Nothing here
// synchronises with the device.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "attention.h"
#include "flash_entmax/attention.h"

#ifdef FLASH_ENTMAX_LAB_CUDA
#include <c10/cuda/CUDAStream.h>

#include "flash_entmax/gpu.h"
#endif

namespace flash_entmax::lab {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void Check(const Status& status) { TORCH_CHECK(status.ok(), status.message()); }

DType TypeOf(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK(false, "attention: got type ", tensor.scalar_type(), "; must be floating point");
  }
}

template <typename View>
View MakeView(const at::Tensor& tensor) {
  View view;
  view.data = tensor.data_ptr();
  view.dtype = TypeOf(tensor);
  view.rank = static_cast<int>(tensor.dim());
  for (int i = 0; i < view.rank; ++i) {
    view.shape[static_cast<size_t>(i)] = tensor.size(i);
    view.strides[static_cast<size_t>(i)] = tensor.stride(i);
  }
  return view;
}

// [batch, heads, length, head_size] of part 0 (query), 1 (key) or 2 (value).
at::Tensor Part(const at::Tensor& qkv, int64_t part) { return qkv.select(2, part).transpose(1, 2); }

AttentionProblem MakeProblem(const at::Tensor& qkv, const at::Tensor& query_scale,
                             const at::Tensor& slopes, const at::Tensor& alpha,
                             double fixed_alpha) {
  AttentionProblem problem;
  problem.query = MakeView<TensorView>(Part(qkv, 0));
  problem.key = MakeView<TensorView>(Part(qkv, 1));
  problem.value = MakeView<TensorView>(Part(qkv, 2));
  problem.causal = true;
  problem.alpha = fixed_alpha;
  if (alpha.defined()) problem.alpha_per_head = MakeView<TensorView>(alpha);
  if (slopes.defined()) problem.alibi_slopes = MakeView<TensorView>(slopes);
  if (query_scale.defined()) {
    problem.query_scale = MakeView<TensorView>(query_scale.transpose(1, 2));
  }
  return problem;
}

at::Tensor Bytes(int64_t bytes, const at::Tensor& like) {
  return at::empty({std::max<int64_t>(bytes, 1)}, like.options().dtype(at::kByte));
}

#ifdef FLASH_ENTMAX_LAB_CUDA
gpu::AttentionOptions GpuOptions(const at::Tensor& alpha, bool save) {
  gpu::AttentionOptions options;
  options.stream = c10::cuda::getCurrentCUDAStream().stream();
  options.save_for_backward = save;
  options.alpha_gradient = alpha.defined();
  return options;
}

gpu::DeviceBuffer GpuBuffer(const at::Tensor& bytes) { return {bytes.data_ptr(), bytes.numel()}; }
#endif

AttentionOptions CpuOptions(bool save) {
  AttentionOptions options;
  options.num_threads = at::get_num_threads();
  options.save_for_backward = save;
  return options;
}

// Returns the saved buffer.
at::Tensor Forward(const AttentionProblem& problem, const at::Tensor& qkv, const at::Tensor& alpha,
                   bool save, const at::Tensor& output) {
  const MutableTensorView view = MakeView<MutableTensorView>(output.transpose(1, 2));
#ifdef FLASH_ENTMAX_LAB_CUDA
  if (qkv.is_cuda()) {
    const gpu::AttentionOptions options = GpuOptions(alpha, save);
    const Expected<gpu::AttentionPlan> plan = gpu::PlanAttention(problem, options);
    Check(plan.status());
    at::Tensor saved = Bytes(plan->saved_bytes, qkv);
    const at::Tensor workspace = Bytes(plan->forward_bytes, qkv);
    Check(gpu::AttentionForward(problem, {view, {}}, options, GpuBuffer(saved),
                                GpuBuffer(workspace)));
    return saved;
  }
#endif
  (void)alpha;
  const AttentionOptions options = CpuOptions(save);
  const Expected<AttentionPlan> plan = PlanAttention(problem, options);
  Check(plan.status());
  at::Tensor saved = Bytes(plan->saved_bytes, qkv);
  AttentionOutputs outputs;
  outputs.output = view;
  Check(AttentionForward(problem, outputs, options, {saved.data_ptr(), saved.numel()}));
  return saved;
}

// Function::apply wants every tensor to be defined: what is not given is empty.
at::Tensor EmptyIfUndefined(const at::Tensor& tensor, const at::Tensor& like) {
  return tensor.defined() ? tensor : at::empty({0}, like.options().dtype(at::kFloat));
}
at::Tensor UndefinedIfEmpty(const at::Tensor& tensor) {
  return tensor.numel() == 0 ? at::Tensor() : tensor;
}

class EngineFunction : public torch::autograd::Function<EngineFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& qkv_given,
                            const at::Tensor& query_scale_given, const at::Tensor& slopes_given,
                            const at::Tensor& alpha_given, double fixed_alpha, bool save) {
    const at::Tensor qkv = qkv_given.contiguous();
    const at::Tensor query_scale = UndefinedIfEmpty(query_scale_given);
    const at::Tensor slopes = UndefinedIfEmpty(slopes_given);
    const at::Tensor alpha = UndefinedIfEmpty(alpha_given);
    const AttentionProblem problem = MakeProblem(qkv, query_scale, slopes, alpha, fixed_alpha);
    at::Tensor output =
        at::empty({qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4)}, qkv.options());
    const at::Tensor saved = Forward(problem, qkv, alpha, save, output);
    context->save_for_backward({qkv, query_scale, slopes, alpha, saved});
    context->saved_data["alpha"] = fixed_alpha;
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& output_gradients) {
    const variable_list inputs = context->get_saved_variables();
    const at::Tensor &qkv = inputs[0], &query_scale = inputs[1], &alpha = inputs[3];
    const at::Tensor& saved = inputs[4];
    const AttentionProblem problem =
        MakeProblem(qkv, query_scale, inputs[2], alpha, context->saved_data["alpha"].toDouble());
    const at::Tensor output_gradient = output_gradients[0].contiguous();
    const at::Tensor qkv_gradient = at::empty_like(qkv);
    at::Tensor scale_gradient, alpha_gradient;
    if (query_scale.defined()) {
      // The GPU engine writes [batch, heads, length]; the view turns it back.
      scale_gradient =
          at::empty({qkv.size(0), qkv.size(3), qkv.size(1)}, query_scale.options()).transpose(1, 2);
    }
    if (alpha.defined()) alpha_gradient = at::empty_like(alpha);
    const auto fill = [&](auto& gradients) {
      gradients.output = MakeView<TensorView>(output_gradient.transpose(1, 2));
      gradients.query = MakeView<MutableTensorView>(Part(qkv_gradient, 0));
      gradients.key = MakeView<MutableTensorView>(Part(qkv_gradient, 1));
      gradients.value = MakeView<MutableTensorView>(Part(qkv_gradient, 2));
      if (alpha_gradient.defined()) gradients.alpha = MakeView<MutableTensorView>(alpha_gradient);
      if (scale_gradient.defined()) {
        gradients.query_scale = MakeView<MutableTensorView>(scale_gradient.transpose(1, 2));
      }
    };
#ifdef FLASH_ENTMAX_LAB_CUDA
    if (qkv.is_cuda()) {
      const gpu::AttentionOptions options = GpuOptions(alpha, true);
      const Expected<gpu::AttentionPlan> plan = gpu::PlanAttention(problem, options);
      Check(plan.status());
      const at::Tensor workspace = Bytes(plan->backward_bytes, qkv);
      gpu::AttentionGradients gradients;
      fill(gradients);
      Check(gpu::AttentionBackward(problem, gradients, options, GpuBuffer(saved),
                                   GpuBuffer(workspace)));
      return {qkv_gradient, scale_gradient, at::Tensor(), alpha_gradient, {}, {}};
    }
#endif
    AttentionGradients gradients;
    fill(gradients);
    Check(
        AttentionBackward(problem, gradients, CpuOptions(true), {saved.data_ptr(), saved.numel()}));
    return {qkv_gradient, scale_gradient, at::Tensor(), alpha_gradient, {}, {}};
  }
};

}  // namespace

at::Tensor EngineAttention(const AttentionInputs& inputs) {
  const bool save = at::GradMode::is_enabled() && inputs.qkv.requires_grad();
  return EngineFunction::apply(inputs.qkv, EmptyIfUndefined(inputs.query_scale, inputs.qkv),
                               EmptyIfUndefined(inputs.slopes, inputs.qkv),
                               EmptyIfUndefined(inputs.alpha, inputs.qkv), inputs.fixed_alpha,
                               save);
}

}  // namespace flash_entmax::lab
