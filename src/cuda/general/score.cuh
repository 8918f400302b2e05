// From a dot product to z, and what a row sees: scale, query scale, softcap, ALiBi, causal, window,
// lengths, packed sequences.
//
//   s = cap(scale * query_scale_i * q.k) - slope * |i' - j|,   z = (alpha - 1) s,
//   i' = i + keys - queries (bottom-right aligned), cap(x) = softcap * tanh(x / softcap).
#ifndef FLASH_ENTMAX_CUDA_GENERAL_SCORE_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_SCORE_CUH_

#include "general/problem.h"

namespace flash_entmax::cuda {

enum class Alpha { kOneAndHalf, kTwo, kGeneral };

// p and u = p^(2 - alpha) from the excess z - tau; one alpha a head, known only at run time. The
// branch is the same for all threads of a block.
struct AlphaCurve {
  Alpha mode;
  float order;    // m = alpha - 1
  float inverse;  // 1 / m

  static __device__ __forceinline__ AlphaCurve Of(const GeneralProblem& problem, int head) {
    const float alpha = problem.alpha_per_head ? problem.alpha_per_head[head] : problem.alpha;
    return {alpha == 1.5f   ? Alpha::kOneAndHalf
            : alpha == 2.0f ? Alpha::kTwo
                            : Alpha::kGeneral,
            alpha - 1.0f, 1.0f / (alpha - 1.0f)};
  }
};

// The same with the mode known at compile time. Call sites: WithMode(curve, [&](auto weights)
// {...}).
template <Alpha kMode>
struct Weights {
  float order;
  float inverse;

  // p and u of an excess; zero for an excess <= 0. NaN stays NaN.
  __device__ __forceinline__ void Of(float excess, float* p, float* u) const {
    if constexpr (kMode == Alpha::kOneAndHalf) {
      const float w = excess < 0.0f ? 0.0f : excess;
      *p = w * w;
      *u = w;
    } else if constexpr (kMode == Alpha::kTwo) {
      *p = excess < 0.0f ? 0.0f : excess;
      *u = excess > 0.0f ? 1.0f : (excess <= 0.0f ? 0.0f : excess);
    } else {
      *p = excess <= 0.0f ? 0.0f : exp2f(inverse * __log2f(excess));
      *u = excess <= 0.0f ? 0.0f : __fdividef(*p, excess);
    }
  }

  // Newton on the alpha-norm: the step in tau from mass S = sum p and slope U = sum u, that is
  // (S / U) (1 - S^-m). From the left it never passes the root, from the right it lands on the
  // left. NaN without a weight.
  __device__ __forceinline__ float Step(float mass, float slope) const {
    if constexpr (kMode == Alpha::kOneAndHalf) {
      return __fdividef(mass - sqrtf(mass), slope);
    } else if constexpr (kMode == Alpha::kTwo) {
      return slope > 0.0f ? __fdividef(mass - 1.0f, slope) : NAN;
    } else {
      return mass / slope * -expm1f(-order * logf(mass));
    }
  }
};

template <class Body>
__device__ __forceinline__ void WithMode(const AlphaCurve& curve, Body body) {
  switch (curve.mode) {
    case Alpha::kOneAndHalf:
      return body(Weights<Alpha::kOneAndHalf>{curve.order, curve.inverse});
    case Alpha::kTwo:
      return body(Weights<Alpha::kTwo>{curve.order, curve.inverse});
    default:
      return body(Weights<Alpha::kGeneral>{curve.order, curve.inverse});
  }
}

// The sequence that query tile (kKeys: key tile) `tile` of `rows` rows belongs to, and the tile's
// first row inside it. Tiles past the end get a part without rows. Every thread of a block may call
// it; the search is linear in the number of sequences, which are read through the cache.
struct TilePlace {
  SequencePart part;
  int first = 0;  // first row of the tile, counted inside the sequence
};

// The host has not seen these numbers: they are clamped so that no row outside a tensor is touched.
__device__ __forceinline__ int Clamp(int value, int low, int high) {
  return min(max(value, low), high);
}

__device__ __forceinline__ SequencePart PartOf(const GeneralProblem& problem, int sequence) {
  SequencePart part;
  part.sequence = sequence;
  if (problem.cu_query) {
    part.first_query = Clamp(problem.cu_query[sequence], 0, problem.queries);
    part.first_key = Clamp(problem.cu_key[sequence], 0, problem.keys);
    part.queries = Clamp(problem.cu_query[sequence + 1] - part.first_query, 0,
                         min(problem.longest_query, problem.queries - part.first_query));
    part.keys = Clamp(problem.cu_key[sequence + 1] - part.first_key, 0,
                      min(problem.longest_key, problem.keys - part.first_key));
  } else {
    part.batch = sequence;
    part.queries = problem.queries;
    part.keys =
        problem.key_lengths ? Clamp(problem.key_lengths[sequence], 0, problem.keys) : problem.keys;
  }
  return part;
}

template <bool kKeys>
__device__ __forceinline__ TilePlace PlaceTile(const GeneralProblem& problem, int tile, int rows) {
  TilePlace place;
  if (!problem.cu_query) {
    // Tiles cover the whole tensor, also keys past a key length: their gradients are zeros.
    const int tiles = ((kKeys ? problem.keys : problem.queries) + rows - 1) / rows;
    place.part = PartOf(problem, tile / tiles);
    place.first = tile % tiles * rows;
    return place;
  }
  const int* const cu = kKeys ? problem.cu_key : problem.cu_query;
  for (int sequence = 0; sequence < problem.sequences; ++sequence) {
    const int tiles = (cu[sequence + 1] - cu[sequence] + rows - 1) / rows;
    if (tile < tiles) {
      place.part = PartOf(problem, sequence);
      place.first = tile * rows;
      return place;
    }
    tile -= tiles;
  }
  return place;
}

// Keys [first, end) that query `row` of a part sees; empty if end <= first.
struct KeyRange {
  int first;
  int end;

  static __device__ __forceinline__ KeyRange Of(const GeneralProblem& problem,
                                                const SequencePart& part, int row) {
    if (row >= part.queries) return {0, 0};
    const int position = row + part.keys - part.queries;
    const int right = problem.causal ? 0 : problem.window_right;
    // kUnlimited + position stays below 2^31: lengths are below 2^30.
    const int end = min(part.keys, position + min(right, problem.window_right) + 1);
    return {max(0, position - problem.window_left), max(end, 0)};
  }
};

// 1 without one, and for rows past the end.
__device__ __forceinline__ float QueryScaleOf(const GeneralProblem& problem,
                                              const SequencePart& part, int head, int row) {
  if (!problem.query_scale || row >= part.queries) return 1.0f;
  return problem
      .query_scale[part.batch * problem.query_scale_stride[0] +
                   head * problem.query_scale_stride[1] +
                   static_cast<int64_t>(part.first_query + row) * problem.query_scale_stride[2]];
}
// scale * query_scale of a row.
__device__ __forceinline__ float FactorOf(const GeneralProblem& problem, const SequencePart& part,
                                          int head, int row) {
  return problem.scale * QueryScaleOf(problem, part, head, row);
}

__device__ __forceinline__ float SlopeOf(const GeneralProblem& problem, int head) {
  return problem.slopes ? problem.slopes[head] : 0.0f;
}

__device__ __forceinline__ float Capped(float cap, float s) { return cap * tanhf(s / cap); }
// ds / d(scale * query_scale * dot): 1 - tanh^2. Only with a softcap.
__device__ __forceinline__ float CapDerivative(float softcap, float factor, float dot) {
  const float t = tanhf(factor * dot / softcap);
  return fmaf(-t, t, 1.0f);
}

// Turns kCount dot products of a thread into z. score(e) is a reference to the e-th, factor(e) is
// (alpha - 1) scale query_scale of its row, base + distance(e) its i' - j: the distances of a
// thread's scores differ by constants, so that one number is converted and not one a score, which
// takes eight times as long as a sum. What is rarely wanted are loops of their own, passed over in
// one jump: the tangents are hundreds of instructions, and a jump a score made the instruction
// cache the bound of every kernel with slopes.
template <int kCount, bool kMayCap = true, class ScoreOf, class FactorOfScore, class DistanceOf>
__device__ __forceinline__ void ToZ(const GeneralProblem& problem, float order, float slope,
                                    int base, ScoreOf score, FactorOfScore factor,
                                    DistanceOf distance) {
#pragma unroll
  // Rounded here, in the forward and the backward alike: what follows may be fused.
  for (int e = 0; e < kCount; ++e) score(e) = __fmul_rn(score(e), factor(e));
  if (kMayCap && problem.softcap > 0.0f) {
    const float cap = order * problem.softcap;
#pragma unroll
    for (int e = 0; e < kCount; ++e) score(e) = Capped(cap, score(e));
  }
  if (slope == 0.0f) return;
  const float drop = -order * slope, origin = static_cast<float>(base);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    score(e) = fmaf(drop, fabsf(origin + static_cast<float>(distance(e))), score(e));
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_SCORE_CUH_
