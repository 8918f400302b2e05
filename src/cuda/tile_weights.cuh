// AlphaRule for the tile path, where the weights of every score are computed: for a general alpha
// two special-function instructions a score.
#ifndef FLASH_ENTMAX_CUDA_TILE_WEIGHTS_CUH_
#define FLASH_ENTMAX_CUDA_TILE_WEIGHTS_CUH_

#include "threshold.cuh"

namespace flash_entmax::cuda {

template <AlphaMode kAlpha>
struct TileRule : AlphaRule<kAlpha> {
  using AlphaRule<kAlpha>::AlphaRule;

  // u = w^(1/m - 1) and p = u w; both are zero for w = 0, whose logarithm is -inf.
  __device__ __forceinline__ void Weights(float excess, float* p, float* u) const {
    if constexpr (kAlpha == AlphaMode::kGeneral) {
      float exponent, power;
      asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(exponent) : "f"(excess));
      asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"((this->inverse - 1.0f) * exponent));
      *u = power;
      *p = power * excess;
    } else {
      AlphaRule<kAlpha>::Weights(excess, p, u);
    }
  }

  __device__ __forceinline__ void Add(float excess, float* mass, float* slope) const {
    if constexpr (kAlpha == AlphaMode::kGeneral) {
      float p, u;
      Weights(excess, &p, &u);
      *mass = fmaf(u, excess, *mass);
      *slope += u;
    } else {
      AlphaRule<kAlpha>::Add(excess, mass, slope);
    }
  }
};

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_TILE_WEIGHTS_CUH_
