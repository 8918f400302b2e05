// Any views as a problem of attention: an error, or a run that writes nothing but its outputs.

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <vector>

#include "flash_entmax/attention.h"
#include "view_builder.h"

namespace flash_entmax::fuzz {
namespace {

AttentionProblem MakeProblem(FuzzedDataProvider& input, ViewBuilder& views,
                             std::vector<int64_t>& rows, int64_t& value_size) {
  const auto size = [&input](int64_t least) {
    return input.ConsumeIntegralInRange<int64_t>(least, 4);
  };
  const int64_t batch = size(0);
  const int64_t kv_heads = size(0);
  const int64_t heads = kv_heads * size(1);
  const int64_t queries = size(0);
  const int64_t keys = input.ConsumeIntegralInRange<int64_t>(0, 20);
  const int64_t head_size = size(0);
  value_size = size(0);
  rows = {batch, heads, queries};
  const DType dtype = views.FloatingType();

  AttentionProblem problem;
  problem.query = views.View(dtype, {batch, heads, queries, head_size}).view();
  problem.key = views.View(dtype, {batch, kv_heads, keys, head_size}).view();
  problem.value = views.View(dtype, {batch, kv_heads, keys, value_size}).view();
  problem.alpha = input.ConsumeBool() ? 1.5 : views.AnyDouble();
  const auto some = [&input] { return input.ConsumeIntegralInRange(0, 7) == 0; };
  if (some()) problem.alpha_per_head = views.View(DType::kFloat64, {heads}).view();
  if (some()) problem.scale = views.AnyDouble();
  if (some()) problem.query_scale = views.View(DType::kFloat32, rows).view();
  problem.causal = input.ConsumeBool();
  if (some()) problem.window_left = input.ConsumeIntegral<int64_t>();
  if (some()) problem.window_right = input.ConsumeIntegral<int64_t>();
  if (some()) problem.window_left = input.ConsumeIntegralInRange<int64_t>(-1, 4);
  if (some()) problem.key_lengths = views.View(DType::kInt32, {batch}).view();
  if (some()) problem.key_mask = views.View(DType::kUInt8, {batch, keys}).view();
  if (some()) problem.bias = views.View(dtype, {batch, heads, queries, keys}).view();
  if (some()) problem.alibi_slopes = views.View(DType::kFloat32, {heads}).view();
  if (some()) problem.softcap = views.AnyDouble();
  if (some()) problem.cu_query = views.View(DType::kInt32, {size(0)}).view();
  if (some()) problem.cu_key = views.View(DType::kInt64, {size(0)}).view();
  return problem;
}

void Run(FuzzedDataProvider& input) {
  ViewBuilder views(input);
  std::vector<int64_t> rows;
  int64_t value_size = 0;
  const AttentionProblem problem = MakeProblem(input, views, rows, value_size);
  const bool broken_problem = views.broken();
  std::vector<int64_t> output_shape = rows;
  output_shape.push_back(value_size);
  AttentionOutputs outputs;
  outputs.output = views.View(problem.query.dtype, output_shape);
  if (input.ConsumeBool()) outputs.threshold = views.View(DType::kFloat32, rows);
  AttentionSupport support;
  if (input.ConsumeBool()) outputs.support = &support;

  const Status problem_status = CheckAttention(problem);
  if (broken_problem && problem_status.ok()) std::abort();
  AttentionOptions options;
  options.num_threads = 1;
  if (PlanAttention(problem, options).ok() != problem_status.ok()) std::abort();
  const Status outputs_status = CheckAttentionOutputs(problem, outputs);
  if (problem_status.ok() && views.broken() && outputs_status.ok()) std::abort();

  views.Remember();
  const bool accepted = problem_status.ok() && outputs_status.ok();
  if (accepted) {
    views.Allow(outputs.output);
    views.Allow(outputs.threshold);
  }
  const Status status = AttentionForward(problem, outputs, options);
  if (status.ok() != accepted) std::abort();
  if (!views.OnlyAllowedBytesChanged()) std::abort();
}

}  // namespace
}  // namespace flash_entmax::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzedDataProvider input(data, size);
  flash_entmax::fuzz::Run(input);
  return 0;
}
