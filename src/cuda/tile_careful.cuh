// What the tile path does about infinities and NaN: rows whose sums on the tensor cores came out as
// infinite or NaN are computed again without them.
//
// A product on the tensor cores takes every key of a tile, and 0 * NaN = NaN: a NaN in one row of V
// would reach all 64 queries of a tile, whether they keep that key or not. Here only entries with a
// positive weight are touched, as the list path does. A warp takes four rows, eight lanes a row
// (gather.cuh), and goes over all that they see. This is slow and rare: finite inputs never come
// here.
#ifndef FLASH_ENTMAX_CUDA_TILE_CAREFUL_CUH_
#define FLASH_ENTMAX_CUDA_TILE_CAREFUL_CUH_

#include "gather.cuh"
#include "tile_weights.cuh"

namespace flash_entmax::cuda {

// One of the 16 rows of a warp's accumulators: row `index` belongs to the four lanes that share
// lane / 4 == index % 8, in register index / 8.
template <class T>
__device__ __forceinline__ T OfRow(const T (&value)[2], int index) {
  const T low = __shfl_sync(kFullWarp, value[0], index % 8 * 4);
  const T high = __shfl_sync(kFullWarp, value[1], index % 8 * 4);
  return index < 8 ? low : high;
}

// Whether a row of an accumulator (two rows a thread, four lanes a row) has an infinity or NaN.
template <int kCount>
__device__ __forceinline__ void FindNonFinite(const float (&accumulator)[kCount], int (&bad)[2]) {
  float sum[2] = {0, 0};
#pragma unroll
  for (int e = 0; e < kCount; ++e)
    sum[(e >> 1) & 1] = fmaf(accumulator[e], 0.0f, sum[(e >> 1) & 1]);
#pragma unroll
  for (int i = 0; i < 2; ++i) bad[i] |= isnan(QuadSum(sum[i]));
}

// Dot products of `vector` with rows first + i, i < 8, of `base`; lane i gets the i-th. Rows at or
// past `count` are not read; their results must not be used.
template <class Element, int kHeadDim>
__device__ __forceinline__ float ConsecutiveDots(const RowBase& base, int first, int count,
                                                 const float (&vector)[kHeadDim / 8], int lane) {
  constexpr int kPart = kHeadDim / kLanesPerRow;
  float sum[kLanesPerRow];
#pragma unroll
  for (int i = 0; i < kLanesPerRow; ++i) {
    Chunk<kPart> chunk;
    chunk.Clear();
    if (first + i < count) chunk.Load(base.Row(first + i));
    sum[i] = Dot<Element, kPart>(chunk, vector);
  }
  return TransposeReduce(sum, lane);
}

// Output of a row, and the mean of its values under u if `mean` is not null. Groups of lanes that
// are not `active` take part without a result, with `visible` = 0.
template <class Element, int kHeadDim, AlphaMode kAlpha>
__device__ __forceinline__ void CarefulOutput(const TileRule<kAlpha>& rule, float coefficient,
                                              const Element* query, const RowBase& keys,
                                              const RowBase& values, float threshold, bool active,
                                              int visible, int lane, Element* output,
                                              Element* mean) {
  constexpr int kPart = kHeadDim / kLanesPerRow;
  float vector[kPart], sum[kPart] = {}, weighted[kPart] = {};
  float mass = 0, slope = 0;
  LoadVector<Element, kPart>(query + lane * kPart, vector);
  const int longest = __reduce_max_sync(kFullWarp, visible);
#pragma unroll 1
  for (int first = 0; first < longest; first += kLanesPerRow) {
    const float dot = ConsecutiveDots<Element, kHeadDim>(keys, first, visible, vector, lane);
    const float excess =
        first + lane < visible ? __saturatef(fmaf(coefficient, dot, -threshold)) : 0.0f;
    float p, u;
    rule.Weights(excess, &p, &u);
    if (!__any_sync(kFullWarp, excess > 0.0f)) continue;
#pragma unroll 1
    for (int i = 0; i < kLanesPerRow; ++i) {
      const float p_i = __shfl_sync(kFullWarp, p, i, kLanesPerRow);
      const float u_i = __shfl_sync(kFullWarp, u, i, kLanesPerRow);
      if (!(p_i > 0.0f || u_i > 0.0f)) continue;
      Chunk<kPart> value;
      value.Load(values.Row(first + i));
      if (p_i > 0.0f) Accumulate<Element, kPart>(p_i, value, sum);
      if (u_i > 0.0f) Accumulate<Element, kPart>(u_i, value, weighted);
      mass += p_i;
      slope += u_i;
    }
  }
  if (!active) return;
  StoreVector<Element, kPart>(sum, mass > 0.0f ? 1.0f / mass : 0.0f, output + lane * kPart);
  if (mean) {
    StoreVector<Element, kPart>(weighted, slope > 0.0f ? 1.0f / slope : 0.0f, mean + lane * kPart);
  }
}

// What the gradient of a row's factor f (query_scale) is made of: sums over the row's keys. With
// the score s = q . k it is scale * sum dS s; the delta inside dS comes from a rounded mean of V,
// so what dS leaves under u is taken out: scale * (sum dS s - sum dS / sum u * sum u s).
struct FactorSums {
  float u = 0.0f, ds = 0.0f, u_score = 0.0f, ds_score = 0.0f;

  __device__ __forceinline__ void Add(float weight, float score_gradient, float score) {
    u += weight;
    ds += score_gradient;
    u_score = fmaf(weight, score, u_score);
    ds_score = fmaf(score_gradient, score, ds_score);
  }
  __device__ __forceinline__ float Gradient() const {
    return u > 0.0f ? fmaf(-__fdividef(ds, u), u_score, ds_score) : 0.0f;
  }
};

// Query gradient of a row: factor * scale * sum u (dP - delta) K over its support, and the gradient
// of its factor if `factor_gradient` is not null. `active` as above.
template <class Element, int kHeadDim, AlphaMode kAlpha>
__device__ __forceinline__ void CarefulQueryGradient(
    const TileRule<kAlpha>& rule, const Shape& shape, const Element* query,
    const Element* output_gradient, const RowBase& keys, const RowBase& values, float threshold,
    float delta, float factor, bool active, int visible, int lane, Element* query_gradient,
    float* factor_gradient) {
  constexpr int kPart = kHeadDim / kLanesPerRow;
  float vector[kPart], gradient[kPart], sum[kPart] = {};
  LoadVector<Element, kPart>(query + lane * kPart, vector);
  LoadVector<Element, kPart>(output_gradient + lane * kPart, gradient);
  FactorSums sums;
  const int longest = __reduce_max_sync(kFullWarp, visible);
#pragma unroll 1
  for (int first = 0; first < longest; first += kLanesPerRow) {
    const float dot = ConsecutiveDots<Element, kHeadDim>(keys, first, visible, vector, lane);
    const float excess = first + lane < visible
                             ? __saturatef(fmaf(shape.coefficient, factor * dot, -threshold))
                             : 0.0f;
    float p, u;
    rule.Weights(excess, &p, &u);
    if (!__any_sync(kFullWarp, u > 0.0f)) continue;
#pragma unroll 1
    for (int i = 0; i < kLanesPerRow; ++i) {
      const float u_i = __shfl_sync(kFullWarp, u, i, kLanesPerRow);
      Chunk<kPart> value, key;
      value.Clear();
      if (u_i > 0.0f) value.Load(values.Row(first + i));
      const float dp = RowSum(Dot<Element, kPart>(value, gradient));
      const float dot_i = __shfl_sync(kFullWarp, dot, i, kLanesPerRow);
      if (u_i > 0.0f) {
        key.Load(keys.Row(first + i));
        const float ds = u_i * (dp - delta);
        Accumulate<Element, kPart>(ds, key, sum);
        sums.Add(u_i, ds, dot_i);
      }
    }
  }
  if (!active) return;
  StoreVector<Element, kPart>(sum, shape.scale * factor, query_gradient + lane * kPart);
  if (factor_gradient && lane == 0) *factor_gradient = shape.scale * sums.Gradient();
}

// What the queries [first, end) of one head add to the gradients of key `key`. Lanes hold their
// part of the key and the value row and of the two sums. `threshold`, `delta` (times the factor)
// and `factor` (null: 1): of the head's rows. Groups of lanes that are not `active` take part
// without a result.
template <class Element, int kHeadDim, AlphaMode kAlpha>
__device__ __forceinline__ void CarefulKeyGradients(
    const TileRule<kAlpha>& rule, const Shape& shape, const RowBase& queries,
    const RowBase& output_gradients, const float* threshold, const float* delta,
    const float* factor, int first, int end, int key, bool active, int lane,
    const float (&key_row)[kHeadDim / 8], const float (&value_row)[kHeadDim / 8],
    float (&key_sum)[kHeadDim / 8], float (&value_sum)[kHeadDim / 8]) {
  constexpr int kPart = kHeadDim / kLanesPerRow;
#pragma unroll 1
  for (; first < end; first += kLanesPerRow) {
    float dot = ConsecutiveDots<Element, kHeadDim>(queries, first, end, key_row, lane);
    const int query = first + lane;
    const bool sees = active && query < end && key < shape.VisibleKeys(query);
    const float factor_own = factor && sees ? factor[query] : 1.0f;
    dot *= factor_own;
    // A NaN threshold gives a zero excess: rows without a distribution add nothing.
    const float excess = sees ? __saturatef(fmaf(shape.coefficient, dot, -threshold[query])) : 0.0f;
    const float delta_own = sees ? delta[query] : 0.0f;
    float p, u;
    rule.Weights(excess, &p, &u);
    if (!__any_sync(kFullWarp, excess > 0.0f)) continue;
#pragma unroll 1
    for (int i = 0; i < kLanesPerRow; ++i) {
      const float p_i = __shfl_sync(kFullWarp, p, i, kLanesPerRow);
      const float u_i = __shfl_sync(kFullWarp, u, i, kLanesPerRow);
      const float delta_i = __shfl_sync(kFullWarp, delta_own, i, kLanesPerRow);
      const float factor_i = __shfl_sync(kFullWarp, factor_own, i, kLanesPerRow);
      const bool kept = p_i > 0.0f || u_i > 0.0f;
      Chunk<kPart> gradient, query_row;
      gradient.Clear();
      if (kept) gradient.Load(output_gradients.Row(first + i));
      const float dp = RowSum(Dot<Element, kPart>(gradient, value_row));
      if (p_i > 0.0f) Accumulate<Element, kPart>(p_i, gradient, value_sum);
      if (u_i > 0.0f) {
        query_row.Load(queries.Row(first + i));
        Accumulate<Element, kPart>(u_i * (factor_i * dp - delta_i), query_row, key_sum);
      }
    }
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_TILE_CAREFUL_CUH_
