// Muon (Jordan et al. 2024) for the matrices between a model's layers: momentum, made orthogonal.
//
//   m ← μ·m + g,   O ≈ U·Vᵀ of g + μ·m = U·S·Vᵀ,   W ← W − rate·√max(1, columns/rows)·O,
//
// W taking rows inputs to columns outputs. O comes from five steps of a quintic Newton–Schulz
// iteration, whose singular values end between about 0.7 and 1.2. Embeddings, the output head and
// everything that is not a matrix stay with AdamW.

#ifndef FLASH_ENTMAX_LAB_MUON_H_
#define FLASH_ENTMAX_LAB_MUON_H_

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace flash_entmax::lab {

inline constexpr double kMuonMomentum = 0.95;

// A matrix in the flat tensor of parameters. Its columns are `parts` matrices side by side, each
// made orthogonal by itself (query, key and value; gate and up).
struct HiddenMatrix {
  int64_t offset = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t parts = 1;
};

struct ParameterRange {
  int64_t offset = 0;
  int64_t size = 0;
};
// What the matrices, sorted by offset, cover of `total` parameters, and what they leave.
std::vector<ParameterRange> CoveredRanges(const std::vector<HiddenMatrix>& matrices);
std::vector<ParameterRange> OtherRanges(const std::vector<HiddenMatrix>& matrices, int64_t total);

// [count, rows, columns] → the same, each near the orthogonal factor of its polar decomposition.
// float32; on GPUs the products are in bfloat16.
at::Tensor Orthogonalise(const at::Tensor& matrices);

// One step for the matrices. All tensors but `gradient` (any type) are float32; momentum and
// parameters are flat, as is the gradient, and change in place. `rate` is a tensor of one number,
// so that a captured graph can read it anew.
void MuonStep(const std::vector<HiddenMatrix>& matrices, const at::Tensor& gradient,
              const at::Tensor& rate, at::Tensor momentum, at::Tensor parameters);

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_MUON_H_
