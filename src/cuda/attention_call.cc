#include "attention_call.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_checks.h"
#include "views.h"

namespace flash_entmax::cuda {
namespace {

// Positions and windows are 32-bit numbers on the device.
constexpr int64_t kMaxLength = GeneralProblem::kUnlimited - 1;
constexpr int64_t kMaxHeadSize = 256;

Status Unimplemented(const std::string& name, const std::string& got, const std::string& allowed) {
  return Status::Unimplemented(name + ": got " + got + "; on the GPU it must be " + allowed);
}

// A contiguous vector of `count` numbers on the device.
Status CheckVector(const std::string& name, const TensorView& tensor, DType dtype, int64_t count) {
  if (tensor.dtype != dtype) return Unimplemented(name, NameOf(tensor.dtype), NameOf(dtype));
  if (tensor.rank != 1 || (count >= 0 && tensor.shape[0] != count) || tensor.shape[0] < 1) {
    return BadArgument(name, "shape " + ShapeToString(tensor),
                       count >= 0 ? "[" + Number(count) + "]" : "[sequences + 1]");
  }
  if (tensor.shape[0] > 1 && tensor.strides[0] != 1) {
    return Unimplemented(name, "stride " + Number(tensor.strides[0]), "contiguous");
  }
  return CheckView(name, tensor);
}

Status CheckSupported(const AttentionProblem& problem) {
  const TensorView& query = problem.query;
  if (query.dtype == DType::kFloat64) {
    return Unimplemented("query", "float64", "bfloat16, float16 or float32");
  }
  if (query.shape[3] > kMaxHeadSize) {
    return Unimplemented("query", "head_size " + Number(query.shape[3]),
                         "of head_size at most 256");
  }
  if (problem.value.shape[3] > kMaxHeadSize) {
    return Unimplemented("value", "value_size " + Number(problem.value.shape[3]),
                         "of value_size at most 256");
  }
  if (query.shape[2] > kMaxLength) {
    return Unimplemented("query", "length " + Number(query.shape[2]),
                         "of length at most " + Number(kMaxLength));
  }
  if (problem.key.shape[2] > kMaxLength) {
    return Unimplemented("key", "length " + Number(problem.key.shape[2]),
                         "of length at most " + Number(kMaxLength));
  }
  constexpr int64_t kMaxInt = std::numeric_limits<int>::max();
  if (query.shape[0] > kMaxInt || query.shape[1] > kMaxInt ||
      query.shape[0] * query.shape[1] > kMaxInt) {
    return Unimplemented("query", "shape " + ShapeToString(query), "of fewer than 2^31 heads");
  }
  if (!problem.alpha_per_head && !(problem.alpha > 1.0 && problem.alpha <= 2.0)) {
    return Unimplemented("alpha", Number(problem.alpha), "in (1, 2]");
  }
  if (problem.key_mask) return Unimplemented("key_mask", "a tensor", "left out; see key_lengths");
  if (problem.bias) return Unimplemented("bias", "a tensor", "left out");
  return Status::Ok();
}

Status ResolvePacked(const AttentionProblem& problem, const gpu::AttentionOptions& options,
                     GeneralProblem* resolved) {
  if (!problem.cu_query || !problem.cu_key) {
    return BadArgument(problem.cu_query ? "cu_key" : "cu_query", "nothing",
                       "given together with the other");
  }
  if (resolved->batch != 1) {
    return BadArgument("query", "batch " + Number(resolved->batch), "1 with cu_query");
  }
  if (problem.key_lengths) return BadArgument("key_lengths", "a tensor", "left out with cu_query");
  if (Status status = CheckVector("cu_query", problem.cu_query, DType::kInt32, -1); !status.ok()) {
    return status;
  }
  if (Status status =
          CheckVector("cu_key", problem.cu_key, DType::kInt32, problem.cu_query.shape[0]);
      !status.ok()) {
    return status;
  }
  resolved->cu_query = static_cast<const int*>(problem.cu_query.data);
  resolved->cu_key = static_cast<const int*>(problem.cu_key.data);
  resolved->sequences = static_cast<int>(problem.cu_query.shape[0] - 1);
  const auto longest = [](int64_t given, int length) {
    return given > 0 ? static_cast<int>(std::min<int64_t>(given, length)) : length;
  };
  resolved->longest_query = longest(options.max_query_length, resolved->queries);
  resolved->longest_key = longest(options.max_key_length, resolved->keys);
  return Status::Ok();
}

int WindowOf(const std::optional<int64_t>& window) {
  return window ? static_cast<int>(std::min<int64_t>(*window, GeneralProblem::kUnlimited))
                : GeneralProblem::kUnlimited;
}

Status ResolveFeatures(const AttentionProblem& problem, const gpu::AttentionOptions& options,
                       GeneralProblem* resolved) {
  if (problem.alpha_per_head) {
    if (Status status =
            CheckVector("alpha_per_head", problem.alpha_per_head, DType::kFloat32, resolved->heads);
        !status.ok()) {
      return status;
    }
    resolved->alpha_per_head = static_cast<const float*>(problem.alpha_per_head.data);
  }
  if (problem.alibi_slopes) {
    if (Status status =
            CheckVector("alibi_slopes", problem.alibi_slopes, DType::kFloat32, resolved->heads);
        !status.ok()) {
      return status;
    }
    resolved->slopes = static_cast<const float*>(problem.alibi_slopes.data);
  }
  if (problem.query_scale) {
    if (problem.query_scale.dtype != DType::kFloat32) {
      return Unimplemented("query_scale", NameOf(problem.query_scale.dtype), "float32");
    }
    ResolvedAttention sizes;
    sizes.batch = resolved->batch;
    sizes.heads = resolved->heads;
    sizes.query_length = resolved->queries;
    AttentionProblem only_scale;
    only_scale.query_scale = problem.query_scale;
    if (Status status = BroadcastOptionalTensors(only_scale, &sizes); !status.ok()) return status;
    resolved->query_scale = static_cast<const float*>(sizes.query_scale.data);
    for (int i = 0; i < 3; ++i) resolved->query_scale_stride[i] = sizes.query_scale.strides[i];
  }
  if (problem.cu_query || problem.cu_key) return ResolvePacked(problem, options, resolved);
  resolved->sequences = resolved->batch;
  resolved->longest_query = resolved->queries;
  resolved->longest_key = resolved->keys;
  if (problem.key_lengths) {
    if (Status status =
            CheckVector("key_lengths", problem.key_lengths, DType::kInt32, resolved->batch);
        !status.ok()) {
      return status;
    }
    resolved->key_lengths = static_cast<const int*>(problem.key_lengths.data);
  }
  return Status::Ok();
}

}  // namespace

Status FromCuda(cudaError_t error, const std::string& action) {
  if (error == cudaSuccess) return Status::Ok();
  return Status::Device(action + ": " + cudaGetErrorString(error));
}

Expected<DeviceInfo> FindDevice() {
  int device = 0;
  if (Status status = FromCuda(cudaGetDevice(&device), "looking for a GPU"); !status.ok()) {
    return status;
  }
  DeviceInfo info;
  for (const auto& [value, attribute] :
       {std::pair{&info.major, cudaDevAttrComputeCapabilityMajor},
        std::pair{&info.minor, cudaDevAttrComputeCapabilityMinor},
        std::pair{&info.multiprocessors, cudaDevAttrMultiProcessorCount}}) {
    if (Status status =
            FromCuda(cudaDeviceGetAttribute(value, attribute, device), "reading the GPU's data");
        !status.ok()) {
      return status;
    }
  }
  if (info.major < 8) {
    return Status::Device("device " + Number(device) + ": compute capability " +
                          Number(info.major) + "." + Number(info.minor) + "; must be 8.0 or later");
  }
  return info;
}

StridedTensor ToStrided(const TensorView& tensor) {
  StridedTensor result;
  result.data = const_cast<void*>(tensor.data);
  // The stride of a dimension of size 1 is never used.
  result.batch = tensor.shape[0] > 1 ? tensor.strides[0] : 0;
  result.head = tensor.shape[1] > 1 ? tensor.strides[1] : 0;
  result.row = tensor.shape[2] > 1 ? tensor.strides[2] : 0;
  result.column = tensor.shape[3] > 1 ? tensor.strides[3] : 1;
  const int64_t vector = 16 / SizeOf(tensor.dtype);
  const auto aligned = [&](int dimension) {
    return tensor.shape[dimension] <= 1 || tensor.strides[dimension] % vector == 0;
  };
  result.vectors = result.column == 1 && reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 &&
                   tensor.shape[3] % vector == 0 && aligned(0) && aligned(1) && aligned(2);
  return result;
}

Expected<AttentionCall> ResolveCall(const AttentionProblem& problem,
                                    const gpu::AttentionOptions& options) {
  for (const Status& status : {CheckAttentionShapes(problem), CheckAttentionNumbers(problem)}) {
    if (!status.ok()) return status;
  }
  if (Status status = CheckSupported(problem); !status.ok()) return status;
  if (options.support_capacity < -1) {
    return BadArgument("support_capacity", Number(options.support_capacity), "-1 or more");
  }
  AttentionCall call;
  call.dtype = problem.query.dtype;
  call.query = ToStrided(problem.query);
  call.key = ToStrided(problem.key);
  call.value = ToStrided(problem.value);
  call.stream = static_cast<cudaStream_t>(options.stream);
  call.save = options.save_for_backward;
  call.alpha_gradient = options.alpha_gradient;
  call.support_capacity = options.support_capacity;
  call.visit_all_tiles = options.visit_all_tiles;
  GeneralProblem& resolved = call.problem;
  resolved.batch = static_cast<int>(problem.query.shape[0]);
  resolved.heads = static_cast<int>(problem.query.shape[1]);
  resolved.kv_heads = static_cast<int>(problem.key.shape[1]);
  resolved.group = resolved.kv_heads > 0 ? resolved.heads / resolved.kv_heads : 1;
  resolved.queries = static_cast<int>(problem.query.shape[2]);
  resolved.keys = static_cast<int>(problem.key.shape[2]);
  resolved.head_dim = static_cast<int>(problem.query.shape[3]);
  resolved.value_dim = static_cast<int>(problem.value.shape[3]);
  resolved.alpha = static_cast<float>(problem.alpha);
  // An alpha that rounds to 1 in fp32 has no inverse order.
  if (!problem.alpha_per_head && !(resolved.alpha > 1.0f)) {
    return Unimplemented("alpha", Number(problem.alpha), "at least 1.0000002");
  }
  resolved.scale = static_cast<float>(
      problem.scale ? *problem.scale : 1.0 / std::sqrt(static_cast<double>(resolved.head_dim)));
  resolved.softcap = static_cast<float>(problem.softcap);
  resolved.causal = problem.causal;
  resolved.window_left = WindowOf(problem.window_left);
  resolved.window_right = WindowOf(problem.window_right);
  if (Status status = ResolveFeatures(problem, options, &resolved); !status.ok()) return status;
  return call;
}

}  // namespace flash_entmax::cuda
