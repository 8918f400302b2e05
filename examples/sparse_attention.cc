// 1.5-entmax attention over random tensors: how many keys does each query keep?

#include <flash_entmax/flash_entmax.h>

#include <cstdio>
#include <random>
#include <vector>

namespace fe = flash_entmax;

int main() {
  const int64_t length = 4096;
  const int64_t size = 64;
  std::mt19937 engine(1);
  std::normal_distribution<float> gauss;
  std::vector<float> query(length * size);
  std::vector<float> key(length * size);
  std::vector<float> value(length * size);
  std::vector<float> output(length * size);
  for (std::vector<float>* tensor : {&query, &key, &value}) {
    for (float& x : *tensor) x = gauss(engine);
  }

  fe::AttentionProblem problem;  // α is 1.5 and the scale 1/√size unless set.
  problem.query =
      fe::TensorView::Contiguous(query.data(), fe::DType::kFloat32, {1, 1, length, size});
  problem.key = fe::TensorView::Contiguous(key.data(), fe::DType::kFloat32, {1, 1, length, size});
  problem.value =
      fe::TensorView::Contiguous(value.data(), fe::DType::kFloat32, {1, 1, length, size});
  problem.causal = true;

  fe::AttentionSupport support;
  fe::AttentionOutputs outputs;
  outputs.output =
      fe::MutableTensorView::Contiguous(output.data(), fe::DType::kFloat32, {1, 1, length, size});
  outputs.support = &support;
  const fe::Status status = fe::AttentionForward(problem, outputs);
  if (!status.ok()) {
    std::fprintf(stderr, "%s\n", status.message().c_str());
    return 1;
  }

  const auto kept = static_cast<double>(support.key_index.size());
  const double pairs = 0.5 * static_cast<double>(length) * static_cast<double>(length + 1);
  std::printf("%lld queries kept %.1f keys each; %.2f %% of the weights are exactly zero\n",
              static_cast<long long>(length), kept / static_cast<double>(length),
              100.0 * (1.0 - kept / pairs));
  std::printf("the last query attends to:");
  const auto last = static_cast<size_t>(support.row_offsets[length - 1]);
  for (size_t i = last; i < support.key_index.size(); ++i) {
    std::printf(" %d (%.3f)", support.key_index[i], static_cast<double>(support.probability[i]));
  }
  std::printf("\n");
  return 0;
}
