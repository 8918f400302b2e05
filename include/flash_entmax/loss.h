// Fenchel–Young losses of the mappings (Blondel, Martins & Niculae 2020), for classification.

#ifndef FLASH_ENTMAX_LOSS_H_
#define FLASH_ENTMAX_LOSS_H_

#include <cstdint>

#include "flash_entmax/mapping.h"
#include "flash_entmax/status.h"
#include "flash_entmax/tensor.h"

namespace flash_entmax {

enum class Reduction { kNone, kSum, kMean };

struct LossOptions {
  // kEntmax or kNormmax. Entmax with α = 1 is cross-entropy, 1.5 and 2 the 1.5-entmax and sparsemax
  // losses.
  MappingKind kind = MappingKind::kEntmax;
  // As in MappingOptions.
  double alpha = 1.5;
  // Rows with this target have loss 0 and gradient 0 and are left out of the mean.
  int64_t ignore_index = -100;
  // kMean divides by the number of rows that are not ignored (the mean of none is 0).
  Reduction reduction = Reduction::kMean;
  int num_threads = 0;
};

// Value and, if wanted, gradient of L(s; y) = (p − e_y)·s + H(p), p the mapping of s:
//   entmax:  H(p) = Σ(p − p^α)/(α(α−1)); −Σ p log p at α = 1
//   normmax: H(p) = 1 − ‖p‖_α
// L ≥ 0, and L = 0 exactly where the mapping puts all weight on y. Gradient in s: p − e_y.
//
// scores   [rows, classes], any floating-point type, any strides
// target   [rows], int64; each is ignore_index or in [0, classes)
// loss     [rows] for kNone, else rank 0 or [1]; float32 or float64
// grad     optional, [rows, classes], the scores' type: the gradient of the reduced loss (of the
// sum
//          for kNone, so that a caller can multiply row i by its own incoming gradient)
//
// Error: everything is computed in double from the scores as given; the loss is within
// 1e-12·max(1, max|s|) of its true value before it is rounded to its type. A row with NaN or +inf,
// or with every score −inf, gives NaN; a target whose score is −inf gives +inf, with gradient p −
// e_y.
Status FenchelYoungLoss(const TensorView& scores, const TensorView& target,
                        const LossOptions& options, const MutableTensorView& loss,
                        const MutableTensorView& grad = {});

}  // namespace flash_entmax

#endif  // FLASH_ENTMAX_LOSS_H_
