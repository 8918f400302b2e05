// Operators of attention: their schemas, and their implementation on the CPU.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "attention_arguments.h"

namespace flash_entmax::python {

AttentionProblem AttentionArguments::Problem(bool cuda) const {
  if (cuda) {
    CheckSameDevice("key", key, query);
    CheckSameDevice("value", value, query);
    for (const auto& [name, tensor] :
         {std::pair{"alpha", &alpha}, std::pair{"query_scale", &query_scale},
          std::pair{"bias", &bias}, std::pair{"alibi_slopes", &alibi_slopes},
          std::pair{"key_lengths", &key_lengths}, std::pair{"key_mask", &key_mask},
          std::pair{"cu_query", &cu_query}, std::pair{"cu_key", &cu_key}}) {
      if (*tensor) CheckSameDevice(name, **tensor, query);
    }
  }
  AttentionProblem problem;
  problem.query = View("query", query, cuda);
  problem.key = View("key", key, cuda);
  problem.value = View("value", value, cuda);
  problem.alpha = alpha_value;
  problem.alpha_per_head = View("alpha", alpha, cuda);
  problem.scale = scale;
  problem.query_scale = View("query_scale", query_scale, cuda);
  problem.causal = causal;
  problem.window_left = window_left;
  problem.window_right = window_right;
  problem.key_lengths = View("key_lengths", key_lengths, cuda);
  problem.key_mask = View("key_mask", key_mask, cuda);
  problem.bias = View("bias", bias, cuda);
  problem.alibi_slopes = View("alibi_slopes", alibi_slopes, cuda);
  problem.softcap = softcap;
  problem.cu_query = View("cu_query", cu_query, cuda);
  problem.cu_key = View("cu_key", cu_key, cuda);
  return problem;
}

Tensor EmptyOutput(const AttentionArguments& arguments) {
  const Tensor& query = arguments.query;
  const Tensor& value = arguments.value;
  if (query.dim() != 4 || value.dim() != 4) {
    ThrowValueError("query, key and value must have four dimensions");
  }
  const int64_t batch = query.size(0);
  const int64_t heads = query.size(1);
  const int64_t length = query.size(2);
  const int64_t size = value.size(3);
  if (query.stride(1) < query.stride(2)) {
    return torch::stable::transpose(Empty(query, {batch, length, heads, size}, query.scalar_type()),
                                    1, 2);
  }
  return Empty(query, {batch, heads, length, size}, query.scalar_type());
}

namespace {

// A tensor of bytes to keep `bytes` in. PyTorch aligns memory to 64 bytes. By the operator, which
// fills it in PyTorch's deterministic mode: not every byte is written.
Tensor Bytes(const Tensor& like, int64_t bytes) {
  if (bytes == 0) return Empty(like, {0}, ScalarType::Byte);
  return torch::stable::new_empty(like, {&bytes, 1}, ScalarType::Byte);
}

AttentionBuffer Buffer(const Tensor& bytes) { return {bytes.data_ptr(), bytes.numel()}; }

AttentionOptions Options(bool save) {
  AttentionOptions options;
  options.save_for_backward = save;
  return options;
}

AttentionResult Run(const AttentionArguments& arguments, bool save) {
  const AttentionProblem problem = arguments.Problem(false);
  const AttentionOptions options = Options(save);
  int64_t saved_bytes = 0;
  if (save) {
    const Expected<AttentionPlan> plan = PlanAttention(problem, options);
    ThrowIfError(plan.status());
    saved_bytes = plan->saved_bytes;
  } else {
    ThrowIfError(CheckAttention(problem));  // Before anything is allocated from the shapes.
  }
  const Tensor& query = arguments.query;
  Tensor output = EmptyOutput(arguments);
  Tensor threshold =
      Empty(query, {query.size(0), query.size(1), query.size(2)}, StatisticsType(query));
  Tensor saved = Bytes(query, saved_bytes);
  AttentionOutputs outputs;
  outputs.output = MutableView("output", output);
  outputs.threshold = MutableView("threshold", threshold);
  ThrowIfError(AttentionForward(problem, outputs, options, Buffer(saved)));
  return {output, threshold, saved};
}

AttentionResult Forward(FLASH_ENTMAX_PARAMETERS, bool save) {
  return Run(FLASH_ENTMAX_ARGUMENTS, save);
}

// A gradient of the shape of `like`, if it is wanted.
Tensor GradientLike(const Tensor& like, bool wanted) {
  return wanted ? EmptyLike(like) : Empty(like, {0}, like.scalar_type());
}
Tensor GradientLike(const std::optional<Tensor>& like, bool wanted, const Tensor& query) {
  return like ? GradientLike(*like, wanted) : Empty(query, {0}, StatisticsType(query));
}
MutableTensorView ViewIf(bool wanted, const char* name, const Tensor& tensor) {
  return wanted ? MutableView(name, tensor) : MutableTensorView{};
}

// `wanted`: bit 0 query, 1 key, 2 value, 3 alpha, 4 bias, 5 alibi_slopes, 6 query_scale.
AttentionGradientTensors Backward(FLASH_ENTMAX_PARAMETERS, Tensor grad, Tensor saved,
                                  int64_t wanted) {
  const AttentionArguments arguments = FLASH_ENTMAX_ARGUMENTS;
  // A transform that hid from the forward pass that there would be a backward one (vmap inside
  // grad) kept nothing.
  if (saved.numel() == 0) saved = std::get<2>(Run(arguments, true));
  const auto want = [wanted](int bit) { return ((wanted >> bit) & 1) != 0; };
  AttentionGradientTensors result{GradientLike(query, want(0)),
                                  GradientLike(key, want(1)),
                                  GradientLike(value, want(2)),
                                  GradientLike(alpha, want(3), query),
                                  GradientLike(bias, want(4), query),
                                  GradientLike(alibi_slopes, want(5), query),
                                  GradientLike(query_scale, want(6), query)};
  AttentionGradients gradients;
  gradients.output = View("grad_output", grad);
  gradients.query = ViewIf(want(0), "grad_query", std::get<0>(result));
  gradients.key = ViewIf(want(1), "grad_key", std::get<1>(result));
  gradients.value = ViewIf(want(2), "grad_value", std::get<2>(result));
  gradients.alpha = ViewIf(want(3), "grad_alpha", std::get<3>(result));
  gradients.bias = ViewIf(want(4), "grad_bias", std::get<4>(result));
  gradients.alibi_slopes = ViewIf(want(5), "grad_alibi_slopes", std::get<5>(result));
  gradients.query_scale = ViewIf(want(6), "grad_query_scale", std::get<6>(result));
  ThrowIfError(
      AttentionBackward(arguments.Problem(false), gradients, Options(true), Buffer(saved)));
  return result;
}

// The support in compressed rows: offsets, key of every entry, probability of every entry.
std::tuple<Tensor, Tensor, Tensor> Support(FLASH_ENTMAX_PARAMETERS) {
  const AttentionArguments arguments = FLASH_ENTMAX_ARGUMENTS;
  const AttentionProblem problem = arguments.Problem(false);
  ThrowIfError(CheckAttention(problem));
  Tensor output = EmptyOutput(arguments);
  AttentionSupport support;
  AttentionOutputs outputs;
  outputs.output = MutableView("output", output);
  outputs.support = &support;
  ThrowIfError(AttentionForward(problem, outputs));
  const auto copy = [&query](const auto& values, ScalarType type) {
    Tensor tensor = Empty(query, {static_cast<int64_t>(values.size())}, type);
    if (!values.empty()) {
      std::memcpy(tensor.data_ptr(), values.data(), values.size() * sizeof(values[0]));
    }
    return tensor;
  };
  return {copy(support.row_offsets, ScalarType::Long), copy(support.key_index, ScalarType::Int),
          copy(support.probability, ScalarType::Float)};
}

// How many bytes Forward keeps for a problem of these shapes (4 numbers each); what they hold does
// not matter. For tracing, where tensors have shapes but no memory.
int64_t SavedBytes(std::vector<int64_t> query, std::vector<int64_t> key, std::vector<int64_t> value,
                   ScalarType type) {
  static const double kAnything = 0.0;
  const auto view = [type](const std::vector<int64_t>& shape) {
    if (shape.size() != 4) ThrowValueError("shapes must have four numbers");
    TensorView tensor = TensorView::Contiguous(&kAnything, DType::kFloat32,
                                               {shape[0], shape[1], shape[2], shape[3]});
    tensor.dtype = type == ScalarType::Double     ? DType::kFloat64
                   : type == ScalarType::BFloat16 ? DType::kBFloat16
                   : type == ScalarType::Half     ? DType::kFloat16
                                                  : DType::kFloat32;
    return tensor;
  };
  AttentionProblem problem;
  problem.query = view(query);
  problem.key = view(key);
  problem.value = view(value);
  const Expected<AttentionPlan> plan = PlanAttention(problem, Options(true));
  ThrowIfError(plan.status());
  return plan->saved_bytes;
}

#define FLASH_ENTMAX_SCHEMA                                                                    \
  "Tensor query, Tensor key, Tensor value, Tensor? alpha, Tensor? query_scale, Tensor? bias, " \
  "Tensor? alibi_slopes, Tensor? key_lengths, Tensor? key_mask, Tensor? cu_query, "            \
  "Tensor? cu_key, float alpha_value, float? scale, bool causal, int? window_left, "           \
  "int? window_right, float softcap, int max_query_length, int max_key_length"

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flash_entmax, library) {
  // The first gets a gradient in Python; the second is the bare computation that it consists of.
  library.def("attention(" FLASH_ENTMAX_SCHEMA ", bool save) -> (Tensor, Tensor, Tensor)");
  library.def("attention_forward(" FLASH_ENTMAX_SCHEMA ", bool save) -> (Tensor, Tensor, Tensor)");
  library.def("attention_backward(" FLASH_ENTMAX_SCHEMA
              ", Tensor grad, Tensor saved, int wanted) -> "
              "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("attention_support(" FLASH_ENTMAX_SCHEMA ") -> (Tensor, Tensor, Tensor)");
  library.def(
      "attention_saved_bytes(int[] query, int[] key, int[] value, ScalarType dtype) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(flash_entmax, CPU, library) {
  library.impl("attention", TORCH_BOX(&Forward));
  library.impl("attention_forward", TORCH_BOX(&Forward));
  library.impl("attention_backward", TORCH_BOX(&Backward));
  library.impl("attention_support", TORCH_BOX(&Support));
}

STABLE_TORCH_LIBRARY_IMPL(flash_entmax, CompositeExplicitAutograd, library) {
  library.impl("attention_saved_bytes", TORCH_BOX(&SavedBytes));
}

}  // namespace flash_entmax::python
