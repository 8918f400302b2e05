// The checks of what attention's backward pass reads and writes.

#include <string>
#include <utility>
#include <vector>

#include "attention_checks.h"
#include "attention_resolved.h"
#include "flash_entmax/attention.h"
#include "views.h"

namespace flash_entmax {
namespace {

// A gradient that may be left out; `like` is what it is the gradient of.
Status CheckGradient(const std::string& name, const MutableTensorView& gradient,
                     const std::string& like_name, const TensorView& like, bool same_type) {
  if (!gradient) return Status::Ok();
  if (!like && like.rank == 0) {
    return BadArgument(name, "a tensor", "left out where " + like_name + " is");
  }
  if (same_type && gradient.dtype != like.dtype) {
    return BadArgument(name, NameOf(gradient.dtype),
                       "of the type of " + like_name + ", " + NameOf(like.dtype));
  }
  if (!IsFloating(gradient.dtype)) {
    return BadArgument(name, NameOf(gradient.dtype), "floating point");
  }
  return CheckOutputShape(name, gradient, ShapeOf(like));
}

Status CheckPrecise(const std::string& name, const MutableTensorView& gradient) {
  if (!gradient || gradient.dtype == DType::kFloat32 || gradient.dtype == DType::kFloat64) {
    return Status::Ok();
  }
  return BadArgument(name, NameOf(gradient.dtype), "float32 or float64");
}

}  // namespace

Status CheckAttentionGradients(const AttentionProblem& problem,
                               const AttentionGradients& gradients) {
  if (Status status = CheckAttention(problem); !status.ok()) return status;
  TensorView output = problem.query;
  output.shape[3] = problem.value.shape[3];
  const TensorView& given = gradients.output;
  if (!given && given.rank == 0) return BadArgument("grad_output", "nothing", "a tensor");
  if (given.dtype != output.dtype) {
    return BadArgument("grad_output", NameOf(given.dtype),
                       std::string("of the type of query, ") + NameOf(output.dtype));
  }
  bool same = given.rank == 4;
  for (int i = 0; same && i < 4; ++i) same = given.shape[i] == output.shape[i];
  if (!same) {
    return BadArgument("grad_output", "shape " + ShapeToString(given), ShapeToString(output));
  }
  TensorView heads;
  heads.rank = 1;
  heads.shape[0] = problem.query.shape[1];
  for (const Status& status :
       {CheckView("grad_output", given),
        CheckGradient("grad_query", gradients.query, "query", problem.query, true),
        CheckGradient("grad_key", gradients.key, "key", problem.key, true),
        CheckGradient("grad_value", gradients.value, "value", problem.value, true),
        CheckGradient("grad_alpha", gradients.alpha, "alpha", heads, false),
        CheckPrecise("grad_alpha", gradients.alpha),
        CheckGradient("grad_bias", gradients.bias, "bias", problem.bias, false),
        CheckGradient("grad_alibi_slopes", gradients.alibi_slopes, "alibi_slopes",
                      problem.alibi_slopes, false),
        CheckPrecise("grad_alibi_slopes", gradients.alibi_slopes),
        CheckGradient("grad_query_scale", gradients.query_scale, "query_scale", problem.query_scale,
                      false),
        CheckPrecise("grad_query_scale", gradients.query_scale)}) {
    if (!status.ok()) return status;
  }
  const std::vector<std::pair<const char*, TensorView>> results = {
      {"grad_query", gradients.query.view()},
      {"grad_key", gradients.key.view()},
      {"grad_value", gradients.value.view()},
      {"grad_alpha", gradients.alpha.view()},
      {"grad_bias", gradients.bias.view()},
      {"grad_alibi_slopes", gradients.alibi_slopes.view()},
      {"grad_query_scale", gradients.query_scale.view()}};
  for (size_t i = 0; i < results.size(); ++i) {
    const auto& [name, result] = results[i];
    if (Status status = CheckDisjoint(name, result, "grad_output", given); !status.ok()) {
      return status;
    }
    for (const auto& [input_name, input] : NamedInputs(problem)) {
      if (Status status = CheckDisjoint(name, result, input_name, *input); !status.ok()) {
        return status;
      }
    }
    for (size_t j = 0; j < i; ++j) {
      if (Status status = CheckDisjoint(name, result, results[j].first, results[j].second);
          !status.ok()) {
        return status;
      }
    }
  }
  return Status::Ok();
}

}  // namespace flash_entmax
