// Search for a row's threshold from sums over its keys at two nodes a and b at a time.
//
// f(tau) = |[z - tau]+|_(1/m) - 1, m = alpha - 1, is convex and falls (threshold.cuh), so from the
// sums S = sum p, U = sum u at the nodes follow
//   * lower bounds: a Newton step from either node lands at or left of the root;
//   * upper bounds: a node with S < 1, and where the root lies between the nodes the zero of the
//     chord of f;
//   * an estimate: the cubic that matches tau and its derivative as functions of log S at the
//     nodes. log S is so smooth that nodes 1 apart in it give S to a few parts in 10^4 (alpha
//     = 1.5, thousands of keys in the support).
// The bounds hold whatever the scores are and close in quadratically, so the search cannot fail;
// the estimate makes it fast: one pass over the keys for rows of many similar scores, two or three
// for most others.
#ifndef FLASH_ENTMAX_CUDA_THRESHOLD_SEARCH_CUH_
#define FLASH_ENTMAX_CUDA_THRESHOLD_SEARCH_CUH_

#include <cfloat>

#include "threshold.cuh"

namespace flash_entmax::cuda {

struct ThresholdSums {
  float mass;   // S
  float slope;  // U
};

template <AlphaMode kAlpha>
struct ThresholdSearch {
  float left, right;  // bounds of the root
  float estimate;
  float spread;  // the next nodes are estimate - spread and estimate + spread, within the bounds
  float slope;   // U at the estimate
  float error;   // |S - 1| to expect at the estimate

  // Scores are exact to some 1e-7 of their size, and so is a threshold.
  static __device__ __forceinline__ float Resolution(float threshold) {
    return 2.4e-7f * fmaxf(1.0f, fabsf(threshold));
  }

  __device__ __forceinline__ void Start(float bound, float guess, float width) {
    left = bound;
    right = FLT_MAX;
    estimate = guess;
    spread = width;
    slope = 0.0f;
    error = FLT_MAX;
  }

  // Nodes for the next pass. `largest`: the largest z seen so far; no mass is left far above it.
  __device__ __forceinline__ void Nodes(float largest, float* a, float* b) const {
    const float width = fmaxf(spread, 4.0f * Resolution(estimate));
    *a = fmaxf(estimate - width, fmaxf(left, largest - 1.0f));
    *b = fminf(estimate + width, fminf(right, fmaxf(largest - 1e-3f, estimate)));
    *b = fmaxf(*a, *b);
  }

  // Takes the sums at the nodes; `largest` is the largest z of the keys summed. Sums at a node
  // below largest - 1 do not count: they were cut off. Returns whether the estimate is the cubic's.
  __device__ __forceinline__ bool Refine(const AlphaRule<kAlpha>& rule, float a, float b,
                                         const ThresholdSums& at_a, const ThresholdSums& at_b,
                                         float largest) {
    const float lowest = largest - 1.0f;
    const bool valid_a = a >= lowest - 1e-5f, valid_b = b >= lowest - 1e-5f;
    const float step_a = rule.Step(at_a.mass, at_a.slope);
    const float step_b = rule.Step(at_b.mass, at_b.slope);
    const bool newton_a = valid_a && fabsf(step_a) < FLT_MAX;
    const bool newton_b = valid_b && fabsf(step_b) < FLT_MAX;

    left = fmaxf(left, lowest);
    if (newton_a) left = fmaxf(left, a + step_a);
    if (newton_b) left = fmaxf(left, b + step_b);
    right = fminf(right, largest);
    if (valid_a && at_a.mass < 1.0f) right = fminf(right, a);
    if (valid_b && at_b.mass < 1.0f) right = fminf(right, b);
    const float f_a = Norm(rule, at_a.mass) - 1.0f, f_b = Norm(rule, at_b.mass) - 1.0f;
    if (valid_a && f_a >= 0.0f && f_b <= 0.0f && f_a > f_b) {
      right = fminf(right, a + (b - a) * __fdividef(f_a, f_a - f_b));
    }
    right = fmaxf(right, left);

    // The cubic through the nodes, x = 0 at a and 1 at b.
    const float log_a = logf(at_a.mass), log_b = logf(at_b.mass);
    const float drop = log_a - log_b;
    const float x = __fdividef(log_a, drop);
    const float outside = fmaxf(fmaxf(-x, x - 1.0f), 0.0f);
    if (newton_a && newton_b && drop > 1e-5f && drop < 4.0f && outside <= 0.35f) {
      const float inverse_a = rule.order * __fdividef(at_a.mass, at_a.slope);  // -dtau / dlog S
      const float inverse_b = rule.order * __fdividef(at_b.mass, at_b.slope);
      const float y = 1.0f - x;
      estimate =
          a + x * x * (3.0f - 2.0f * x) * (b - a) + drop * x * y * (y * inverse_a - x * inverse_b);
      estimate = fminf(fmaxf(estimate, left), right);
      slope = at_a.slope + (at_b.slope - at_a.slope) * fminf(fmaxf(x, 0.0f), 1.0f);
      error = CubicError(rule, drop * (1.0f + 4.0f * outside), slope);
      spread = 2.5f * error * __fdividef(rule.order, slope);
      error = fminf(error, BracketError(rule, slope));
      return true;
    }
    // Above the best lower bound by about what Newton's step from the better node missed.
    const bool from_b = newton_b && (at_b.mass >= 1.0f || !newton_a);
    const float step = from_b ? step_b : step_a;
    const float fall_a = __fdividef(Norm(rule, at_a.mass), at_a.mass) * at_a.slope;  // -df / dtau
    const float fall_b = __fdividef(Norm(rule, at_b.mass), at_b.mass) * at_b.slope;
    float missed =
        0.5f * __fdividef(fall_a - fall_b, (b - a) * (from_b ? fall_b : fall_a)) * step * step;
    missed = newton_a && newton_b && missed > 0.0f ? fminf(missed, fabsf(step)) : 0.1f;
    estimate = fminf(left + missed, right);
    slope = fmaxf(at_a.slope, at_b.slope);
    spread = 2.0f * missed;
    error = BracketError(rule, slope);
    if (!(error >= 0.0f)) error = FLT_MAX;
    return false;
  }

  // True when a pass over the keys would not find out more than is needed.
  __device__ __forceinline__ bool Settled(float tolerance) const {
    return error <= tolerance || right - left <= Resolution(estimate);
  }

 private:
  static __device__ __forceinline__ float Norm(const AlphaRule<kAlpha>& rule, float mass) {
    if constexpr (kAlpha == AlphaMode::kOneAndHalf) {
      return sqrtf(mass);
    } else if constexpr (kAlpha == AlphaMode::kTwo) {
      return mass;
    } else {
      return exp2f(rule.order * __log2f(mass));
    }
  }

  // |S - 1| if the root were at an end of the bracket.
  __device__ __forceinline__ float BracketError(const AlphaRule<kAlpha>& rule, float slope) const {
    return fmaxf(estimate - left, right - estimate) * slope * rule.inverse;
  }

  // What 99 of 100 rows of random scores stay below, fitted in simulations. `drop` = log S(a) /
  // S(b); U^(1/m) is about the number of keys that carry the mass.
  static __device__ __forceinline__ float CubicError(const AlphaRule<kAlpha>& rule, float drop,
                                                     float slope) {
    const float log_keys = fmaxf(__log2f(slope) * rule.inverse, 0.0f);
    return rule.order <= 0.5f ? 0.06f * exp2f(2.5f * __log2f(drop) - 0.7f * log_keys)
                              : 0.25f * exp2f(1.5f * __log2f(drop) - 0.6f * log_keys);
  }
};

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_THRESHOLD_SEARCH_CUH_
