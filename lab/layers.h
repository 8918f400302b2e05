// The element-wise layers between matrix products. On CPUs they are compositions of PyTorch's
// operators; on GPUs each is one kernel forward and one backward (cuda/kernels.h), since a model
// this small spends as much time on them as on its products.
//
// The residual stream is float32; what enters matrix products has the type of `compute`.

#ifndef FLASH_ENTMAX_LAB_LAYERS_H_
#define FLASH_ENTMAX_LAB_LAYERS_H_

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>

namespace flash_entmax::lab {

// RmsNorm(x, w) is x / √(mean(x²) + 1e-6) · (1 + w) over the last dimension (Zhang & Sennrich 2019;
// the "1 +" as in Gemma).

// The start of the model: stream = √width · embedding[tokens], normed = RmsNorm(stream, weight).
// Returns {stream, normed}. tokens: [rows] int64; embedding: [entries, width] of type `compute`.
std::pair<at::Tensor, at::Tensor> EmbedAndNorm(const at::Tensor& tokens,
                                               const at::Tensor& embedding,
                                               const at::Tensor& weight, at::ScalarType compute);

// The end of one sublayer and the start of the next:
//   stream' = stream + RmsNorm(update, post)   (stream + update if post is undefined),
//   normed  = RmsNorm(stream', pre).
// Returns {stream', normed}. stream: [rows, width] float32; update: [rows, width].
std::pair<at::Tensor, at::Tensor> AddAndNorm(const at::Tensor& stream, const at::Tensor& update,
                                             const at::Tensor& post, const at::Tensor& pre,
                                             at::ScalarType compute);

// gelu(gate)·up with the tanh form of gelu; gate_up: [rows, 2·mlp], gate first.
at::Tensor GatedUnit(const at::Tensor& gate_up);

// The factor of adaptive-scalable entmax, δ + softplus(b)·log(i + 2)^(2·tanh(g)) with δ = 1
// (Vasylenko et al. 2026). projected: [batch, length, 2·scaled], b's before g's. Returns
// [batch, length, plain + scaled] float32: 1 for the first `plain` heads.
at::Tensor AdaptiveScale(const at::Tensor& projected, const at::Tensor& bias, int64_t plain);

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_LAYERS_H_
