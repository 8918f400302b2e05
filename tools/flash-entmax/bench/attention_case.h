// One workload of the table as a problem of attention: its tensors, the check of random rows, and
// what can be said of its support.

#ifndef FLASH_ENTMAX_TOOLS_BENCH_ATTENTION_CASE_H_
#define FLASH_ENTMAX_TOOLS_BENCH_ATTENTION_CASE_H_

#include <cstdint>
#include <string>

#include "flash_entmax/attention.h"
#include "owned_tensor.h"
#include "workloads.h"

namespace flash_entmax::cli {

struct SupportSummary {
  double mean_keys = 0.0;         // Positive probabilities a row.
  double empty_tile_share = 0.0;  // Of the 128×64 tiles with a visible pair, those without any.
};

class AttentionCase {
 public:
  // The workload's tensors, rounded to `dtype`.
  static Expected<AttentionCase> Make(const bench::WorkloadSpec& spec,
                                      const bench::WorkloadShape& shape, uint64_t seed,
                                      DType dtype);

  // The tensors and ALiBi slopes are set, everything else has its default.
  AttentionProblem problem;
  // [batch, heads, query_length, value_size]; overwritten by every call.
  MutableTensorView output;

  // Runs `variant`, which is `problem` with another α or mask, and compares random rows with the
  // reference. Errors: kInvalidArgument with what differs.
  Status Verify(const AttentionProblem& variant, uint64_t seed, int threads,
                SupportSummary& summary);

 private:
  OwnedTensor query_;
  OwnedTensor key_;
  OwnedTensor value_;
  OwnedTensor slopes_;
  OwnedTensor output_;
};

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_BENCH_ATTENTION_CASE_H_
