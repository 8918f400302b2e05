// Two identities that say what sparse attention can express, as functions.
//
// (a) Sparsemax attention is linear attention whose state is written by selected keys only. On the
//     support S_i of query i, with z_ij = q_i·k_j and threshold τ_i,
//         o_i = Σ_{j∈S_i} (z_ij − τ_i)·v_j = (Σ_{j∈S_i} v_j k_jᵀ)·q_i − τ_i·Σ_{j∈S_i} v_j:
//     a state matrix and a state vector, and no function of the single score once S_i is known.
// (b) For α = 1 + 1/m the probability is a polynomial of degree m of the score on the support:
//         p_ij = (z_ij/m − τ_i)^m = Σ_r C(m, r)·(z_ij/m)^r·(−τ_i)^(m−r),
//     so that the output is Σ_r c_r(τ_i)·⟨M_r(S_i), q_i^{⊗r}⟩ with M_r the sum of v_j ⊗ k_j^{⊗r}
//     over the support: linear attention with the feature map of all monomials up to degree m.
//
// (Vasylenko et al. 2026; Santos, Gonçalves, McNamee & Martins 2026 for the polynomial kernels.)

#ifndef FLASH_ENTMAX_LAB_EXPRESSIVITY_H_
#define FLASH_ENTMAX_LAB_EXPRESSIVITY_H_

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace flash_entmax::lab {

// query: [rows, d]; key: [keys, d]; value: [keys, e]; selected: [rows, keys] bool, the supports;
// threshold: [rows]. All float64. Scores are query·key: scale the query before. Returns [rows, e].
at::Tensor SelectedStateAttention(const at::Tensor& query, const at::Tensor& key,
                                  const at::Tensor& value, const at::Tensor& selected,
                                  const at::Tensor& threshold);

// The same for α = 1 + 1/degree, by the states of (b), which have d^r entries: for small d. No
// score of a single key is ever computed.
at::Tensor PolynomialStateAttention(const at::Tensor& query, const at::Tensor& key,
                                    const at::Tensor& value, const at::Tensor& selected,
                                    const at::Tensor& threshold, int64_t degree);

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_EXPRESSIVITY_H_
