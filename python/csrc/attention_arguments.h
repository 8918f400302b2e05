// The arguments that the operators of attention share, in the order of their schemas.

#ifndef FLASH_ENTMAX_PYTHON_ATTENTION_ARGUMENTS_H_
#define FLASH_ENTMAX_PYTHON_ATTENTION_ARGUMENTS_H_

#include <cstdint>
#include <optional>
#include <tuple>

#include "flash_entmax/attention.h"
#include "tensors.h"

namespace flash_entmax::python {

// Every operator takes the fields from `query` to `max_key_length` as FLASH_ENTMAX_PARAMETERS, and
// makes this struct from them with FLASH_ENTMAX_ARGUMENTS. TORCH_BOX reads the types of plain
// parameters, hence the macros.
struct AttentionArguments {
  Tensor query, key, value;
  std::optional<Tensor> alpha, query_scale, bias, alibi_slopes;
  std::optional<Tensor> key_lengths, key_mask, cu_query, cu_key;
  double alpha_value;
  std::optional<double> scale;
  bool causal;
  std::optional<int64_t> window_left, window_right;
  double softcap;
  int64_t max_query_length, max_key_length;

  AttentionProblem Problem(bool cuda) const;
};

#define FLASH_ENTMAX_PARAMETERS                                                                   \
  Tensor query, Tensor key, Tensor value, std::optional<Tensor> alpha,                            \
      std::optional<Tensor> query_scale, std::optional<Tensor> bias,                              \
      std::optional<Tensor> alibi_slopes, std::optional<Tensor> key_lengths,                      \
      std::optional<Tensor> key_mask, std::optional<Tensor> cu_query,                             \
      std::optional<Tensor> cu_key, double alpha_value, std::optional<double> scale, bool causal, \
      std::optional<int64_t> window_left, std::optional<int64_t> window_right, double softcap,    \
      int64_t max_query_length, int64_t max_key_length

#define FLASH_ENTMAX_ARGUMENTS                                                                    \
  AttentionArguments {                                                                            \
    query, key, value, alpha, query_scale, bias, alibi_slopes, key_lengths, key_mask, cu_query,   \
        cu_key, alpha_value, scale, causal, window_left, window_right, softcap, max_query_length, \
        max_key_length                                                                            \
  }

// output [batch, heads, query_length, value_size], threshold [batch, heads, query_length], and what
// the backward pass needs as bytes (none unless it was asked for).
using AttentionResult = std::tuple<Tensor, Tensor, Tensor>;

// Gradients in query, key, value, alpha, bias, alibi_slopes and query_scale. Those that were not
// asked for have no elements.
using AttentionGradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The output in the order in which the query lies in memory: [batch, query_length, heads, size] if
// its heads are closer together than its rows, else row-major.
Tensor EmptyOutput(const AttentionArguments& arguments);

}  // namespace flash_entmax::python

#endif  // FLASH_ENTMAX_PYTHON_ATTENTION_ARGUMENTS_H_
