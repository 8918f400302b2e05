// An attention problem after its checks: sizes as numbers, views broadcast, sequences listed.

#ifndef FLASH_ENTMAX_SRC_ATTENTION_RESOLVED_H_
#define FLASH_ENTMAX_SRC_ATTENTION_RESOLVED_H_

#include <cstdint>
#include <vector>

#include "flash_entmax/attention.h"
#include "flash_entmax/status.h"
#include "math/visible_keys.h"

namespace flash_entmax {

// A run of query rows and the keys they attend to.
struct Sequence {
  int64_t batch = 0;
  int64_t first_query = 0;  // Row of the query tensor.
  int64_t first_key = 0;    // Row of the key tensor.
  PositionMask mask;        // Lengths and masks; positions count within the sequence.
};

struct ResolvedAttention {
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t query_length = 0;
  int64_t key_length = 0;
  int64_t head_size = 0;
  int64_t value_size = 0;
  double scale = 1.0;
  std::vector<double> alpha;  // [heads]
  std::vector<double> slope;  // [heads]; 0 without ALiBi
  TensorView query_scale;     // [batch, heads, query_length], or empty
  TensorView key_mask;        // [batch, key_length], or empty
  TensorView bias;            // [batch, heads, query_length, key_length], or empty
  std::vector<Sequence> sequences;
};

Expected<ResolvedAttention> ResolveAttention(const AttentionProblem& problem);

namespace cpu {

// Fills the plan's engine, path, sizes and workspace.
AttentionPlan PlanForward(const AttentionProblem& problem, const ResolvedAttention& resolved,
                          const AttentionOptions& options);

// `saved` is filled (cpu/saved_support.h) if options.save_for_backward.
Status RunForward(const AttentionProblem& problem, const ResolvedAttention& resolved,
                  const AttentionOutputs& outputs, const AttentionOptions& options,
                  AttentionBuffer saved);

// Fills the plan's sizes of the saved buffer and of the backward pass's workspace.
void PlanBackward(const AttentionProblem& problem, const ResolvedAttention& resolved,
                  const AttentionOptions& options, AttentionPlan* plan);

Status RunBackward(const AttentionProblem& problem, const ResolvedAttention& resolved,
                   const AttentionGradients& gradients, const AttentionOptions& options,
                   AttentionBuffer saved);

}  // namespace cpu
}  // namespace flash_entmax

#endif  // FLASH_ENTMAX_SRC_ATTENTION_RESOLVED_H_
