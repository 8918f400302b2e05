#include "expressivity.h"

#include <ATen/ATen.h>

#include <cmath>

namespace flash_entmax::lab {

at::Tensor SelectedStateAttention(const at::Tensor& query, const at::Tensor& key,
                                  const at::Tensor& value, const at::Tensor& selected,
                                  const at::Tensor& threshold) {
  const at::Tensor chosen = selected.to(value.scalar_type());
  // The state of row i, [e, d]: Σ over its selected keys of v_j k_jᵀ.
  const at::Tensor state = at::einsum("ij,je,jd->ied", {chosen, value, key});
  const at::Tensor sum = at::mm(chosen, value);
  return at::einsum("ied,id->ie", {state, query}) - threshold.unsqueeze(1) * sum;
}

at::Tensor PolynomialStateAttention(const at::Tensor& query, const at::Tensor& key,
                                    const at::Tensor& value, const at::Tensor& selected,
                                    const at::Tensor& threshold, int64_t degree) {
  const at::Tensor chosen = selected.to(value.scalar_type());
  at::Tensor query_power = at::ones({query.size(0), 1}, query.options());  // q^{⊗r}
  at::Tensor key_power = at::ones({key.size(0), 1}, key.options());
  at::Tensor output = at::zeros({query.size(0), value.size(1)}, value.options());
  double binomial = 1.0;
  for (int64_t r = 0; r <= degree; ++r) {
    const at::Tensor state = at::einsum("ij,je,jd->ied", {chosen, value, key_power});
    const at::Tensor coefficient =
        (-threshold).pow(static_cast<double>(degree - r)) *
        (binomial / std::pow(static_cast<double>(degree), static_cast<double>(r)));
    output = output + coefficient.unsqueeze(1) * at::einsum("ied,id->ie", {state, query_power});
    binomial *= static_cast<double>(degree - r) / static_cast<double>(r + 1);
    if (r == degree) break;
    query_power = at::einsum("ia,ib->iab", {query_power, query}).flatten(1);
    key_power = at::einsum("ja,jb->jab", {key_power, key}).flatten(1);
  }
  return output;
}

}  // namespace flash_entmax::lab
