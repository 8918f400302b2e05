// Operators of attention on CUDA devices: the same schemas, run on PyTorch's current stream.
//
// Nothing synchronises, except that the support's number of entries is read back to size its
// tensors. Workspaces are tensors, so that PyTorch's allocator reuses their memory in stream order.
//
// Which of the engine's kernels run follows from shapes, types and features alone, never from
// strides or addresses: tensors that the special kernels cannot read are copied. The backward pass
// may be given other copies of the inputs than the forward pass (torch.compile makes such), and
// must read what that one kept.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "attention_arguments.h"
#include "flash_entmax/gpu.h"

namespace flash_entmax::python {
namespace {

using torch::stable::accelerator::DeviceGuard;

// PyTorch aligns memory of CUDA devices to 512 bytes, but a buffer may be a part of another tensor.
constexpr uintptr_t kBufferAlignment = 256;
alignas(kBufferAlignment) char some_address[kBufferAlignment];

bool Aligned(const Tensor& tensor, uintptr_t alignment) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % alignment == 0;
}

// Elements of a row lie together, and no two rows share memory.
bool PlainRows(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] <= 1) continue;
    if (i + 1 == sizes.size() ? strides[i] != 1 : strides[i] <= 0) return false;
  }
  return true;
}

// What the special kernels read, all of 16-bit types: plain rows at multiples of 16 bytes.
bool VectorRows(const Tensor& tensor) {
  if (!PlainRows(tensor) || !Aligned(tensor, 16)) return false;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  for (size_t i = 0; i + 1 < sizes.size(); ++i) {
    if (sizes[i] > 1 && strides[i] % 8 != 0) return false;
  }
  return true;
}

Tensor Copy(const Tensor& tensor) {
  // `contiguous` gives the tensor itself where only its address is the matter.
  return tensor.is_contiguous() ? torch::stable::clone(tensor) : torch::stable::contiguous(tensor);
}

// The problem as it would be with tensors in one piece. No element can be read.
AttentionProblem InOnePiece(AttentionProblem problem) {
  for (TensorView* view : {&problem.query, &problem.key, &problem.value}) {
    int64_t stride = 1;
    for (int i = view->rank - 1; i >= 0; --i) {
      view->strides[i] = stride;
      stride *= view->shape[i] > 0 ? view->shape[i] : 1;
    }
    view->data = some_address;
  }
  return problem;
}

gpu::AttentionPlan Plan(const AttentionProblem& problem, const gpu::AttentionOptions& options) {
  const Expected<gpu::AttentionPlan> plan = gpu::PlanAttention(InOnePiece(problem), options);
  ThrowIfError(plan.status());
  return *plan;
}

// Everything that a call needs besides tensors of results.
struct Call {
  Call(const AttentionArguments& given, bool save)
      : guard(given.query.get_device_index()), arguments(given), problem(given.Problem(true)) {
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
    plan = Plan(problem, options);
    if (special() && !(VectorRows(arguments.query) && VectorRows(arguments.key) &&
                       VectorRows(arguments.value))) {
      for (Tensor* tensor : {&arguments.query, &arguments.key, &arguments.value}) {
        if (!VectorRows(*tensor)) *tensor = Copy(*tensor);
      }
      problem = arguments.Problem(true);
    }
  }

  // Whether the kernels are those that want vectors.
  bool special() const { return plan.engine != gpu::Engine::kGeneral; }

  DeviceGuard guard;
  AttentionArguments arguments;  // holds the copies
  AttentionProblem problem;
  gpu::AttentionOptions options;
  gpu::AttentionPlan plan;
};

Tensor Bytes(const Tensor& like, int64_t bytes) { return Empty(like, {bytes}, ScalarType::Byte); }
gpu::DeviceBuffer Buffer(const Tensor& bytes) { return {bytes.data_ptr(), bytes.numel()}; }

AttentionResult Run(const AttentionArguments& arguments, bool save) {
  const Call call(arguments, save);
  const Tensor& query = arguments.query;
  Tensor output = EmptyOutput(arguments);
  Tensor threshold = Empty(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  // The engine wants the buffer without a backward pass too; then nobody keeps it. One that is kept
  // is made by the operator, which fills it in PyTorch's deterministic mode.
  const int64_t saved_bytes = call.plan.saved_bytes;
  Tensor saved = save && saved_bytes > 0
                     ? torch::stable::new_empty(query, {&saved_bytes, 1}, ScalarType::Byte)
                     : Bytes(query, saved_bytes);
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
  const Call call(arguments, true);
  CheckSameDevice("grad_output", grad, query);
  CheckSameDevice("saved", saved, query);
  // A transform that hid from the forward pass that there would be a backward one (vmap inside
  // grad) kept nothing.
  if (saved.numel() != call.plan.saved_bytes) saved = std::get<2>(Run(call.arguments, true));
  if (saved.numel() > 0 && !Aligned(saved, kBufferAlignment)) saved = torch::stable::clone(saved);
  if (call.special() ? !VectorRows(grad) : !PlainRows(grad)) grad = Copy(grad);
  const auto nothing = [&query](ScalarType type) { return Empty(query, {0}, type); };
  const auto optional = [&](const std::optional<Tensor>& like, bool wanted_one) {
    return like && wanted_one ? EmptyLike(*like) : nothing(ScalarType::Float);
  };
  // The engine always computes the first three, where it can write them.
  struct Written {
    Tensor result, target;
  };
  const auto written = [&](const Tensor& like) {
    Tensor result = EmptyLike(like);
    if (!call.special() || VectorRows(result)) return Written{result, result};
    const auto sizes = like.sizes();
    return Written{result, Empty(like, std::span<const int64_t>(sizes.data(), sizes.size()),
                                 like.scalar_type())};
  };
  std::array<Written, 3> first{written(query), written(key), written(value)};
  Tensor grad_alpha = optional(alpha, want(3));
  Tensor grad_slopes = optional(alibi_slopes, want(5));
  Tensor grad_scale = optional(query_scale, want(6));
  const Tensor workspace = Bytes(query, call.plan.backward_bytes);
  gpu::AttentionGradients gradients;
  gradients.output = View("grad_output", grad, true);
  gradients.query = MutableView("grad_query", first[0].target, true);
  gradients.key = MutableView("grad_key", first[1].target, true);
  gradients.value = MutableView("grad_value", first[2].target, true);
  if (want(3)) gradients.alpha = MutableView("grad_alpha", grad_alpha, true);
  if (want(5)) gradients.alibi_slopes = MutableView("grad_alibi_slopes", grad_slopes, true);
  if (want(6)) gradients.query_scale = MutableView("grad_query_scale", grad_scale, true);
  ThrowIfError(gpu::AttentionBackward(call.problem, gradients, call.options, Buffer(saved),
                                      Buffer(workspace)));
  for (int i = 0; i < 3; ++i) {
    if (!want(i)) {
      first[i].result = nothing(query.scalar_type());
    } else if (first[i].target.get() != first[i].result.get()) {
      torch::stable::copy_(first[i].result, first[i].target);
    }
  }
  return {first[0].result, first[1].result, first[2].result, grad_alpha, nothing(ScalarType::Float),
          grad_slopes,     grad_scale};
}

std::tuple<Tensor, Tensor, Tensor> Support(FLASH_ENTMAX_PARAMETERS) {
  AttentionArguments arguments = FLASH_ENTMAX_ARGUMENTS;
  arguments.value = key;  // The support does not depend on it, and the special kernels can read it.
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

// How many bytes Forward keeps on a device for a problem of these shapes (4 numbers each), for
// tracing. `tensors`: bit i is set if the i-th of the optional tensors is given.
int64_t SavedBytes(std::vector<int64_t> query, std::vector<int64_t> key, std::vector<int64_t> value,
                   ScalarType type, int64_t device, int64_t tensors, double alpha,
                   std::optional<double> scale, bool causal, std::optional<int64_t> window_left,
                   std::optional<int64_t> window_right, double softcap) {
  const DeviceGuard guard(static_cast<int32_t>(device));
  const auto view = [type](const std::vector<int64_t>& shape) {
    if (shape.size() != 4) ThrowValueError("shapes must have four numbers");
    TensorView tensor;
    tensor.data = some_address;
    tensor.dtype = type == ScalarType::BFloat16 ? DType::kBFloat16
                   : type == ScalarType::Half   ? DType::kFloat16
                                                : DType::kFloat32;
    tensor.rank = 4;
    for (size_t i = 0; i < 4; ++i) tensor.shape[i] = shape[i];
    return tensor;
  };
  AttentionProblem problem;
  problem.query = view(query);
  problem.key = view(key);
  problem.value = view(value);
  problem.alpha = alpha;
  problem.scale = scale;
  problem.causal = causal;
  problem.window_left = window_left;
  problem.window_right = window_right;
  problem.softcap = softcap;
  gpu::AttentionOptions options;
  options.save_for_backward = true;
  // Which of them there are decides on the engine and on what it keeps; their elements do not.
  const auto given = [tensors](int position) { return ((tensors >> position) & 1) != 0; };
  const auto some_tensor = [](DType dtype, std::initializer_list<int64_t> shape) {
    TensorView tensor;
    tensor.data = some_address;
    tensor.dtype = dtype;
    for (const int64_t size : shape) tensor.shape[static_cast<size_t>(tensor.rank++)] = size;
    int64_t stride = 1;
    for (int i = tensor.rank - 1; i >= 0; --i) {
      tensor.strides[static_cast<size_t>(i)] = stride;
      stride *= tensor.shape[static_cast<size_t>(i)];
    }
    return tensor;
  };
  if (given(0)) {
    problem.alpha_per_head = some_tensor(DType::kFloat32, {query[1]});
    options.alpha_gradient = true;
  }
  if (given(1)) problem.query_scale = some_tensor(DType::kFloat32, {query[0], query[1], query[2]});
  if (given(3)) problem.alibi_slopes = some_tensor(DType::kFloat32, {query[1]});
  if (given(4)) problem.key_lengths = some_tensor(DType::kInt32, {query[0]});
  if (given(6)) problem.cu_query = some_tensor(DType::kInt32, {2});
  if (given(7)) problem.cu_key = some_tensor(DType::kInt32, {2});
  return Plan(problem, options).saved_bytes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flash_entmax, library) {
  library.def(
      "attention_saved_bytes_cuda(int[] query, int[] key, int[] value, ScalarType dtype, "
      "int device, int tensors, float alpha, float? scale, bool causal, int? window_left, "
      "int? window_right, float softcap) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(flash_entmax, CompositeExplicitAutograd, library) {
  library.impl("attention_saved_bytes_cuda", TORCH_BOX(&SavedBytes));
}

STABLE_TORCH_LIBRARY_IMPL(flash_entmax, CUDA, library) {
  library.impl("attention", TORCH_BOX(&Forward));
  library.impl("attention_forward", TORCH_BOX(&Forward));
  library.impl("attention_backward", TORCH_BOX(&Backward));
  library.impl("attention_support", TORCH_BOX(&Support));
}

}  // namespace flash_entmax::python
