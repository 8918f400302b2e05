#include "muon.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <map>

namespace flash_entmax::lab {
namespace {

// Coefficients and count of the iteration x ← a·x + b·x³ + c·x⁵ on singular values (Jordan et al.
// 2024: chosen for the slope at zero, not for convergence to 1).
constexpr double kA = 3.4445, kB = -4.7750, kC = 2.0315;
constexpr int kIterations = 5;

// The parts of a matrix in a flat tensor, each [rows, columns/parts].
std::vector<at::Tensor> Parts(const at::Tensor& flat, const HiddenMatrix& matrix) {
  return flat.narrow(0, matrix.offset, matrix.rows * matrix.columns)
      .view({matrix.rows, matrix.columns})
      .chunk(matrix.parts, 1);
}

}  // namespace

std::vector<ParameterRange> CoveredRanges(const std::vector<HiddenMatrix>& matrices) {
  std::vector<ParameterRange> ranges;
  for (const HiddenMatrix& matrix : matrices) {
    const int64_t size = matrix.rows * matrix.columns;
    if (!ranges.empty() && ranges.back().offset + ranges.back().size == matrix.offset) {
      ranges.back().size += size;
    } else {
      ranges.push_back({matrix.offset, size});
    }
  }
  return ranges;
}

std::vector<ParameterRange> OtherRanges(const std::vector<HiddenMatrix>& matrices, int64_t total) {
  std::vector<ParameterRange> ranges;
  int64_t end = 0;
  for (const ParameterRange& range : CoveredRanges(matrices)) {
    if (range.offset > end) ranges.push_back({end, range.offset - end});
    end = range.offset + range.size;
  }
  if (total > end) ranges.push_back({end, total - end});
  return ranges;
}

at::Tensor Orthogonalise(const at::Tensor& matrices) {
  const bool tall = matrices.size(1) > matrices.size(2);
  at::Tensor x = tall ? matrices.transpose(1, 2) : matrices;
  const at::Tensor norm = x.flatten(1).norm(2, -1).clamp_min(1e-20).view({-1, 1, 1});
  x = (x / norm).to(x.is_cuda() ? at::kBFloat16 : at::kFloat);
  for (int i = 0; i < kIterations; ++i) {
    const at::Tensor square = at::bmm(x, x.transpose(1, 2));
    // b·A + c·A², then a·x + (b·A + c·A²)·x.
    const at::Tensor both = at::baddbmm(square, square, square, kB, kC);
    x = at::baddbmm(x, both, x, kA, 1.0);
  }
  x = x.to(at::kFloat);
  return tall ? x.transpose(1, 2) : x;
}

void MuonStep(const std::vector<HiddenMatrix>& matrices, const at::Tensor& gradient,
              const at::Tensor& rate, at::Tensor momentum, at::Tensor parameters) {
  const at::NoGradGuard no_gradient;
  at::Tensor direction = at::empty_like(parameters);
  for (const ParameterRange& range : CoveredRanges(matrices)) {
    const at::Tensor g = gradient.narrow(0, range.offset, range.size).to(at::kFloat);
    const at::Tensor m = momentum.narrow(0, range.offset, range.size);
    m.mul_(kMuonMomentum).add_(g);
    direction.narrow(0, range.offset, range.size).copy_(at::add(g, m, kMuonMomentum));
  }
  // Matrices of one shape go together.
  std::map<std::pair<int64_t, int64_t>, std::pair<std::vector<at::Tensor>, std::vector<at::Tensor>>>
      groups;
  for (const HiddenMatrix& matrix : matrices) {
    auto& [directions, targets] = groups[{matrix.rows, matrix.columns / matrix.parts}];
    for (const at::Tensor& part : Parts(direction, matrix)) directions.push_back(part);
    for (const at::Tensor& part : Parts(parameters, matrix)) targets.push_back(part);
  }
  for (auto& [shape, group] : groups) {
    auto& [directions, targets] = group;
    const double scale = std::sqrt(
        std::max(1.0, static_cast<double>(shape.second) / static_cast<double>(shape.first)));
    const at::Tensor steps = Orthogonalise(at::stack(directions)) * (rate * scale);
    at::_foreach_sub_(targets, steps.unbind(0));
  }
}

}  // namespace flash_entmax::lab
