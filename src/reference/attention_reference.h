// The attention of attention.h as plain double loops, forward and backward, with every mask.
// The problem must have passed CheckAttention.

#ifndef FLASH_ENTMAX_SRC_REFERENCE_ATTENTION_REFERENCE_H_
#define FLASH_ENTMAX_SRC_REFERENCE_ATTENTION_REFERENCE_H_

#include <cstdint>
#include <vector>

#include "flash_entmax/attention.h"

namespace flash_entmax::reference {

// One query row.
struct AttentionRow {
  std::vector<double> score;        // (key_length of the row's sequence); −inf where hidden
  std::vector<double> probability;  // likewise
  std::vector<double> output;       // (value_size)
  double threshold = 0.0;
};

// Works for any α > 0. Index `query` counts in the tensor, so with cu_query it is the packed row.
AttentionRow AttentionForwardRow(const AttentionProblem& problem, int64_t batch, int64_t head,
                                 int64_t query);

// All rows. Row-major arrays.
struct AttentionResult {
  std::vector<double> output;       // [batch, heads, query_length, value_size]
  std::vector<double> threshold;    // [batch, heads, query_length]
  std::vector<double> probability;  // [batch, heads, query_length, key_length], keys as in the
                                    // tensor (packed position with cu_key)
};

AttentionResult AttentionForward(const AttentionProblem& problem);

// Gradients of a loss whose gradient in the output is given, row-major [batch, heads,
// query_length, value_size].
struct AttentionGradients {
  std::vector<double> query;         // [batch, heads, query_length, head_size]
  std::vector<double> key;           // [batch, kv_heads, key_length, head_size]
  std::vector<double> value;         // [batch, kv_heads, key_length, value_size]
  std::vector<double> alpha;         // [heads]
  std::vector<double> query_scale;   // [batch, heads, query_length]
  std::vector<double> bias;          // [batch, heads, query_length, key_length], unreduced
  std::vector<double> alibi_slopes;  // [heads]
};

AttentionGradients AttentionBackward(const AttentionProblem& problem,
                                     const std::vector<double>& grad_output);

}  // namespace flash_entmax::reference

#endif  // FLASH_ENTMAX_SRC_REFERENCE_ATTENTION_REFERENCE_H_
