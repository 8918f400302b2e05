// Argument checks and dispatch of attention: the only code that knows every engine.

#include "flash_entmax/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "attention_checks.h"
#include "attention_resolved.h"
#include "math/element.h"
#include "views.h"

namespace flash_entmax {
namespace {

bool IsInteger(DType dtype) { return dtype == DType::kInt32 || dtype == DType::kInt64; }

int64_t ReadInteger(const TensorView& tensor, int64_t index) {
  const int64_t offset = index * tensor.strides[0];
  return tensor.dtype == DType::kInt32 ? static_cast<const int32_t*>(tensor.data)[offset]
                                       : static_cast<const int64_t*>(tensor.data)[offset];
}

// One number a head, at least 0; above it if `positive`.
Status ReadPerHead(const std::string& name, const TensorView& tensor, int64_t heads, bool positive,
                   std::vector<double>* values) {
  if (tensor.dtype != DType::kFloat32 && tensor.dtype != DType::kFloat64) {
    return BadArgument(name, NameOf(tensor.dtype), "float32 or float64");
  }
  if (tensor.rank != 1 || tensor.shape[0] != heads) {
    return BadArgument(name, "shape " + ShapeToString(tensor), "[" + Number(heads) + "]");
  }
  if (Status status = CheckView(name, tensor); !status.ok()) return status;
  for (int64_t head = 0; head < heads; ++head) {
    const double value = ReadElement(tensor, head * tensor.strides[0]);
    if (!(std::isfinite(value) && (positive ? value > 0.0 : value >= 0.0))) {
      return BadArgument(name, Number(value) + " for head " + Number(head),
                         positive ? "finite and > 0" : "finite and ≥ 0");
    }
    (*values)[static_cast<size_t>(head)] = value;
  }
  return Status::Ok();
}

PositionMask MaskOf(const AttentionProblem& problem, int64_t query_length, int64_t key_length) {
  PositionMask mask;
  mask.query_length = query_length;
  mask.key_length = key_length;
  mask.causal = problem.causal;
  if (problem.window_left) {
    mask.window_left = std::min(*problem.window_left, PositionMask::kNoWindow);
  }
  if (problem.window_right) {
    mask.window_right = std::min(*problem.window_right, PositionMask::kNoWindow);
  }
  return mask;
}

Status CheckOffsets(const std::string& name, const TensorView& offsets, int64_t length) {
  if (!IsInteger(offsets.dtype)) return BadArgument(name, NameOf(offsets.dtype), "int32 or int64");
  if (offsets.rank != 1 || offsets.shape[0] < 1) {
    return BadArgument(name, "shape " + ShapeToString(offsets), "[sequences + 1]");
  }
  if (Status status = CheckView(name, offsets); !status.ok()) return status;
  int64_t previous = 0;
  for (int64_t i = 0; i < offsets.shape[0]; ++i) {
    const int64_t value = ReadInteger(offsets, i);
    if (value < previous || value > length || (i == 0 && value != 0)) {
      return BadArgument(name, Number(value) + " at " + Number(i),
                         "ascending from 0 to at most the length, " + Number(length));
    }
    previous = value;
  }
  if (previous != length) {
    return BadArgument(name, "last offset " + Number(previous), "the length, " + Number(length));
  }
  return Status::Ok();
}

Status ListSequences(const AttentionProblem& problem, ResolvedAttention* resolved) {
  const bool packed = problem.cu_query || problem.cu_key;
  if (packed) {
    if (!problem.cu_query || !problem.cu_key) {
      return BadArgument(problem.cu_query ? "cu_key" : "cu_query", "nothing",
                         "given together with the other");
    }
    if (resolved->batch != 1) {
      return BadArgument("query", "batch " + Number(resolved->batch), "1 with cu_query");
    }
    if (problem.key_lengths || problem.key_mask || problem.bias) {
      return BadArgument(problem.key_lengths ? "key_lengths"
                         : problem.key_mask  ? "key_mask"
                                             : "bias",
                         "a tensor", "left out with cu_query");
    }
    for (const Status& status : {CheckOffsets("cu_query", problem.cu_query, resolved->query_length),
                                 CheckOffsets("cu_key", problem.cu_key, resolved->key_length)}) {
      if (!status.ok()) return status;
    }
    if (problem.cu_query.shape[0] != problem.cu_key.shape[0]) {
      return BadArgument("cu_key", "shape " + ShapeToString(problem.cu_key),
                         "that of cu_query, " + ShapeToString(problem.cu_query));
    }
    for (int64_t i = 0; i + 1 < problem.cu_query.shape[0]; ++i) {
      const int64_t query = ReadInteger(problem.cu_query, i);
      const int64_t key = ReadInteger(problem.cu_key, i);
      resolved->sequences.push_back({0, query, key,
                                     MaskOf(problem, ReadInteger(problem.cu_query, i + 1) - query,
                                            ReadInteger(problem.cu_key, i + 1) - key)});
    }
    return Status::Ok();
  }
  if (problem.key_lengths) {
    const TensorView& lengths = problem.key_lengths;
    if (!IsInteger(lengths.dtype)) {
      return BadArgument("key_lengths", NameOf(lengths.dtype), "int32 or int64");
    }
    if (lengths.rank != 1 || lengths.shape[0] != resolved->batch) {
      return BadArgument("key_lengths", "shape " + ShapeToString(lengths),
                         "[" + Number(resolved->batch) + "]");
    }
    if (Status status = CheckView("key_lengths", lengths); !status.ok()) return status;
  }
  for (int64_t b = 0; b < resolved->batch; ++b) {
    int64_t keys = resolved->key_length;
    if (problem.key_lengths) {
      keys = ReadInteger(problem.key_lengths, b);
      if (keys < 0 || keys > resolved->key_length) {
        return BadArgument("key_lengths", Number(keys) + " at " + Number(b),
                           "in [0, " + Number(resolved->key_length) + "]");
      }
    }
    resolved->sequences.push_back({b, 0, 0, MaskOf(problem, resolved->query_length, keys)});
  }
  return Status::Ok();
}

// More entries than this many bytes have are a mistake, and their sum could overflow.
constexpr int64_t kMaxSupportCapacity = int64_t{1} << 48;

Status CheckOptions(const AttentionOptions& options) {
  if (options.num_threads < 0) {
    return BadArgument("num_threads", Number(options.num_threads), "≥ 0");
  }
  if (options.support_capacity < -1 || options.support_capacity > kMaxSupportCapacity) {
    return BadArgument("support_capacity", Number(options.support_capacity),
                       "-1 or in [0, " + Number(kMaxSupportCapacity) + "]");
  }
  return Status::Ok();
}

Status CheckSaved(const AttentionBuffer& saved, int64_t bytes) {
  if (saved.data == nullptr) {
    return BadArgument("saved", "nothing", "a buffer of " + Number(bytes) + " bytes");
  }
  if (saved.bytes < bytes) {
    return BadArgument("saved", Number(saved.bytes) + " bytes",
                       "of at least " + Number(bytes) + " bytes");
  }
  if (reinterpret_cast<uintptr_t>(saved.data) % 64 != 0) {
    return BadArgument("saved", "a misaligned pointer", "aligned to 64 bytes");
  }
  return Status::Ok();
}

}  // namespace

Expected<ResolvedAttention> ResolveAttention(const AttentionProblem& problem) {
  if (Status status = CheckAttentionShapes(problem); !status.ok()) return status;
  if (Status status = CheckAttentionNumbers(problem); !status.ok()) return status;
  ResolvedAttention resolved;
  resolved.batch = problem.query.shape[0];
  resolved.heads = problem.query.shape[1];
  resolved.kv_heads = problem.key.shape[1];
  resolved.query_length = problem.query.shape[2];
  resolved.key_length = problem.key.shape[2];
  resolved.head_size = problem.query.shape[3];
  resolved.value_size = problem.value.shape[3];
  resolved.scale =
      problem.scale ? *problem.scale : 1.0 / std::sqrt(static_cast<double>(resolved.head_size));
  const auto heads = static_cast<size_t>(resolved.heads);
  resolved.alpha.assign(heads, problem.alpha);
  resolved.slope.assign(heads, 0.0);
  if (problem.alpha_per_head) {
    if (Status status = ReadPerHead("alpha_per_head", problem.alpha_per_head, resolved.heads,
                                    /*positive=*/true, &resolved.alpha);
        !status.ok()) {
      return status;
    }
  }
  if (problem.alibi_slopes) {
    if (Status status = ReadPerHead("alibi_slopes", problem.alibi_slopes, resolved.heads,
                                    /*positive=*/false, &resolved.slope);
        !status.ok()) {
      return status;
    }
  }
  if (Status status = BroadcastOptionalTensors(problem, &resolved); !status.ok()) return status;
  if (Status status = ListSequences(problem, &resolved); !status.ok()) return status;
  return resolved;
}

Status CheckAttention(const AttentionProblem& problem) {
  try {
    return ResolveAttention(problem).status();
  } catch (const std::bad_alloc&) {
    return Status::OutOfMemory("query: no memory for the list of sequences");
  }
}

Status CheckAttentionOutputs(const AttentionProblem& problem, const AttentionOutputs& outputs) {
  if (Status status = CheckAttention(problem); !status.ok()) return status;
  const TensorView& query = problem.query;
  const MutableTensorView& output = outputs.output;
  if (output.dtype != query.dtype) {
    return BadArgument("output", NameOf(output.dtype),
                       std::string("of the type of query, ") + NameOf(query.dtype));
  }
  const Shape rows{3, {query.shape[0], query.shape[1], query.shape[2]}};
  Shape output_shape{4, rows.size};
  output_shape.size[3] = problem.value.shape[3];
  if (Status status = CheckOutputShape("output", output, output_shape); !status.ok()) return status;
  if (outputs.threshold) {
    const MutableTensorView& threshold = outputs.threshold;
    if (threshold.dtype != DType::kFloat32 && threshold.dtype != DType::kFloat64) {
      return BadArgument("threshold", NameOf(threshold.dtype), "float32 or float64");
    }
    if (Status status = CheckOutputShape("threshold", threshold, rows); !status.ok()) {
      return status;
    }
  }
  for (const auto& [name, input] : NamedInputs(problem)) {
    for (const Status& status :
         {CheckDisjoint("output", output.view(), name, *input),
          CheckDisjoint("threshold", outputs.threshold.view(), name, *input)}) {
      if (!status.ok()) return status;
    }
  }
  return CheckDisjoint("threshold", outputs.threshold.view(), "output", output.view());
}

Expected<AttentionPlan> PlanAttention(const AttentionProblem& problem,
                                      const AttentionOptions& options) {
  if (Status status = CheckOptions(options); !status.ok()) return status;
  try {
    Expected<ResolvedAttention> resolved = ResolveAttention(problem);
    if (!resolved.ok()) return resolved.status();
    AttentionPlan plan = cpu::PlanForward(problem, *resolved, options);
    cpu::PlanBackward(problem, *resolved, options, &plan);
    return plan;
  } catch (const std::bad_alloc&) {
    return Status::OutOfMemory("query: no memory for the list of sequences");
  }
}

Status AttentionForward(const AttentionProblem& problem, const AttentionOutputs& outputs,
                        const AttentionOptions& options, AttentionBuffer saved) {
  if (Status status = CheckAttentionOutputs(problem, outputs); !status.ok()) return status;
  if (Status status = CheckOptions(options); !status.ok()) return status;
  try {
    Expected<ResolvedAttention> resolved = ResolveAttention(problem);
    if (!resolved.ok()) return resolved.status();
    if (options.save_for_backward) {
      AttentionPlan plan;
      cpu::PlanBackward(problem, *resolved, options, &plan);
      if (Status status = CheckSaved(saved, plan.saved_bytes); !status.ok()) return status;
    }
    return cpu::RunForward(problem, *resolved, outputs, options, saved);
  } catch (const std::bad_alloc&) {
    return Status::OutOfMemory("query: no memory for the workspace; see PlanAttention");
  }
}

Status AttentionBackward(const AttentionProblem& problem, const AttentionGradients& gradients,
                         const AttentionOptions& options, AttentionBuffer saved) {
  if (Status status = CheckAttentionGradients(problem, gradients); !status.ok()) return status;
  if (Status status = CheckOptions(options); !status.ok()) return status;
  try {
    Expected<ResolvedAttention> resolved = ResolveAttention(problem);
    if (!resolved.ok()) return resolved.status();
    AttentionOptions saving = options;
    saving.save_for_backward = true;
    AttentionPlan plan;
    cpu::PlanBackward(problem, *resolved, saving, &plan);
    if (Status status = CheckSaved(saved, plan.saved_bytes); !status.ok()) return status;
    return cpu::RunBackward(problem, *resolved, gradients, saving, saved);
  } catch (const std::bad_alloc&) {
    return Status::OutOfMemory("query: no memory for the workspace; see PlanAttention");
  }
}

}  // namespace flash_entmax
