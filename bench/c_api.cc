// A plain C interface to the calls that bench/compare_torch.py times, so that one process can run
// them alternately with PyTorch's on the same memory.

#include <cstdio>

#include "flash_entmax/flash_entmax.h"

namespace fe = flash_entmax;

namespace {

int Report(const fe::Status& status) {
  if (status.ok()) return 0;
  std::fprintf(stderr, "flash_entmax: %s\n", status.message().c_str());
  return 1;
}

struct AttentionSizes {
  int64_t heads, length, size;
  int bfloat16;
  double alpha;
  const float* slopes;  // of ALiBi, [heads], or null
};

// A causal problem and tensors of its shape.
struct Attention {
  Attention(const AttentionSizes& s, const void* query, const void* key, const void* value)
      : sizes(s) {
    problem.query = Result(const_cast<void*>(query)).view();
    problem.key = Result(const_cast<void*>(key)).view();
    problem.value = Result(const_cast<void*>(value)).view();
    problem.causal = true;
    problem.alpha = s.alpha;
    if (s.slopes != nullptr) {
      problem.alibi_slopes = fe::TensorView::Contiguous(s.slopes, fe::DType::kFloat32, {s.heads});
    }
  }
  fe::MutableTensorView Result(void* data) const {
    return fe::MutableTensorView::Contiguous(
        data, sizes.bfloat16 != 0 ? fe::DType::kBFloat16 : fe::DType::kFloat32,
        {1, sizes.heads, sizes.length, sizes.size});
  }

  AttentionSizes sizes;
  fe::AttentionProblem problem;
};

fe::AttentionOptions Saving(int num_threads) {
  fe::AttentionOptions options;
  options.num_threads = num_threads;
  options.save_for_backward = true;
  return options;
}

}  // namespace

extern "C" {

// scores, probabilities: float32 [rows, columns], row-major. 0 on success.
int flash_entmax_bench_map(const float* scores, float* probabilities, int64_t rows, int64_t columns,
                           double alpha, int num_threads) {
  fe::MappingOptions options;
  options.alpha = alpha;
  options.num_threads = num_threads;
  return Report(fe::MappingForward(
      fe::TensorView::Contiguous(scores, fe::DType::kFloat32, {rows, columns}), options,
      fe::MutableTensorView::Contiguous(probabilities, fe::DType::kFloat32, {rows, columns})));
}

// probabilities, grad_probabilities, grad_scores: as above.
int flash_entmax_bench_map_backward(const float* probabilities, const float* grad_probabilities,
                                    float* grad_scores, int64_t rows, int64_t columns, double alpha,
                                    int num_threads) {
  fe::MappingOptions options;
  options.alpha = alpha;
  options.num_threads = num_threads;
  return Report(fe::MappingBackward(
      fe::TensorView::Contiguous(probabilities, fe::DType::kFloat32, {rows, columns}),
      fe::TensorView::Contiguous(grad_probabilities, fe::DType::kFloat32, {rows, columns}), options,
      fe::MutableTensorView::Contiguous(grad_scores, fe::DType::kFloat32, {rows, columns})));
}

// Causal attention; query, key, value, output: [1, heads, length, size], row-major, float32 or (if
// bfloat16 is not 0) bfloat16.
int flash_entmax_bench_attention(const void* query, const void* key, const void* value,
                                 void* output, int64_t heads, int64_t length, int64_t size,
                                 int bfloat16, double alpha, const float* slopes, int num_threads) {
  const Attention call({heads, length, size, bfloat16, alpha, slopes}, query, key, value);
  fe::AttentionOutputs outputs;
  outputs.output = call.Result(output);
  return Report(fe::AttentionForward(call.problem, outputs, {num_threads}));
}

// Bytes of the buffer, aligned to 64, that goes from forward to backward; −1 if it failed.
int64_t flash_entmax_bench_saved_bytes(int64_t heads, int64_t length, int64_t size, int bfloat16,
                                       double alpha, const float* slopes) {
  // Sizes only: nothing is read.
  alignas(64) static const char nothing[64] = {};
  const Attention call({heads, length, size, bfloat16, alpha, slopes}, nothing, nothing, nothing);
  const auto plan = fe::PlanAttention(call.problem, Saving(1));
  return Report(plan.status()) == 0 ? plan->saved_bytes : -1;
}

// The forward pass of a training step.
int flash_entmax_bench_attention_saving(const void* query, const void* key, const void* value,
                                        void* output, int64_t heads, int64_t length, int64_t size,
                                        int bfloat16, double alpha, const float* slopes,
                                        int num_threads, void* saved, int64_t saved_bytes) {
  const Attention call({heads, length, size, bfloat16, alpha, slopes}, query, key, value);
  fe::AttentionOutputs outputs;
  outputs.output = call.Result(output);
  return Report(
      fe::AttentionForward(call.problem, outputs, Saving(num_threads), {saved, saved_bytes}));
}

// Its backward pass; gradients like what they are of.
int flash_entmax_bench_attention_backward(const void* query, const void* key, const void* value,
                                          const void* grad_output, void* grad_query, void* grad_key,
                                          void* grad_value, int64_t heads, int64_t length,
                                          int64_t size, int bfloat16, double alpha,
                                          const float* slopes, int num_threads, void* saved,
                                          int64_t saved_bytes) {
  const Attention call({heads, length, size, bfloat16, alpha, slopes}, query, key, value);
  fe::AttentionGradients gradients;
  gradients.output = call.Result(const_cast<void*>(grad_output)).view();
  gradients.query = call.Result(grad_query);
  gradients.key = call.Result(grad_key);
  gradients.value = call.Result(grad_value);
  return Report(
      fe::AttentionBackward(call.problem, gradients, Saving(num_threads), {saved, saved_bytes}));
}
}
