// The layers of layers.h on GPUs, as differentiable functions over the kernels of kernels.h.

#ifndef FLASH_ENTMAX_LAB_CUDA_FUSED_LAYERS_H_
#define FLASH_ENTMAX_LAB_CUDA_FUSED_LAYERS_H_

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>

namespace flash_entmax::lab::cuda {

// True for what AddAndNorm takes: bfloat16 updates on a GPU, a post-norm, a supported width.
bool CanFuse(const at::Tensor& stream, const at::Tensor& update, const at::Tensor& post);

std::pair<at::Tensor, at::Tensor> AddAndNorm(const at::Tensor& stream, const at::Tensor& update,
                                             const at::Tensor& post, const at::Tensor& pre);
at::Tensor GatedUnit(const at::Tensor& gate_up);
at::Tensor AdaptiveScale(const at::Tensor& projected, const at::Tensor& bias, int64_t plain);

}  // namespace flash_entmax::lab::cuda

#endif  // FLASH_ENTMAX_LAB_CUDA_FUSED_LAYERS_H_
