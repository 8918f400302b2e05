// Buffers and dispatch of the general engine.

#include <algorithm>

#include "engines.h"
#include "general/launch.h"
#include "row_results.h"

// Declared, not included: the header's device code is nothing for a host compiler.
struct __nv_bfloat16;
struct __half;

namespace flash_entmax::cuda {
namespace {

struct SavedLayout {
  GeneralSaved saved;
  int64_t bytes = 0;
};

ShortBackwardPlan ShortPlan(const AttentionCall& call) {
  return ShortBackwardPlan::Of(call.problem, static_cast<int>(SizeOf(call.dtype)),
                               call.alpha_gradient);
}

SavedLayout LayOutSaved(const AttentionCall& call, void* base) {
  BufferPieces pieces(base);
  SavedLayout layout;
  layout.saved.threshold = pieces.Take<float>(call.Rows());
  if (call.save && ShortPlan(call).query_rows == 0) {
    layout.saved.weighted_value =
        pieces.Take<char>(call.Rows() * call.problem.value_dim * SizeOf(call.dtype));
  }
  layout.bytes = pieces.bytes();
  return layout;
}

// Shorter rows are done before bounds would be.
constexpr int kShortestBoundedRow = 512;

bool UsesBounds(const GeneralProblem& problem) {
  return problem.slopes != nullptr && problem.longest_key > kShortestBoundedRow;
}

float* TakeGroups(const GeneralProblem& problem, bool keys, BufferPieces* pieces) {
  const int heads = keys ? problem.kv_heads : problem.heads;
  return pieces->Take<float>(heads * BoundGroups::PerHead(problem, keys));
}

struct ForwardWorkspace {
  float* key_norms = nullptr;
  int64_t bytes = 0;
};

ForwardWorkspace LayOutForward(const AttentionCall& call, void* base) {
  BufferPieces pieces(base);
  ForwardWorkspace layout;
  if (UsesBounds(call.problem)) layout.key_norms = TakeGroups(call.problem, true, &pieces);
  layout.bytes = pieces.bytes();
  return layout;
}

struct BackwardWorkspace {
  float* alpha_rows = nullptr;
  float* slope_rows = nullptr;
  float* key_norms = nullptr;
  float* query_sizes = nullptr;
  float* lowest_thresholds = nullptr;
  int64_t bytes = 0;
};

BackwardWorkspace LayOutBackward(const AttentionCall& call, void* base) {
  BufferPieces pieces(base);
  BackwardWorkspace layout;
  if (call.save && call.alpha_gradient) layout.alpha_rows = pieces.Take<float>(call.Rows());
  if (call.save && call.problem.slopes) layout.slope_rows = pieces.Take<float>(call.Rows());
  if (call.save && UsesBounds(call.problem)) {
    layout.key_norms = TakeGroups(call.problem, true, &pieces);
    layout.query_sizes = TakeGroups(call.problem, false, &pieces);
    layout.lowest_thresholds = TakeGroups(call.problem, false, &pieces);
  }
  layout.bytes = pieces.bytes();
  return layout;
}

// Calls body.template operator()<Element, kHeadDim>().
template <class Body>
cudaError_t ForInstance(const AttentionCall& call, Body body) {
  const int size = std::max(call.problem.head_dim, call.problem.value_dim);
  const auto for_size = [&]<class Element>() {
    if (size <= 32) return body.template operator()<Element, 32>();
    if (size <= 64) return body.template operator()<Element, 64>();
    if (size <= 128) return body.template operator()<Element, 128>();
    return body.template operator()<Element, 256>();
  };
  switch (call.dtype) {
    case DType::kBFloat16:
      return for_size.template operator()<__nv_bfloat16>();
    case DType::kFloat16:
      return for_size.template operator()<__half>();
    default:
      return for_size.template operator()<float>();
  }
}

}  // namespace

Expected<gpu::AttentionPlan> PlanGeneral(const AttentionCall& call) {
  gpu::AttentionPlan plan;
  plan.engine = gpu::Engine::kGeneral;
  plan.description = "scores recomputed tile by tile, compute capability 8.0 and later";
  plan.saved_bytes = LayOutSaved(call, nullptr).bytes;
  plan.forward_bytes = LayOutForward(call, nullptr).bytes;
  plan.backward_bytes = LayOutBackward(call, nullptr).bytes;
  return plan;
}

Status ForwardGeneral(const AttentionCall& call, const DeviceInfo& device,
                      const gpu::AttentionOutputs& outputs, void* saved, void* workspace) {
  GeneralForward forward;
  forward.problem = call.problem;
  forward.query = call.query;
  forward.key = call.key;
  forward.value = call.value;
  forward.output = ToStrided(outputs.output.view());
  forward.saved = LayOutSaved(call, saved).saved;
  forward.key_norms = LayOutForward(call, workspace).key_norms;
  forward.visit_all = call.visit_all_tiles;
  if (outputs.threshold) {
    forward.user_threshold = static_cast<float*>(outputs.threshold.data);
    for (int i = 0; i < 3; ++i) forward.user_threshold_stride[i] = outputs.threshold.strides[i];
  }
  return FromCuda(ForInstance(call,
                              [&]<class Element, int kHeadDim>() {
                                return LaunchGeneralForward<Element, kHeadDim>(
                                    forward, device.multiprocessors, call.stream);
                              }),
                  "launching the forward pass");
}

Status BackwardGeneral(const AttentionCall& call, const DeviceInfo& device,
                       const gpu::AttentionGradients& gradients, void* saved, void* workspace) {
  const BackwardWorkspace layout = LayOutBackward(call, workspace);
  GeneralBackward backward;
  backward.problem = call.problem;
  backward.query = call.query;
  backward.key = call.key;
  backward.value = call.value;
  backward.output_gradient = ToStrided(gradients.output);
  backward.query_gradient = ToStrided(gradients.query.view());
  backward.key_gradient = ToStrided(gradients.key.view());
  backward.value_gradient = ToStrided(gradients.value.view());
  backward.saved = LayOutSaved(call, saved).saved;
  backward.short_rows = ShortPlan(call);
  backward.key_norms = layout.key_norms;
  backward.query_sizes = layout.query_sizes;
  backward.lowest_thresholds = layout.lowest_thresholds;
  backward.visit_all = call.visit_all_tiles;
  if (gradients.alpha) backward.alpha_rows = layout.alpha_rows;
  if (gradients.alibi_slopes) backward.slope_rows = layout.slope_rows;
  if (gradients.query_scale) {
    backward.query_scale_rows = static_cast<float*>(gradients.query_scale.data);
  }
  if (Status status = FromCuda(ForInstance(call,
                                           [&]<class Element, int kHeadDim>() {
                                             return LaunchGeneralBackward<Element, kHeadDim>(
                                                 backward, device.multiprocessors, call.stream);
                                           }),
                               "launching the backward pass");
      !status.ok()) {
    return status;
  }
  const GeneralProblem& problem = call.problem;
  const auto sum = [&](const float* rows, const MutableTensorView& sums) {
    if (!sums) return Status::Ok();
    return FromCuda(SumRowsOfHeads(rows, problem.batch, problem.heads, problem.queries,
                                   static_cast<float*>(sums.data), sums.strides[0], call.stream),
                    "summing a gradient over rows");
  };
  if (Status status = sum(backward.alpha_rows, gradients.alpha); !status.ok()) return status;
  return sum(backward.slope_rows, gradients.alibi_slopes);
}

}  // namespace flash_entmax::cuda
