#include "attention_checks.h"

#include <cmath>
#include <limits>
#include <string>

namespace flash_entmax {
namespace {

// Positions are kept in 32 bits in lists of keys.
constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max() - 4096;

Status CheckFourDimensions(const std::string& name, const TensorView& tensor,
                           const std::string& shape) {
  if (!tensor && tensor.rank == 0) return BadArgument(name, "nothing", shape);
  if (tensor.rank != 4) return BadArgument(name, "shape " + ShapeToString(tensor), shape);
  if (!IsFloating(tensor.dtype)) {
    return BadArgument(name, NameOf(tensor.dtype), "float64, float32, bfloat16 or float16");
  }
  return CheckView(name, tensor);
}

}  // namespace

Status CheckAttentionShapes(const AttentionProblem& problem) {
  const TensorView& query = problem.query;
  const TensorView& key = problem.key;
  const TensorView& value = problem.value;
  for (const Status& status :
       {CheckFourDimensions("query", query, "[batch, heads, query_length, head_size]"),
        CheckFourDimensions("key", key, "[batch, kv_heads, key_length, head_size]"),
        CheckFourDimensions("value", value, "[batch, kv_heads, key_length, value_size]")}) {
    if (!status.ok()) return status;
  }
  for (const TensorView* tensor : {&key, &value}) {
    const char* name = tensor == &key ? "key" : "value";
    if (tensor->dtype != query.dtype) {
      return BadArgument(name, NameOf(tensor->dtype),
                         std::string("of the type of query, ") + NameOf(query.dtype));
    }
    if (tensor->shape[0] != query.shape[0]) {
      return BadArgument(name, "batch " + Number(tensor->shape[0]),
                         "of the batch of query, " + Number(query.shape[0]));
    }
  }
  if (query.shape[3] < 1) return BadArgument("query", "head_size 0", "of head_size ≥ 1");
  if (value.shape[3] < 1) return BadArgument("value", "value_size 0", "of value_size ≥ 1");
  if (key.shape[3] != query.shape[3]) {
    return BadArgument("key", "head_size " + Number(key.shape[3]),
                       "of the head_size of query, " + Number(query.shape[3]));
  }
  if (value.shape[1] != key.shape[1] || value.shape[2] != key.shape[2]) {
    return BadArgument("value", "shape " + ShapeToString(value),
                       "of the kv_heads and key_length of key, " + ShapeToString(key));
  }
  const int64_t heads = query.shape[1];
  const int64_t kv_heads = key.shape[1];
  if (heads > 0 && (kv_heads == 0 || heads % kv_heads != 0)) {
    return BadArgument("key", Number(kv_heads) + " heads",
                       "a divisor of the " + Number(heads) + " heads of query");
  }
  if (query.shape[2] > kMaxLength) {
    return BadArgument("query", "length " + Number(query.shape[2]),
                       "at most " + Number(kMaxLength));
  }
  if (key.shape[2] > kMaxLength) {
    return BadArgument("key", "length " + Number(key.shape[2]), "at most " + Number(kMaxLength));
  }
  return Status::Ok();
}

Status CheckAttentionNumbers(const AttentionProblem& problem) {
  if (!problem.alpha_per_head && !(std::isfinite(problem.alpha) && problem.alpha > 0.0)) {
    return BadArgument("alpha", Number(problem.alpha), "finite and > 0");
  }
  if (problem.scale && !std::isfinite(*problem.scale)) {
    return BadArgument("scale", Number(*problem.scale), "finite");
  }
  if (!(std::isfinite(problem.softcap) && problem.softcap >= 0.0)) {
    return BadArgument("softcap", Number(problem.softcap), "finite and ≥ 0");
  }
  if (problem.query.dtype != DType::kFloat64) {  // Computed in float32.
    constexpr double kLargest = static_cast<double>(std::numeric_limits<float>::max());
    constexpr double kSmallest = static_cast<double>(std::numeric_limits<float>::min());
    if (problem.scale && !(std::abs(*problem.scale) <= kLargest)) {
      return BadArgument("scale", Number(*problem.scale), "at most 3.4e38, or use float64");
    }
    if (problem.softcap != 0.0 && !(problem.softcap >= kSmallest && problem.softcap <= kLargest)) {
      return BadArgument("softcap", Number(problem.softcap),
                         "0 or in [1.2e-38, 3.4e38], or use float64");
    }
  }
  if (problem.window_left && *problem.window_left < 0) {
    return BadArgument("window_left", Number(*problem.window_left), "≥ 0");
  }
  if (problem.window_right && *problem.window_right < 0) {
    return BadArgument("window_right", Number(*problem.window_right), "≥ 0");
  }
  return Status::Ok();
}

Status BroadcastOptionalTensors(const AttentionProblem& problem, ResolvedAttention* resolved) {
  if (problem.query_scale) {
    if (!IsFloating(problem.query_scale.dtype)) {
      return BadArgument("query_scale", NameOf(problem.query_scale.dtype), "floating point");
    }
    if (Status status = CheckView("query_scale", problem.query_scale); !status.ok()) return status;
    const Shape shape{3, {resolved->batch, resolved->heads, resolved->query_length}};
    Expected<TensorView> view = BroadcastTo("query_scale", problem.query_scale, shape);
    if (!view.ok()) return view.status();
    resolved->query_scale = *view;
  }
  if (problem.key_mask) {
    if (problem.key_mask.dtype != DType::kUInt8) {
      return BadArgument("key_mask", NameOf(problem.key_mask.dtype), "uint8");
    }
    if (Status status = CheckView("key_mask", problem.key_mask); !status.ok()) return status;
    const Shape shape{2, {resolved->batch, resolved->key_length}};
    Expected<TensorView> view = BroadcastTo("key_mask", problem.key_mask, shape);
    if (!view.ok()) return view.status();
    resolved->key_mask = *view;
  }
  if (problem.bias) {
    if (!IsFloating(problem.bias.dtype)) {
      return BadArgument("bias", NameOf(problem.bias.dtype), "floating point");
    }
    if (Status status = CheckView("bias", problem.bias); !status.ok()) return status;
    const Shape shape{
        4, {resolved->batch, resolved->heads, resolved->query_length, resolved->key_length}};
    Expected<TensorView> view = BroadcastTo("bias", problem.bias, shape);
    if (!view.ok()) return view.status();
    resolved->bias = *view;
  }
  return Status::Ok();
}

std::vector<std::pair<const char*, const TensorView*>> NamedInputs(
    const AttentionProblem& problem) {
  return {{"query", &problem.query},
          {"key", &problem.key},
          {"value", &problem.value},
          {"alpha_per_head", &problem.alpha_per_head},
          {"query_scale", &problem.query_scale},
          {"key_lengths", &problem.key_lengths},
          {"key_mask", &problem.key_mask},
          {"bias", &problem.bias},
          {"alibi_slopes", &problem.alibi_slopes},
          {"cu_query", &problem.cu_query},
          {"cu_key", &problem.cu_key}};
}

Status CheckOutputShape(const std::string& name, const MutableTensorView& tensor,
                        const Shape& shape) {
  bool same = tensor.rank == shape.rank;
  for (int i = 0; same && i < shape.rank; ++i) same = tensor.shape[i] == shape.size[i];
  if (!same) {
    TensorView wanted;
    wanted.rank = shape.rank;
    wanted.shape = shape.size;
    return BadArgument(name, "shape " + ShapeToString(tensor.view()), ShapeToString(wanted));
  }
  return CheckWritable(name, tensor);
}

}  // namespace flash_entmax
