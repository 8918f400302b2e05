// Random attention problems with every mask, compared with the reference.

#ifndef FLASH_ENTMAX_TOOLS_CHECK_ATTENTION_PROBLEM_H_
#define FLASH_ENTMAX_TOOLS_CHECK_ATTENTION_PROBLEM_H_

#include <cstdint>
#include <string>
#include <vector>

#include "check/error_table.h"
#include "flash_entmax/attention.h"
#include "flash_entmax/status.h"
#include "owned_tensor.h"
#include "reference/attention_reference.h"

namespace flash_entmax::cli {

class RandomAttention {
 public:
  // Problem `number` of the sequence that `seed` starts. Computes the reference and the plain
  // computation with `threads` threads.
  static Expected<RandomAttention> Make(uint64_t seed, int64_t number, int threads);

  // One line: shapes, type, α and masks.
  std::string Describe() const;

  // Runs the library with the active instruction set and notes every error.
  Status Compare(int threads, ErrorTable& errors) const;

 private:
  // One row's reference, and what its rounding may do.
  struct Row {
    reference::AttentionRow expected;
    double largest_score = 0.0;  // In absolute value.
    double score_error = 0.0;    // Of a score computed in the problem's precision, at most.
    double plain_error = 0.0;    // Largest error of the plain computation's output.
  };

  Status MakeTensors(uint64_t seed);
  Row MakeRow(int64_t row) const;
  double AlphaOf(int64_t row) const;
  double ScoreRoundingError() const;
  void CompareOutput(const TensorView& output, ErrorTable& errors) const;
  void CompareThreshold(const TensorView& threshold, ErrorTable& errors) const;
  void CompareSupport(const AttentionSupport& support, ErrorTable& errors) const;

  int64_t number_ = 0;
  AttentionProblem problem_;
  std::vector<OwnedTensor> memory_;  // What the problem's views see.
  double largest_value_ = 0.0;
  std::vector<Row> rows_;  // (batch, head, query) in row-major order.
};

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_CHECK_ATTENTION_PROBLEM_H_
