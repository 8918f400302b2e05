// Factors of attention's queries that grow with the position, so that attention stays sharp over
// contexts longer than those seen in training. They fill AttentionProblem::query_scale, and turn
// its gradient into that of their parameters.

#ifndef FLASH_ENTMAX_QUERY_SCALING_H_
#define FLASH_ENTMAX_QUERY_SCALING_H_

#include <cstdint>

#include "flash_entmax/status.h"
#include "flash_entmax/tensor.h"

namespace flash_entmax {

enum class QueryScalingKind {
  // δ + β·(log(i + 2))^γ (ASEntmax: Vasylenko, Pitorro, Martins & Treviso 2026). There β is a
  // softplus and γ 2·tanh of linear functions of the token, and δ = 1.
  kAsEntmax,
  // β·log(i + 2) (SSMax: Nakanishi 2025), with one β a head.
  kSsmax,
};

struct QueryScaling {
  QueryScalingKind kind = QueryScalingKind::kAsEntmax;
  // Floating point, broadcastable to [batch, heads, query_length]. γ is for kAsEntmax only.
  TensorView beta;
  TensorView gamma;
  double delta = 1.0;
  // Position i of each query, counted from 0: first_position + its index (a cache of keys before
  // the first query has first_position of them), or these: int32 or int64, ≥ 0, broadcastable to
  // [batch, heads, query_length].
  int64_t first_position = 0;
  TensorView positions;
};

// Gradients of the parameters, of their own shapes (summed where they were broadcast), floating
// point. Those not given are not computed.
struct QueryScalingGradients {
  MutableTensorView beta;
  MutableTensorView gamma;
};

// query_scale: [batch, heads, query_length], floating point. Computed in double.
Status QueryScaleForward(const QueryScaling& scaling, const MutableTensorView& query_scale);

// grad_query_scale: the loss's gradient in query_scale, [batch, heads, query_length].
Status QueryScaleBackward(const QueryScaling& scaling, const TensorView& grad_query_scale,
                          const QueryScalingGradients& gradients);

}  // namespace flash_entmax

#endif  // FLASH_ENTMAX_QUERY_SCALING_H_
