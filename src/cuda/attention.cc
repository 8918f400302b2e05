// gpu.h: checks, the choice of an engine, dispatch.

#include <new>
#include <tuple>
#include <utility>

#include "attention_checks.h"
#include "engines.h"
#include "general/support.h"
#include "views.h"

namespace flash_entmax::gpu {
namespace {

using cuda::AttentionCall;
using cuda::DeviceInfo;

// Rows this short are fastest with their scores in registers; beyond it screening pays.
constexpr int kShortRow = 512;

// A checked problem with the engine it runs on.
struct Prepared {
  AttentionCall call;
  DeviceInfo device;
  AttentionPlan plan;
};

Expected<Engine> ChooseEngine(const AttentionCall& call, const DeviceInfo& device, Engine wanted) {
  if (wanted == Engine::kGeneral || call.Empty()) return Engine::kGeneral;
  const Status hopper = cuda::CheckHopper(call, device);
  if (wanted == Engine::kAutomatic) {
    return hopper.ok() && call.problem.keys > kShortRow ? Engine::kScreening : Engine::kGeneral;
  }
  if (!hopper.ok()) return hopper;
  return wanted;
}

Expected<Prepared> Prepare(const AttentionProblem& problem, const AttentionOptions& options) {
  Expected<AttentionCall> call = cuda::ResolveCall(problem, options);
  if (!call.ok()) return call.status();
  Expected<DeviceInfo> device = cuda::FindDevice();
  if (!device.ok()) return device.status();
  Expected<Engine> engine = ChooseEngine(*call, *device, options.engine);
  if (!engine.ok()) return engine.status();
  Expected<AttentionPlan> plan =
      *engine == Engine::kGeneral ? cuda::PlanGeneral(*call) : cuda::PlanHopper(*call, *engine);
  if (!plan.ok()) return plan.status();
  return Prepared{*call, *device, *std::move(plan)};
}

Status CheckBuffer(const std::string& name, const DeviceBuffer& buffer, int64_t needed) {
  if (needed == 0) return Status::Ok();
  if (buffer.data == nullptr || buffer.bytes < needed) {
    return BadArgument(name, std::to_string(buffer.data == nullptr ? 0 : buffer.bytes) + " bytes",
                       "at least " + std::to_string(needed) + " bytes; see PlanAttention");
  }
  if (reinterpret_cast<uintptr_t>(buffer.data) % 256 != 0) {
    return BadArgument(name, "a misaligned pointer", "aligned to 256 bytes");
  }
  return Status::Ok();
}

// A result of this type and shape, which may share no memory with the inputs.
Status CheckResult(const std::string& name, const MutableTensorView& tensor, DType dtype,
                   const Shape& shape, const AttentionProblem& problem) {
  if (tensor.dtype != dtype) return BadArgument(name, NameOf(tensor.dtype), NameOf(dtype));
  if (Status status = CheckOutputShape(name, tensor, shape); !status.ok()) return status;
  for (const auto& [other, input] :
       {std::pair{"query", &problem.query}, std::pair{"key", &problem.key},
        std::pair{"value", &problem.value}, std::pair{"query_scale", &problem.query_scale}}) {
    if (Status status = CheckDisjoint(name, tensor.view(), other, *input); !status.ok()) {
      return status;
    }
  }
  return Status::Ok();
}

Status CheckContiguous(const std::string& name, const TensorView& tensor) {
  int64_t stride = 1;
  for (int i = tensor.rank - 1; i >= 0; --i) {
    if (tensor.shape[i] > 1 && tensor.strides[i] != stride) {
      return BadArgument(name, "strides that leave gaps", "contiguous");
    }
    stride *= tensor.shape[i];
  }
  return Status::Ok();
}

Shape RowShape(const AttentionProblem& problem) {
  return {3, {problem.query.shape[0], problem.query.shape[1], problem.query.shape[2]}};
}

Shape OutputShape(const AttentionProblem& problem) {
  Shape shape = RowShape(problem);
  shape.rank = 4;
  shape.size[3] = problem.value.shape[3];
  return shape;
}

Status CheckOutputs(const AttentionProblem& problem, const AttentionOutputs& outputs) {
  if (Status status =
          CheckResult("output", outputs.output, problem.query.dtype, OutputShape(problem), problem);
      !status.ok()) {
    return status;
  }
  if (!outputs.threshold) return Status::Ok();
  return CheckResult("threshold", outputs.threshold, DType::kFloat32, RowShape(problem), problem);
}

Status CheckGradients(const AttentionProblem& problem, const AttentionOptions& options,
                      const AttentionGradients& gradients) {
  if (!options.save_for_backward) {
    return BadArgument("save_for_backward", "false", "true for a backward pass");
  }
  const DType dtype = problem.query.dtype;
  const TensorView& output = gradients.output;
  if (output.dtype != dtype) {
    return BadArgument("output gradient", NameOf(output.dtype), NameOf(dtype));
  }
  const Shape wanted = OutputShape(problem);
  bool same = output.rank == wanted.rank;
  for (int i = 0; same && i < wanted.rank; ++i) same = output.shape[i] == wanted.size[i];
  if (!same) {
    return BadArgument("output gradient", "shape " + ShapeToString(output), "that of the output");
  }
  if (Status status = CheckView("output gradient", output); !status.ok()) return status;
  for (const auto& [name, gradient, input] :
       {std::tuple{"query gradient", &gradients.query, &problem.query},
        std::tuple{"key gradient", &gradients.key, &problem.key},
        std::tuple{"value gradient", &gradients.value, &problem.value}}) {
    if (Status status = CheckResult(name, *gradient, dtype, ShapeOf(*input), problem);
        !status.ok()) {
      return status;
    }
    if (Status status = CheckDisjoint(name, gradient->view(), "output gradient", output);
        !status.ok()) {
      return status;
    }
  }
  const Shape heads{1, {problem.query.shape[1]}};
  if (gradients.alpha) {
    if (!options.alpha_gradient) {
      return BadArgument("alpha gradient", "a tensor", "asked for by options.alpha_gradient");
    }
    if (Status status =
            CheckResult("alpha gradient", gradients.alpha, DType::kFloat32, heads, problem);
        !status.ok()) {
      return status;
    }
  }
  if (gradients.alibi_slopes) {
    if (!problem.alibi_slopes) {
      return BadArgument("alibi_slopes gradient", "a tensor", "left out without alibi_slopes");
    }
    if (Status status = CheckResult("alibi_slopes gradient", gradients.alibi_slopes,
                                    DType::kFloat32, heads, problem);
        !status.ok()) {
      return status;
    }
  }
  if (gradients.query_scale) {
    if (!problem.query_scale) {
      return BadArgument("query_scale gradient", "a tensor", "left out without query_scale");
    }
    if (Status status = CheckResult("query_scale gradient", gradients.query_scale, DType::kFloat32,
                                    RowShape(problem), problem);
        !status.ok()) {
      return status;
    }
    return CheckContiguous("query_scale gradient", gradients.query_scale.view());
  }
  return Status::Ok();
}

Status CheckThreshold(const AttentionProblem& problem, const TensorView& threshold) {
  if (threshold.dtype != DType::kFloat32) {
    return BadArgument("threshold", NameOf(threshold.dtype), "float32");
  }
  const Shape wanted = RowShape(problem);
  bool same = threshold.rank == wanted.rank;
  for (int i = 0; same && i < wanted.rank; ++i) same = threshold.shape[i] == wanted.size[i];
  if (!same) {
    return BadArgument("threshold", "shape " + ShapeToString(threshold),
                       "[batch, heads, query_length]");
  }
  return CheckView("threshold", threshold);
}

Status CheckList(const std::string& name, const TensorView& tensor, DType dtype) {
  if (tensor.dtype != dtype) return BadArgument(name, NameOf(tensor.dtype), NameOf(dtype));
  if (tensor.rank != 1) return BadArgument(name, "shape " + ShapeToString(tensor), "[entries]");
  if (Status status = CheckView(name, tensor); !status.ok()) return status;
  return CheckContiguous(name, tensor);
}

cuda::SupportCall ToSupportCall(const AttentionCall& call, const TensorView& threshold) {
  cuda::SupportCall support;
  support.problem = call.problem;
  support.query = call.query;
  support.key = call.key;
  support.threshold = static_cast<const float*>(threshold.data);
  for (int i = 0; i < 3; ++i) support.threshold_stride[i] = threshold.strides[i];
  return support;
}

}  // namespace

Expected<AttentionPlan> PlanAttention(const AttentionProblem& problem,
                                      const AttentionOptions& options) {
  Expected<Prepared> prepared = Prepare(problem, options);
  if (!prepared.ok()) return prepared.status();
  return std::move(prepared->plan);
}

Status AttentionForward(const AttentionProblem& problem, const AttentionOutputs& outputs,
                        const AttentionOptions& options, DeviceBuffer saved,
                        DeviceBuffer workspace) {
  Expected<Prepared> prepared = Prepare(problem, options);
  if (!prepared.ok()) return prepared.status();
  const auto& [call, device, plan] = *prepared;
  for (const Status& status :
       {CheckOutputs(problem, outputs), CheckBuffer("saved buffer", saved, plan.saved_bytes),
        CheckBuffer("workspace", workspace, plan.forward_bytes)}) {
    if (!status.ok()) return status;
  }
  if (call.Empty()) return Status::Ok();
  if (plan.engine == Engine::kGeneral) {
    return cuda::ForwardGeneral(call, device, outputs, saved.data, workspace.data);
  }
  return cuda::ForwardHopper(call, device, plan.engine, outputs, saved.data, workspace.data);
}

Status AttentionBackward(const AttentionProblem& problem, const AttentionGradients& gradients,
                         const AttentionOptions& options, DeviceBuffer saved,
                         DeviceBuffer workspace) {
  Expected<Prepared> prepared = Prepare(problem, options);
  if (!prepared.ok()) return prepared.status();
  const auto& [call, device, plan] = *prepared;
  for (const Status& status : {CheckGradients(problem, options, gradients),
                               CheckBuffer("saved buffer", saved, plan.saved_bytes),
                               CheckBuffer("workspace", workspace, plan.backward_bytes)}) {
    if (!status.ok()) return status;
  }
  if (plan.engine == Engine::kGeneral) {
    return cuda::BackwardGeneral(call, device, gradients, saved.data, workspace.data);
  }
  return cuda::BackwardHopper(call, device, plan.engine, gradients, saved.data, workspace.data);
}

Expected<int64_t> SupportWorkspaceBytes(const AttentionProblem& problem) {
  Expected<AttentionCall> call = cuda::ResolveCall(problem, {});
  if (!call.ok()) return call.status();
  return cuda::SupportOffsetsBytes(call->Rows());
}

Status SupportOffsets(const AttentionProblem& problem, const TensorView& threshold,
                      const AttentionOptions& options, MutableTensorView row_offsets,
                      DeviceBuffer workspace) {
  Expected<AttentionCall> call = cuda::ResolveCall(problem, options);
  if (!call.ok()) return call.status();
  Expected<DeviceInfo> device = cuda::FindDevice();
  if (!device.ok()) return device.status();
  for (const Status& status :
       {CheckThreshold(problem, threshold),
        CheckList("row_offsets", row_offsets.view(), DType::kInt64),
        CheckBuffer("workspace", workspace, cuda::SupportOffsetsBytes(call->Rows()))}) {
    if (!status.ok()) return status;
  }
  if (row_offsets.shape[0] != call->Rows() + 1) {
    return BadArgument("row_offsets", "shape " + ShapeToString(row_offsets.view()),
                       "[" + std::to_string(call->Rows() + 1) + "]");
  }
  return cuda::FromCuda(cuda::LaunchSupportOffsets(ToSupportCall(*call, threshold), call->dtype,
                                                   static_cast<int64_t*>(row_offsets.data),
                                                   workspace.data, workspace.bytes, call->stream),
                        "counting the support");
}

Status SupportEntries(const AttentionProblem& problem, const TensorView& threshold,
                      const AttentionOptions& options, const TensorView& row_offsets,
                      MutableTensorView key_index, MutableTensorView probability) {
  Expected<AttentionCall> call = cuda::ResolveCall(problem, options);
  if (!call.ok()) return call.status();
  Expected<DeviceInfo> device = cuda::FindDevice();
  if (!device.ok()) return device.status();
  for (const Status& status :
       {CheckThreshold(problem, threshold), CheckList("row_offsets", row_offsets, DType::kInt64),
        CheckList("key_index", key_index.view(), DType::kInt32),
        CheckList("probability", probability.view(), DType::kFloat32)}) {
    if (!status.ok()) return status;
  }
  if (row_offsets.shape[0] != call->Rows() + 1) {
    return BadArgument("row_offsets", "shape " + ShapeToString(row_offsets),
                       "[" + std::to_string(call->Rows() + 1) + "]");
  }
  if (probability.shape[0] != key_index.shape[0]) {
    return BadArgument("probability", "shape " + ShapeToString(probability.view()),
                       "that of key_index, " + ShapeToString(key_index.view()));
  }
  if (call->Empty() || key_index.shape[0] == 0) return Status::Ok();
  return cuda::FromCuda(cuda::LaunchSupportEntries(ToSupportCall(*call, threshold), call->dtype,
                                                   static_cast<const int64_t*>(row_offsets.data),
                                                   static_cast<int*>(key_index.data),
                                                   static_cast<float*>(probability.data),
                                                   key_index.shape[0], call->stream),
                        "writing the support");
}

Expected<std::string> DescribeDevice() {
  Expected<DeviceInfo> device = cuda::FindDevice();
  if (!device.ok()) return device.status();
  int index = 0;
  cudaDeviceProp properties;
  if (Status status = cuda::FromCuda(cudaGetDevice(&index), "looking for a GPU"); !status.ok()) {
    return status;
  }
  if (Status status =
          cuda::FromCuda(cudaGetDeviceProperties(&properties, index), "reading the GPU's data");
      !status.ok()) {
    return status;
  }
  return std::string(properties.name) + ", compute capability " + std::to_string(device->major) +
         "." + std::to_string(device->minor);
}

}  // namespace flash_entmax::gpu
