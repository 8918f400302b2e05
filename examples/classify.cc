// Linear classification with the 1.5-entmax loss: unlike cross-entropy it can reach exactly zero,
// and its predictions rule classes out.

#include <flash_entmax/flash_entmax.h>

#include <cstdio>
#include <random>
#include <vector>

namespace fe = flash_entmax;

int main() {
  const int64_t rows = 300;
  const int64_t classes = 3;
  std::mt19937 engine(1);
  std::normal_distribution<float> gauss(0.0f, 0.5f);
  const float centre[3][2] = {{0, 2}, {2, -1}, {-2, -1}};
  std::vector<float> x(rows * 2);
  std::vector<int64_t> target(rows);
  for (int64_t i = 0; i < rows; ++i) {
    target[i] = i % classes;
    for (int e = 0; e < 2; ++e) x[i * 2 + e] = centre[target[i]][e] + gauss(engine);
  }

  std::vector<float> weight(classes * 2, 0.0f);
  std::vector<float> scores(rows * classes);
  std::vector<float> grad(rows * classes);
  double loss = 0.0;
  const auto score_view =
      fe::TensorView::Contiguous(scores.data(), fe::DType::kFloat32, {rows, classes});
  for (int step = 0; step < 200; ++step) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < classes; ++c) {
        scores[i * classes + c] = x[i * 2] * weight[c * 2] + x[i * 2 + 1] * weight[c * 2 + 1];
      }
    }
    const fe::Status status = fe::FenchelYoungLoss(
        score_view, fe::TensorView::Contiguous(target.data(), fe::DType::kInt64, {rows}),
        {.alpha = 1.5}, fe::MutableTensorView::Contiguous(&loss, fe::DType::kFloat64, {1}),
        fe::MutableTensorView::Contiguous(grad.data(), fe::DType::kFloat32, {rows, classes}));
    if (!status.ok()) {
      std::fprintf(stderr, "%s\n", status.message().c_str());
      return 1;
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < classes; ++c) {
        for (int e = 0; e < 2; ++e) weight[c * 2 + e] -= grad[i * classes + c] * x[i * 2 + e];
      }
    }
    if (step % 50 == 0) std::printf("step %3d  1.5-entmax loss %.6f\n", step, loss);
  }

  std::vector<float> probability(rows * classes);
  const fe::Status status = fe::MappingForward(
      score_view, {.alpha = 1.5},
      fe::MutableTensorView::Contiguous(probability.data(), fe::DType::kFloat32, {rows, classes}));
  if (!status.ok()) return 1;
  int certain = 0;
  for (int64_t i = 0; i < rows; ++i) certain += probability[i * classes + target[i]] == 1.0f;
  std::printf("final loss %.6f; %d of %lld rows give their class probability exactly 1\n", loss,
              certain, static_cast<long long>(rows));
  return 0;
}
