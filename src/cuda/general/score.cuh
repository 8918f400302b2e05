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
  // left.
  __device__ __forceinline__ float Step(float mass, float slope) const {
    if constexpr (kMode == Alpha::kOneAndHalf) {
      return __fdividef(mass - sqrtf(mass), slope);
    } else if constexpr (kMode == Alpha::kTwo) {
      return __fdividef(mass - 1.0f, slope);
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

// One row's way from dot products to z.
struct RowScore {
  float factor;   // scale * query_scale
  float order;    // alpha - 1
  float softcap;  // 0: none
  float slope;    // 0: none
  int position;   // i'

  static __device__ __forceinline__ RowScore Of(const GeneralProblem& problem,
                                                const SequencePart& part, int head, float order,
                                                int row) {
    float factor = problem.scale;
    if (problem.query_scale && row < part.queries) {
      factor *= problem.query_scale[part.batch * problem.query_scale_stride[0] +
                                    head * problem.query_scale_stride[1] +
                                    static_cast<int64_t>(part.first_query + row) *
                                        problem.query_scale_stride[2]];
    }
    return {factor, order, problem.softcap, problem.slopes ? problem.slopes[head] : 0.0f,
            row + part.keys - part.queries};
  }

  // z of key `key` (counted inside the sequence) with this dot product.
  __device__ __forceinline__ float Z(float dot, int key) const {
    float s = factor * dot;
    if (softcap > 0.0f) s = softcap * tanhf(s / softcap);
    if (slope != 0.0f) s = fmaf(-slope, fabsf(static_cast<float>(position - key)), s);
    return order * s;
  }

  // ds / d(scale * query_scale * dot): 1 - tanh^2.
  __device__ __forceinline__ float CapDerivative(float dot) const {
    if (!(softcap > 0.0f)) return 1.0f;
    const float t = tanhf(factor * dot / softcap);
    return fmaf(-t, t, 1.0f);
  }
};

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_SCORE_CUH_
