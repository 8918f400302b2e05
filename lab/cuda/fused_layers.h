// The layers of layers.h on GPUs, as differentiable functions over the kernels of kernels.h.

#ifndef FLASH_ENTMAX_LAB_CUDA_FUSED_LAYERS_H_
#define FLASH_ENTMAX_LAB_CUDA_FUSED_LAYERS_H_

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>

namespace flash_entmax::lab::cuda {

// True for what EmbedAndNorm takes as an embedding, and AddAndNorm, with a post-norm, as an update:
// bfloat16 on a GPU, of a supported width.
bool CanFuse(const at::Tensor& rows);

std::pair<at::Tensor, at::Tensor> EmbedAndNorm(const at::Tensor& tokens,
                                               const at::Tensor& embedding,
                                               const at::Tensor& weight, double scale);

std::pair<at::Tensor, at::Tensor> AddAndNorm(const at::Tensor& stream, const at::Tensor& update,
                                             const at::Tensor& post, const at::Tensor& pre);
at::Tensor GatedUnit(const at::Tensor& gate_up);
at::Tensor AdaptiveScale(const at::Tensor& projected, const at::Tensor& bias, int64_t plain);

}  // namespace flash_entmax::lab::cuda

#endif  // FLASH_ENTMAX_LAB_CUDA_FUSED_LAYERS_H_
