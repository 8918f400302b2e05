// Random problems over rows: mappings and their losses, compared with the reference.

#ifndef FLASH_ENTMAX_TOOLS_CHECK_MAPPING_PROBLEM_H_
#define FLASH_ENTMAX_TOOLS_CHECK_MAPPING_PROBLEM_H_

#include <cstdint>
#include <string>
#include <vector>

#include "check/error_table.h"
#include "flash_entmax/mapping.h"
#include "flash_entmax/status.h"
#include "owned_tensor.h"
#include "reference/loss_reference.h"
#include "reference/mapping_reference.h"

namespace flash_entmax::cli {

class MappingProblem {
 public:
  // Problem `number` of the sequence that `seed` starts.
  static Expected<MappingProblem> Make(uint64_t seed, int64_t number);

  // One line: shape, type, mapping and α.
  std::string Describe() const;

  // Runs the library with the active instruction set and notes every error.
  Status Compare(int threads, ErrorTable& errors) const;

 private:
  Status CompareMapping(int threads, ErrorTable& errors) const;
  Status CompareLoss(int threads, ErrorTable& errors) const;
  // Bound of a probability of row `row` in a type with this ε.
  double ProbabilityBound(int64_t row, double probability, double epsilon) const;
  void Note(ErrorTable& errors, const char* what, double actual, double expected,
            double bound) const;

  int64_t number_ = 0;
  DType dtype_ = DType::kFloat32;
  MappingOptions options_;
  int64_t rows_ = 0;
  int64_t size_ = 0;
  // All three are [rows, size].
  OwnedTensor scores_;
  OwnedTensor probability_;  // The reference's, rounded: what the backward pass starts from.
  OwnedTensor grad_probability_;
  std::vector<int64_t> targets_;  // One a row.
  std::vector<reference::MappedRow> mapped_;
  std::vector<reference::MappedRowGradient> gradients_;
  std::vector<reference::LossRow> losses_;  // Empty for kBudget, which has none.
  std::vector<double> slope_sum_;           // Σ p^(2−α) of each row: ∂Σp/∂τ up to sign.
  std::vector<double> score_range_;         // Within the support of each row, at least 1.
  std::vector<double> largest_score_;       // In absolute value, at least 1.
};

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_CHECK_MAPPING_PROBLEM_H_
