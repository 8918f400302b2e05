// Backward of the tile path, query side: delta and dQ of flagged units of 128 queries.
//
// A persistent CTA: a producer warp and two warp groups of 64 queries (Q and dO in registers). For
// each 64 keys: S = Q.K^T and dP = dO.V^T, then with w = [z - tau]+ and u = w^((2-alpha)/(alpha-1))
// dS = u (dP - delta) rounded to 16 bits, and dQ += dS.K. delta = dO . (mean of V under u), which
// the forward saved. Three products a score; no two CTAs add to the same row, so nothing is atomic.
// Rows that a NaN or infinity reached are done again without tensor cores (tile_careful.cuh).
// With a factor f a row (query_scale): dQ is f times the above, delta is stored as f delta for the
// key side, and f's gradient comes from sums over the row in fp32 (FactorSums).
// Traffic: queries and gradients once, keys and values once a unit, from L2.
#ifndef FLASH_ENTMAX_CUDA_TILE_ROWS_BACKWARD_CUH_
#define FLASH_ENTMAX_CUDA_TILE_ROWS_BACKWARD_CUH_

#include <cfloat>

#include "launch_order.cuh"
#include "tile_careful.cuh"
#include "tile_product.cuh"

namespace flash_entmax::cuda {

template <class Element>
struct TileRowsParams {
  Shape shape;
  Tensor<const Element> query, output_gradient;
  Tensor<Element> query_gradient;
  SavedState saved;
  const Control* control;
  float* delta;            // (batch * heads) x padded_queries, times the row's factor
  float* factor_gradient;  // (batch * heads) x queries, or null
  bool all_units;
  Tensor<const Element> key, value;  // the tensors of the maps
};

template <int kHeadDim>
struct TileRowsTraits {
  static constexpr int kConsumers = 2;
  static constexpr int kTileKeys = 128;
  static constexpr int kStages = kHeadDim == 128 ? 3 : 5;
  static constexpr int kConsumerThreads = kConsumers * kWarpGroupThreads;
  static constexpr int kThreads = kConsumerThreads + kWarpGroupThreads;
  static constexpr int kStageBytes = kTileBytes<kHeadDim, kTileKeys>;
};

template <int kHeadDim>
struct TileRowsShared {
  using Traits = TileRowsTraits<kHeadDim>;
  alignas(1024) char key[Traits::kStages][Traits::kStageBytes];
  alignas(1024) char value[Traits::kStages][Traits::kStageBytes];
  UnitFactors factors;
  FactorSums factor_sums[2][Traits::kConsumerThreads];
  uint64_t full[Traits::kStages];
  uint64_t empty[Traits::kStages];
};

// Calls body(unit) for the units of this CTA, those with the most keys first.
template <class Body>
__device__ __forceinline__ void ForEachUnit(const Shape& shape, const int* unit_flag, Body body) {
  const int count = shape.BatchHeads() * shape.Units();
  for (int index = blockIdx.x; index < count; index += gridDim.x) {
    const int unit =
        index % shape.BatchHeads() * shape.Units() + shape.Units() - 1 - index / shape.BatchHeads();
    const bool flagged = unit_flag == nullptr || unit_flag[unit] != kListPath;
    if (__shfl_sync(kFullWarp, static_cast<int>(flagged), 0) &&
        unit % shape.Units() * Shape::kUnitRows < shape.queries) {
      body(unit);
    }
  }
}

// Writes a warp's rows of dQ and the gradients of their factors.
template <class Element, int kHeadDim, AlphaMode kAlpha, size_t kUnitThreads>
__device__ __forceinline__ void StoreQueryGradients(const TileRowsParams<Element>& params,
                                                    const TileRule<kAlpha>& rule, int unit,
                                                    const float (&threshold)[2],
                                                    const float (&delta)[2],
                                                    const FactorSums (*factor_sums)[kUnitThreads],
                                                    const float (&sum)[kHeadDim / 2]) {
  const Shape& shape = params.shape;
  const int lane = threadIdx.x % kWarpSize;
  const UnitRows rows(shape, unit);
  Element* const gradients = params.query_gradient.Row(rows.batch, rows.query_head, 0);
  const int64_t stride = params.query_gradient.strides.row;
  int bad[2] = {0, 0};
  FindNonFinite(sum, bad);
  const float* const row_factors = params.saved.row_factor;
  float* factor_gradients = nullptr;
  if (params.factor_gradient) {
    factor_gradients = params.factor_gradient + static_cast<int64_t>(rows.head) * shape.queries;
  }
  float factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = rows.warp_row + lane / 4 + 8 * i;
    // Rows with NaN or +inf among their scores have a NaN threshold.
    const bool undefined = isnan(threshold[i]);
    factor[i] = undefined ? NAN : shape.scale;
    const float row_factor = row_factors ? row_factors[rows.PaddedRow(shape, row)] : 1.0f;
    if (factor_gradients) {
      // The sums' scores have been multiplied by the factor, which must not be (almost) zero.
      bad[i] |= fabsf(row_factor) < 1e-20f;
      const FactorSums& own = factor_sums[i][threadIdx.x];
      const FactorSums sums = {QuadSum(own.u), QuadSum(own.ds), QuadSum(own.u_score),
                               QuadSum(own.ds_score)};
      if (lane % 4 == 0 && row < shape.queries) {
        factor_gradients[row] = factor[i] * __fdividef(sums.Gradient(), row_factor);
      }
    }
    bad[i] = bad[i] && !undefined;
    factor[i] *= row_factor;
  }
  StoreRows<Element, kHeadDim>(sum, factor[0], factor[1], gradients, stride,
                               rows.warp_row + lane / 4, shape.queries, lane);
  if (!__any_sync(kFullWarp, bad[0] || bad[1])) return;
  __syncwarp();
  constexpr int kPart = kHeadDim / kLanesPerRow;
  const int part_lane = lane % kLanesPerRow, kv_head = rows.query_head / shape.group;
  const RowBase keys = RowBase::Of(params.key, rows.batch, kv_head, part_lane, kPart);
  const RowBase values = RowBase::Of(params.value, rows.batch, kv_head, part_lane, kPart);
#pragma unroll 1
  for (int index = lane / kLanesPerRow; index < kStripRows; index += kRowsPerWarp) {
    const bool again = OfRow(bad, index) && rows.warp_row + index < shape.queries;
    const int row = again ? rows.warp_row + index : 0;
    CarefulQueryGradient<Element, kHeadDim, kAlpha>(
        rule, shape, params.query.Row(rows.batch, rows.query_head, row),
        params.output_gradient.Row(rows.batch, rows.query_head, row), keys, values,
        OfRow(threshold, index), OfRow(delta, index),
        row_factors ? row_factors[rows.PaddedRow(shape, row)] : 1.0f, again,
        again ? shape.VisibleKeys(row) : 0, part_lane, gradients + row * stride,
        factor_gradients ? factor_gradients + row : nullptr);
  }
}

template <class Element, int kHeadDim, AlphaMode kAlpha>
__global__ void __launch_bounds__(TileRowsTraits<kHeadDim>::kThreads, 1)
    TileRowsBackwardKernel(const __grid_constant__ CUtensorMap key_map,
                           const __grid_constant__ CUtensorMap value_map,
                           const __grid_constant__ TileRowsParams<Element> params) {
  WaitForEarlierKernels();
  using Traits = TileRowsTraits<kHeadDim>;
  if (!params.all_units && __shfl_sync(kFullWarp, params.control->flagged_count, 0) == 0) return;
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<TileRowsShared<kHeadDim>*>(shared_bytes);
  const Shape& shape = params.shape;
  const int* const unit_flag = params.all_units ? nullptr : params.saved.unit_flag;
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const int group = __shfl_sync(kFullWarp, thread / kWarpGroupThreads, 0);
  if (thread == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      cute::initialize_barrier(shared.full[stage], 1);
      cute::initialize_barrier(shared.empty[stage], Traits::kConsumerThreads / kWarpSize);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  RingPosition<Traits::kStages> position;

  if (group == Traits::kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<24>();
    if (thread / kWarpSize == Traits::kConsumerThreads / kWarpSize) {
      ForEachUnit(shape, unit_flag, [&](int unit) {
        const int head = unit / shape.Units();
        const int batch = head / shape.heads, kv_head = head % shape.heads / shape.group;
        const int tiles = UnitTiles(shape, unit, Traits::kTileKeys);
        for (int tile = 0; tile < tiles; ++tile) {
          if (lane == 0) {
            cute::wait_barrier(shared.empty[position.stage], position.parity ^ 1);
            uint64_t* const full = &shared.full[position.stage];
            cute::set_barrier_transaction_bytes(*full, 2 * Traits::kStageBytes);
            LoadTile<kHeadDim, Traits::kTileKeys>(key_map, full, shared.key[position.stage],
                                                  tile * Traits::kTileKeys, kv_head, batch);
            LoadTile<kHeadDim, Traits::kTileKeys>(value_map, full, shared.value[position.stage],
                                                  tile * Traits::kTileKeys, kv_head, batch);
          }
          position.Advance();
        }
      });
    }
    return;
  }

  cutlass::arch::warpgroup_reg_alloc<240>();
  const TileRule<kAlpha> rule(shape.alpha);
  ForEachUnit(shape, unit_flag, [&](int unit) {
    const UnitRows rows(shape, unit);
    const int row = rows.warp_row + lane / 4;
    const int visible[2] = {shape.VisibleKeys(row), shape.VisibleKeys(row + 8)};
    const int warp_keys =
        rows.warp_row + kStripRows > shape.queries ? 0 : shape.VisibleKeys(rows.warp_row);
    const int tiles = UnitTiles(shape, unit, Traits::kTileKeys);
    const int64_t padded_row = rows.PaddedRow(shape, row);

    uint32_t query[kHeadDim / 4], gradient[kHeadDim / 4];
    LoadOperand<Element, kHeadDim>(params.query.Row(rows.batch, rows.query_head, 0),
                                   params.query.strides.row, row, shape.queries, lane, query);
    LoadOperand<Element, kHeadDim>(params.output_gradient.Row(rows.batch, rows.query_head, 0),
                                   params.output_gradient.strides.row, row, shape.queries, lane,
                                   gradient);
    if (params.saved.row_factor) {
      shared.factors.Load(params.saved.row_factor + rows.PaddedRow(shape, 0), rows.warp_row);
    }
    if (params.factor_gradient) {
#pragma unroll
      for (int i = 0; i < 2; ++i) shared.factor_sums[i][thread] = FactorSums();
    }
    float threshold[2], delta[2] = {0, 0};
    {
      uint32_t mean[kHeadDim / 4];
      LoadOperand<Element, kHeadDim>(static_cast<const Element*>(params.saved.weighted_value) +
                                         rows.PaddedRow(shape, 0) * kHeadDim,
                                     kHeadDim, row, shape.queries, lane, mean);
#pragma unroll
      for (int i = 0; i < kHeadDim / 4; ++i) {
        const float2 a = ElementTraits<Element>::Unpack(mean[i]);
        const float2 b = ElementTraits<Element>::Unpack(gradient[i]);
        delta[i & 1] = fmaf(a.x, b.x, fmaf(a.y, b.y, delta[i & 1]));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      threshold[i] = params.saved.threshold[padded_row + 8 * i];
      delta[i] = QuadSum(delta[i]);
      // Rows without a distribution must not reach the gradients of their keys.
      if (isnan(threshold[i]) || visible[i] == 0) delta[i] = 0.0f;
      if (lane % 4 == 0) {
        const float factor = params.saved.row_factor ? FiniteOrZero(shared.factors.Of(i)) : 1.0f;
        params.delta[padded_row + 8 * i] = factor * delta[i];
      }
    }

    float sum[kHeadDim / 2] = {};
    float scores[32], gradients[32];
    uint32_t operand[16];
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      cute::wait_barrier(shared.full[position.stage], position.parity);
      const char* const key = shared.key[position.stage];
      const char* const value = shared.value[position.stage];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Fence(scores);
        Fence(gradients);
        cute::warpgroup_arrive();
        IssueScores<Element, kHeadDim>(query, key, Traits::kTileKeys, half * kSumKeys, scores);
        IssueScores<Element, kHeadDim>(gradient, value, Traits::kTileKeys, half * kSumKeys,
                                       gradients);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
        Fence(scores);
        Fence(gradients);
        Fence(sum);
        if (params.saved.row_factor) shared.factors.Scale(scores);
        const int first_key = tile * Traits::kTileKeys + half * kSumKeys;
        if (first_key + kSumKeys > warp_keys) {
#pragma unroll
          for (int e = 0; e < 32; ++e) {
            const int k = first_key + 8 * (e / 4) + 2 * (lane % 4) + (e & 1);
            if (k >= visible[(e >> 1) & 1]) scores[e] = -INFINITY;
          }
        }
        if (params.factor_gradient) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            FactorSums sums = shared.factor_sums[i][thread];
#pragma unroll
            for (int e = 2 * i; e < 32; e += (e & 1) ? 3 : 1) {
              float p, u;
              rule.Weights(__saturatef(fmaf(shape.coefficient, scores[e], -threshold[i])), &p, &u);
              // Zero times -inf would not be zero.
              sums.Add(u, u * (gradients[e] - delta[i]), fmaxf(scores[e], -FLT_MAX));
            }
            shared.factor_sums[i][thread] = sums;
          }
        }
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          float ds[2];
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            float p, u;
            rule.Weights(__saturatef(fmaf(shape.coefficient, scores[2 * j + x], -threshold[j & 1])),
                         &p, &u);
            ds[x] = u * (gradients[2 * j + x] - delta[j & 1]);
          }
          operand[j] = ElementTraits<Element>::Pack(ds[0], ds[1]);
        }
        Fence(sum);
        cute::warpgroup_arrive();
        IssueWeightedRows<Element, kHeadDim>(operand, key, Traits::kTileKeys, half * kSumKeys, sum);
        cute::warpgroup_commit_batch();
      }
      cute::warpgroup_wait<0>();
      Fence(sum);
      if (lane == 0) cute::arrive_barrier(shared.empty[position.stage]);
      position.Advance();
    }
    // The broadcast makes the compiler compute where the rows lie again instead of keeping it in
    // registers over the loop.
    StoreQueryGradients<Element, kHeadDim, kAlpha>(params, rule, __shfl_sync(kFullWarp, unit, 0),
                                                   threshold, delta, shared.factor_sums, sum);
  });
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_TILE_ROWS_BACKWARD_CUH_
