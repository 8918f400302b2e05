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
                                 int bfloat16, double alpha, int num_threads) {
  const fe::DType dtype = bfloat16 != 0 ? fe::DType::kBFloat16 : fe::DType::kFloat32;
  fe::AttentionProblem problem;
  problem.query = fe::TensorView::Contiguous(query, dtype, {1, heads, length, size});
  problem.key = fe::TensorView::Contiguous(key, dtype, {1, heads, length, size});
  problem.value = fe::TensorView::Contiguous(value, dtype, {1, heads, length, size});
  problem.causal = true;
  problem.alpha = alpha;
  fe::AttentionOutputs outputs;
  outputs.output = fe::MutableTensorView::Contiguous(output, dtype, {1, heads, length, size});
  return Report(fe::AttentionForward(problem, outputs, {num_threads}));
}
}
