// Attention of the lab's models as differentiable functions of tensors.
//
// EngineAttention calls this project's engines, on either device. Everything else here is a
// composition of tensor operations: softmax on GPUs (which the GPU engine does not serve), linear
// attention, and what tests and statistics compare with.

#ifndef FLASH_ENTMAX_LAB_ATTENTION_H_
#define FLASH_ENTMAX_LAB_ATTENTION_H_

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace flash_entmax::lab {

// Causal self-attention. Scores are query_scale_i · q_i·k_j / √head_size − slope·(i − j).
struct AttentionInputs {
  at::Tensor qkv;          // [batch, length, 3, heads, head_size]
  at::Tensor query_scale;  // [batch, length, heads] float32, or undefined
  at::Tensor slopes;       // [heads] float32, or undefined; not learnt
  at::Tensor alpha;        // [heads] float32, or undefined: fixed_alpha
  double fixed_alpha = 1.5;
};

// Exact α-entmax (softmax for fixed_alpha = 1, on CPUs only): [batch, length, heads, head_size].
// Gradients in qkv, query_scale and alpha. An engine's error is thrown as c10::Error.
at::Tensor EngineAttention(const AttentionInputs& inputs);

// Softmax by PyTorch's operators; without gradients by SoftmaxByHeads.
at::Tensor ComposedSoftmax(const AttentionInputs& inputs);

// The same for long inputs, without gradients: heads without a slope through PyTorch's flash
// attention, the others block by block over the keys that their slope lets matter. What is left out
// weighs less than 2^−24 of a row.
at::Tensor SoftmaxByHeads(const AttentionInputs& inputs);

// Linear attention (Katharopoulos, Vyas, Pappas & Fleuret 2020) with φ = elu + 1, as the quadratic
// form of a state that decays by exp(−slope) and by the token's own gate:
//   w_ij = φ(q_i)·φ(k_j) · write_j · exp(Σ_{j<t≤i} log_decay_t − slope·(i − j)),
//   o_i = Σ_j w_ij v_j / Σ_j w_ij.
// `log_decay` ≤ 0 and `write` in (0, 1] are [batch, length, heads], or undefined for linear
// attention without selection.
at::Tensor LinearAttention(const AttentionInputs& inputs, const at::Tensor& log_decay,
                           const at::Tensor& write);

// Scores of the query rows first … first + count − 1: [batch, heads, count, first + count], −∞
// where hidden, in the precision of qkv.
at::Tensor CausalScores(const AttentionInputs& inputs, int64_t first, int64_t count);

// α-entmax of the last dimension for α = 1 (softmax), 1.5 and 2, by sorting and the closed form
// (Martins & Astudillo 2016; Peters, Niculae & Martins 2019). Differentiable.
at::Tensor SortedEntmax(const at::Tensor& scores, double alpha);

// α-entmax of the last dimension for any α in [1, 2], by bisection in double; `alpha` broadcasts
// against scores without their last dimension. No gradients.
at::Tensor BisectedEntmax(const at::Tensor& scores, const at::Tensor& alpha);

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_ATTENTION_H_
