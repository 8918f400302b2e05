// α-entmax and its neighbours over the rows of a tensor: forward, backward, gradient in α, support.
//
// With m = α − 1 and the deformed exponential exp_α(x) = [1 + m·x]₊^(1/m) (exp(x) at α = 1), the
// α-entmax of scores s is
//     p_i = exp_α(s_i − λ),   λ the unique number with Σ p_i = 1,
// which is the usual [(α−1)·s_i − τ]₊^(1/(α−1)) with τ = (α−1)·λ − 1. α = 1 is softmax, 1.5 is
// 1.5-entmax (Peters, Niculae & Martins 2019), 2 is sparsemax (Martins & Astudillo 2016). For α > 1
// most p_i are exact zeros; for α < 1 every p_i is positive and the tails are heavy.
//
// Masked entries (mask 0, or a score of −inf) get probability 0 and gradient 0. A row with every
// entry masked gives zeros. A row with NaN or +inf gives NaN in that row and nowhere else.

#ifndef FLASH_ENTMAX_MAPPING_H_
#define FLASH_ENTMAX_MAPPING_H_

#include <cstdint>
#include <vector>

#include "flash_entmax/status.h"
#include "flash_entmax/tensor.h"

namespace flash_entmax {

enum class MappingKind {
  kEntmax,  // maximises p·s + H_α(p) over the simplex, any α > 0
  kNormmax,  // maximises p·s − ‖p‖_α over the simplex, α > 1 (Blondel, Martins & Niculae 2020)
  kBudget,  // maximises p·s − ½‖p‖² with 0 ≤ p ≤ 1 and Σ p = budget: a soft choice of k items
};

struct MappingOptions {
  MappingKind kind = MappingKind::kEntmax;
  // One α for every row, unless alpha_per_row is given. Finite; > 0 for entmax, > 1 for normmax.
  double alpha = 1.5;
  // Optional: one α a row. float32 or float64, the shape of the scores with size 1 at `dim`, or
  // broadcastable to it from the right.
  TensorView alpha_per_row;
  // kBudget only: 0 < budget ≤ size of `dim`. A row with fewer unmasked entries than the budget
  // puts 1 on each of them, and its threshold is −∞.
  double budget = 1.0;
  // The dimension along which the mapping runs; −1 is the last.
  int dim = -1;
  // Optional: uint8, broadcastable to the scores; 0 excludes the entry.
  TensorView mask;
  // Threads to use; 0 means the OpenMP default. Results do not depend on it.
  int num_threads = 0;
};

// What the forward pass can report besides probabilities. Each is optional and has the scores'
// shape with size 1 at `dim`.
struct MappingExtras {
  // τ of each row for entmax and normmax with α ≠ 1, log Σ exp(s) for α = 1, the shift of the
  // clamp for kBudget. float32 or float64. NaN for rows without a distribution.
  MutableTensorView threshold;
  // How many entries are positive. int32 or int64.
  MutableTensorView support_size;
};

// Writes probabilities. `scores` and `probabilities` have the same floating-point type and shape
// (rank 1 to 8); they must not share memory unless they are the same view.
//
// Error: the threshold is solved in double (for α = 1 the sum is in double, its terms in the
// tensor's type). For α = 1.5, α = 2, normmax with α = 2 and budget it is the closed form on the
// support; for the rest Newton's method to the last bits. With ε the tensor's machine epsilon,
//     |p − p*| ≤ ε·(4 + 2·|log p|)·p + 4ε·max(1, range)·p^(2−α) + half the smallest positive
//     number,
// where range is the spread of the scores within the support and p the larger of the two; a float64
// row of n entries adds the rounding of its sum, n·ε·p^(2−α)/Σp^(2−α), and normmax with α > 2 what
// its normalisation inherits from the steep edge of the support. Σp is 1 within n·ε (budget:
// within n·ε·max(budget, range)); for α > 2 mixtures at the edge of the support see to that.
Status MappingForward(const TensorView& scores, const MappingOptions& options,
                      const MutableTensorView& probabilities, const MappingExtras& extras = {});

// Gradient of a loss in the scores, from its gradient in the probabilities:
//   entmax:  u ⊙ (g − (u·g)/Σu) with u_i = p_i^(2−α) on the support (Peters et al. 2019, Prop. 2)
//   normmax: (I − p1ᵀ)(w ⊙ (g − p·g)) with w_i = p_i^(2−α)·‖p‖_α^(α−1)/(α−1)
//   budget:  g − mean(g) over the entries with 0 < p < 1
// `options.mask` is not needed: masked entries have p = 0.
// `grad_alpha` is optional (kEntmax only; float32 or float64, size 1 at `dim`): the gradient in the
// row's α (Correia, Niculae & Martins 2019), which is continuous through α = 1. Rows without a
// support have gradient 0; a row with NaN in either input gives NaN.
//
// Error of grad_scores: ε·(8 + 4·|(2−α)·log p_i|)·u_i·max|g| from probabilities as given.
Status MappingBackward(const TensorView& probabilities, const TensorView& grad_probabilities,
                       const MappingOptions& options, const MutableTensorView& grad_scores,
                       const MutableTensorView& grad_alpha = {});

// The positive entries of every row, in compressed rows. Rows are numbered in row-major order of
// the tensor without `dim`.
struct RowSupport {
  std::vector<int64_t> row_offsets;  // [rows + 1]
  std::vector<int64_t> index;        // [entries], position along `dim`, ascending in a row
  std::vector<double> probability;   // [entries]
};

Expected<RowSupport> MappingSupport(const TensorView& probabilities, int dim = -1);

}  // namespace flash_entmax

#endif  // FLASH_ENTMAX_MAPPING_H_
