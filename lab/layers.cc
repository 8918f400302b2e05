#include "layers.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>

#ifdef FLASH_ENTMAX_LAB_CUDA
#include "cuda/fused_layers.h"
#endif

namespace flash_entmax::lab {
namespace {

constexpr double kNormEpsilon = 1e-6;

at::Tensor Normed(const at::Tensor& x, const at::Tensor& weight) {
  const at::Tensor mean_square = (x * x).mean(-1, true);
  return x * (mean_square + kNormEpsilon).rsqrt() * (1.0 + weight.to(at::kFloat));
}

}  // namespace

std::pair<at::Tensor, at::Tensor> EmbedAndNorm(const at::Tensor& tokens,
                                               const at::Tensor& embedding,
                                               const at::Tensor& weight, at::ScalarType compute) {
  const double scale = std::sqrt(static_cast<double>(embedding.size(1)));
#ifdef FLASH_ENTMAX_LAB_CUDA
  if (cuda::CanFuse(embedding)) return cuda::EmbedAndNorm(tokens, embedding, weight, scale);
#endif
  at::Tensor rows;
  if (at::GradMode::is_enabled()) {
    // As a product, whose gradient is a product too: deterministic, and no scatter.
    const at::Tensor one_hot =
        tokens.unsqueeze(1) == at::arange(embedding.size(0), tokens.options());
    rows = at::mm(one_hot.to(compute), embedding);
  } else {
    rows = embedding.index_select(0, tokens);
  }
  const at::Tensor stream = rows.to(at::kFloat) * scale;
  return {stream, Normed(stream, weight).to(compute)};
}

std::pair<at::Tensor, at::Tensor> AddAndNorm(const at::Tensor& stream, const at::Tensor& update,
                                             const at::Tensor& post, const at::Tensor& pre,
                                             at::ScalarType compute) {
#ifdef FLASH_ENTMAX_LAB_CUDA
  if (post.defined() && cuda::CanFuse(update)) return cuda::AddAndNorm(stream, update, post, pre);
#endif
  const at::Tensor wide = update.to(at::kFloat);
  const at::Tensor sum = stream + (post.defined() ? Normed(wide, post) : wide);
  return {sum, Normed(sum, pre).to(compute)};
}

at::Tensor GatedUnit(const at::Tensor& gate_up) {
#ifdef FLASH_ENTMAX_LAB_CUDA
  if (gate_up.is_cuda() && gate_up.scalar_type() == at::kBFloat16 && gate_up.size(1) % 8 == 0) {
    return cuda::GatedUnit(gate_up);
  }
#endif
  const std::vector<at::Tensor> halves = gate_up.chunk(2, -1);
  return at::gelu(halves[0], "tanh") * halves[1];
}

at::Tensor AdaptiveScale(const at::Tensor& projected, const at::Tensor& bias, int64_t plain) {
#ifdef FLASH_ENTMAX_LAB_CUDA
  if (projected.is_cuda()) return cuda::AdaptiveScale(projected, bias, plain);
#endif
  const int64_t length = projected.size(1), scaled = projected.size(2) / 2;
  const at::Tensor both = projected.to(at::kFloat) + bias.to(at::kFloat);
  const at::Tensor beta = at::softplus(both.narrow(2, 0, scaled));
  const at::Tensor gamma = 2.0 * both.narrow(2, scaled, scaled).tanh();
  // log(i + 2)^γ = exp(γ·log log(i + 2)); log 2 > 0, so that the inner logarithm exists.
  const at::Tensor log_log =
      at::arange(2, length + 2, both.options()).log().log().view({1, length, 1});
  const at::Tensor factor = 1.0 + beta * (gamma * log_log).exp();
  if (plain == 0) return factor;
  return at::cat({at::ones({projected.size(0), length, plain}, both.options()), factor}, 2);
}

}  // namespace flash_entmax::lab
