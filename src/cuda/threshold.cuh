// One step towards the threshold tau, for any alpha in (1, 2].
//
// With w = [z - tau]+ and m = alpha - 1:  mass S = sum w^(1/m),  slope U = sum w^(1/m - 1).
// Newton on the norm S^m (convex and falling in tau) gives d_tau = (S / U) (1 - S^-m). From the
// left it never passes the root, from the right it lands on the left, and tied scores need one
// step. alpha = 1.5: (S - sqrt S) / sum w.   alpha = 2: (S - 1) / #{w > 0}.
#ifndef FLASH_ENTMAX_CUDA_THRESHOLD_CUH_
#define FLASH_ENTMAX_CUDA_THRESHOLD_CUH_

#include "problem.h"

namespace flash_entmax::cuda {

template <AlphaMode kAlpha>
struct AlphaRule {
  float order;    // m = alpha - 1
  float inverse;  // 1 / m

  __host__ __device__ explicit AlphaRule(float alpha)
      : order(alpha - 1.0f), inverse(1.0f / (alpha - 1.0f)) {}

  // The rounding of S and of a step, in units of z, is below this.
  static constexpr float kStepSlack = kAlpha == AlphaMode::kGeneral ? 2e-5f : 4e-6f;

  // p = w^(1/m) and u = p^(2 - alpha) of an excess w >= 0.
  __device__ __forceinline__ void Weights(float excess, float* p, float* u) const {
    if constexpr (kAlpha == AlphaMode::kOneAndHalf) {
      *p = excess * excess;
      *u = excess;
    } else if constexpr (kAlpha == AlphaMode::kTwo) {
      *p = excess;
      *u = excess > 0.0f ? 1.0f : 0.0f;
    } else {
      *p = exp2f(inverse * __log2f(excess));
      *u = excess > 0.0f ? __fdividef(*p, excess) : 0.0f;
    }
  }

  __device__ __forceinline__ void Add(float excess, float* mass, float* slope) const {
    if constexpr (kAlpha == AlphaMode::kOneAndHalf) {
      *slope += excess;
      *mass = fmaf(excess, excess, *mass);
    } else {
      float p, u;
      Weights(excess, &p, &u);
      *mass += p;
      *slope += u;
    }
  }

  // The step in tau. Empty sums give NaN, which fails every comparison.
  __device__ __forceinline__ float Step(float mass, float slope) const {
    if constexpr (kAlpha == AlphaMode::kOneAndHalf) {
      return __fdividef(mass - sqrtf(mass), slope);
    } else if constexpr (kAlpha == AlphaMode::kTwo) {
      return __fdividef(mass - 1.0f, slope);
    } else {
      return mass / slope * -expm1f(-order * logf(mass));
    }
  }
};

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_THRESHOLD_CUH_
