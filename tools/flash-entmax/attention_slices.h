// Attention in pieces, so that long work can show how far it is.

#ifndef FLASH_ENTMAX_TOOLS_ATTENTION_SLICES_H_
#define FLASH_ENTMAX_TOOLS_ATTENTION_SLICES_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "flash_entmax/attention.h"

namespace flash_entmax::cli {

// A part of a problem: consecutive rows in the order (batch, head, query).
struct AttentionSlice {
  int64_t batch_begin = 0;
  int64_t batch_count = 0;
  int64_t head_begin = 0;
  int64_t head_count = 0;
  int64_t query_begin = 0;
  int64_t query_count = 0;

  int64_t rows() const { return batch_count * head_count * query_count; }
};

// Cuts the problem into slices of about `max_pairs` query-key pairs each, in row order, where it
// can be cut: always between heads and batch entries, and between queries if the positions of a
// part do not depend on keys that it lacks. The problem must have passed CheckAttention.
std::vector<AttentionSlice> CutAttention(const AttentionProblem& problem, int64_t max_pairs);

// The problem and outputs of one slice; views of the same memory. `support` is not set.
AttentionProblem SliceProblem(const AttentionProblem& problem, const AttentionSlice& slice);
AttentionOutputs SliceOutputs(const AttentionOutputs& outputs, const AttentionSlice& slice);

// Appends the rows of `part` to `whole`.
void AppendSupport(const AttentionSupport& part, AttentionSupport& whole);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_ATTENTION_SLICES_H_
