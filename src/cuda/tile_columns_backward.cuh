// Backward of the tile path, key side: what flagged units of queries add to dK and dV.
//
// A persistent CTA owns 128 keys: a producer warp and two warp groups of 64 keys. It visits the
// flagged units of every query head that reads these keys, in a fixed order, 64 queries at a time:
// S^T = K.Q^T and dP^T = V.dO^T, then P and dS as 16-bit operands, dV += P^T.dO, dK += dS^T.Q. Four
// products a score; sums stay in registers and leave as fp32, to which the list path adds its part
// (support_columns_backward.cuh).
// With a factor f a query (query_scale) scores and output gradients are multiplied by it, delta has
// been: dS is then f dS.
// K and V are operands in registers, or in shared memory for head size 128. Keys whose sums came
// out as NaN or infinite are done again without tensor cores (tile_careful.cuh).
// Traffic: keys and values once, queries and gradients once a block of keys, from L2.
#ifndef FLASH_ENTMAX_CUDA_TILE_COLUMNS_BACKWARD_CUH_
#define FLASH_ENTMAX_CUDA_TILE_COLUMNS_BACKWARD_CUH_

#include "launch_order.cuh"
#include "tile_careful.cuh"
#include "tile_product.cuh"

namespace flash_entmax::cuda {

template <class Element>
struct TileColumnsParams {
  Shape shape;
  Tensor<const Element> key, value;
  SavedState saved;
  const Control* control;
  const float* delta;     // times the row's factor
  float* key_gradient;    // (batch * kv_heads) x padded_keys x head_dim
  float* value_gradient;  // the same
  int* block_flag;        // (batch * kv_heads) x blocks: 1 where the sums above are valid
  int padded_keys;
  bool all_units;
  Tensor<const Element> query, output_gradient;  // the tensors of the maps
};

template <int kHeadDim>
struct TileColumnsTraits {
  static constexpr int kConsumers = 2;
  static constexpr int kBlockKeys = 128;
  static constexpr int kStepQueries = 64;
  static constexpr int kStages = 4;
  static constexpr bool kSharedOperands = kHeadDim == 128;
  static constexpr int kConsumerThreads = kConsumers * kWarpGroupThreads;
  static constexpr int kThreads = kConsumerThreads + kWarpGroupThreads;
  static constexpr int kStageBytes = kTileBytes<kHeadDim, kStepQueries>;
  static constexpr int kBlockBytes = kSharedOperands ? kTileBytes<kHeadDim, kBlockKeys> : 0;
};

template <int kHeadDim>
struct TileColumnsShared {
  using Traits = TileColumnsTraits<kHeadDim>;
  alignas(1024) char query[Traits::kStages][Traits::kStageBytes];
  alignas(1024) char gradient[Traits::kStages][Traits::kStageBytes];
  alignas(1024) char key[Traits::kBlockBytes + 16];
  alignas(1024) char value[Traits::kBlockBytes + 16];
  alignas(128) float threshold[Traits::kStages][Traits::kStepQueries];
  alignas(128) float delta[Traits::kStages][Traits::kStepQueries];
  alignas(128) float factor[Traits::kStages][Traits::kStepQueries];
  // Here to save registers: blocks of keys of all heads, what a stage receives, whether there are
  // factors.
  int work_count, stage_bytes;
  bool scaled;
  int first_query[Traits::kStages];  // -1: the block of keys is done
  uint64_t full[Traits::kStages];
  uint64_t empty[Traits::kStages];
  uint64_t block_full;
  uint64_t block_empty;
};

// Sums again over the queries of flagged units, for those of the warp's 16 keys from `first_key`
// that are `bad` (two keys a thread, as in an accumulator).
template <class Element, int kHeadDim, AlphaMode kAlpha>
__device__ __forceinline__ void RedoKeys(const TileColumnsParams<Element>& params,
                                         const TileRule<kAlpha>& rule, int kv, int first_key,
                                         const int (&bad)[2]) {
  constexpr int kPart = kHeadDim / kLanesPerRow;
  const Shape& shape = params.shape;
  const int lane = threadIdx.x % kLanesPerRow, part = threadIdx.x % kWarpSize / kLanesPerRow;
  const int batch = kv / shape.kv_heads, kv_head = kv % shape.kv_heads;
#pragma unroll 1
  for (int index = part; index < kStripRows; index += kRowsPerWarp) {
    const bool active = OfRow(bad, index) && first_key + index < shape.keys;
    if (!__any_sync(kFullWarp, active)) continue;
    const int key = active ? first_key + index : 0;
    float key_row[kPart], value_row[kPart], key_sum[kPart] = {}, value_sum[kPart] = {};
    LoadVector<Element, kPart>(params.key.Row(batch, kv_head, key) + lane * kPart, key_row);
    LoadVector<Element, kPart>(params.value.Row(batch, kv_head, key) + lane * kPart, value_row);
#pragma unroll 1
    for (int member = 0; member < shape.group; ++member) {
      const int query_head = kv_head * shape.group + member;
      const int head = batch * shape.heads + query_head;
      const int64_t first_row = static_cast<int64_t>(head) * shape.padded_queries;
#pragma unroll 1
      for (int first = 0; first < shape.queries; first += Shape::kUnitRows) {
        const int unit = head * shape.Units() + first / Shape::kUnitRows;
        if (!params.all_units && params.saved.unit_flag[unit] == kListPath) continue;
        CarefulKeyGradients<Element, kHeadDim, kAlpha>(
            rule, shape, RowBase::Of(params.query, batch, query_head, lane, kPart),
            RowBase::Of(params.output_gradient, batch, query_head, lane, kPart),
            params.saved.threshold + first_row, params.delta + first_row,
            params.saved.row_factor ? params.saved.row_factor + first_row : nullptr, first,
            min(first + Shape::kUnitRows, shape.queries), key, active, lane, key_row, value_row,
            key_sum, value_sum);
      }
    }
    if (active) {
      const int64_t offset =
          (static_cast<int64_t>(kv) * params.padded_keys + key) * kHeadDim + lane * kPart;
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        params.key_gradient[offset + i] = key_sum[i];
        params.value_gradient[offset + i] = value_sum[i];
      }
    }
  }
}

template <class Element, int kHeadDim, AlphaMode kAlpha>
__global__ void __launch_bounds__(TileColumnsTraits<kHeadDim>::kThreads, 1)
    TileColumnsBackwardKernel(const __grid_constant__ CUtensorMap query_map,
                              const __grid_constant__ CUtensorMap gradient_map,
                              const __grid_constant__ CUtensorMap key_map,
                              const __grid_constant__ CUtensorMap value_map,
                              const __grid_constant__ TileColumnsParams<Element> params) {
  WaitForEarlierKernels();
  using Traits = TileColumnsTraits<kHeadDim>;
  constexpr int kStep = Traits::kStepQueries;
  if (!params.all_units && __shfl_sync(kFullWarp, params.control->flagged_count, 0) == 0) return;
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<TileColumnsShared<kHeadDim>*>(shared_bytes);
  const Shape& shape = params.shape;
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const int group = __shfl_sync(kFullWarp, thread / kWarpGroupThreads, 0);
  const int blocks = params.padded_keys / Traits::kBlockKeys;
  if (thread == 0) {
    shared.work_count = blocks * shape.KeyHeads();
    shared.scaled = params.saved.row_factor != nullptr;
    const int row_arrays = params.saved.row_factor ? 3 : 2;
    shared.stage_bytes =
        2 * Traits::kStageBytes + row_arrays * kStep * static_cast<int>(sizeof(float));
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      cute::initialize_barrier(shared.full[stage], 1);
      cute::initialize_barrier(shared.empty[stage], Traits::kConsumerThreads / kWarpSize);
    }
    cute::initialize_barrier(shared.block_full, 1);
    cute::initialize_barrier(shared.block_empty, Traits::kConsumerThreads / kWarpSize);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  RingPosition<Traits::kStages> position;
  RingPosition<1> block_position;

  if (group == Traits::kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<24>();
    if (thread != Traits::kConsumerThreads) return;
    for (int work = blockIdx.x; work < shared.work_count; work += gridDim.x) {
      const int kv = work % shape.KeyHeads();
      const int first_key = work / shape.KeyHeads() * Traits::kBlockKeys;
      const int batch = kv / shape.kv_heads, kv_head = kv % shape.kv_heads;
      if constexpr (Traits::kSharedOperands) {
        cute::wait_barrier(shared.block_empty, block_position.parity ^ 1);
        cute::set_barrier_transaction_bytes(shared.block_full, 2 * Traits::kBlockBytes);
        LoadTile<kHeadDim, Traits::kBlockKeys>(key_map, &shared.block_full, shared.key, first_key,
                                               kv_head, batch);
        LoadTile<kHeadDim, Traits::kBlockKeys>(value_map, &shared.block_full, shared.value,
                                               first_key, kv_head, batch);
        block_position.Advance();
      }
      // The first query that sees the first key of the block.
      const int first_query = shape.causal ? max(0, first_key - (shape.keys - shape.queries)) : 0;
      for (int member = 0; member < shape.group; ++member) {
        const int query_head = kv_head * shape.group + member;
        const int head = batch * shape.heads + query_head;
        for (int query = first_query / kStep * kStep; query < shape.queries; query += kStep) {
          const int unit = head * shape.Units() + query / Shape::kUnitRows;
          if (!params.all_units && params.saved.unit_flag[unit] == kListPath) continue;
          const int stage = position.stage;
          cute::wait_barrier(shared.empty[stage], position.parity ^ 1);
          shared.first_query[stage] = query;
          uint64_t* const full = &shared.full[stage];
          cute::set_barrier_transaction_bytes(*full, shared.stage_bytes);
          const size_t padded_row = static_cast<size_t>(head) * shape.padded_queries + query;
          cute::SM90_BULK_COPY_G2S::copy(params.saved.threshold + padded_row, full,
                                         shared.threshold[stage], kStep * sizeof(float));
          cute::SM90_BULK_COPY_G2S::copy(params.delta + padded_row, full, shared.delta[stage],
                                         kStep * sizeof(float));
          if (shared.scaled) {
            cute::SM90_BULK_COPY_G2S::copy(params.saved.row_factor + padded_row, full,
                                           shared.factor[stage], kStep * sizeof(float));
          }
          LoadTile<kHeadDim, kStep>(query_map, full, shared.query[stage], query, query_head, batch);
          LoadTile<kHeadDim, kStep>(gradient_map, full, shared.gradient[stage], query, query_head,
                                    batch);
          position.Advance();
        }
      }
      cute::wait_barrier(shared.empty[position.stage], position.parity ^ 1);
      shared.first_query[position.stage] = -1;
      cute::arrive_barrier(shared.full[position.stage]);
      position.Advance();
    }
    return;
  }

  cutlass::arch::warpgroup_reg_alloc<240>();
  const TileRule<kAlpha> rule(shape.alpha);
  for (int work = blockIdx.x; work < shared.work_count; work += gridDim.x) {
    const int kv = work % shape.KeyHeads(), block = work / shape.KeyHeads();
    const int batch = kv / shape.kv_heads, kv_head = kv % shape.kv_heads;
    const int block_row = thread / kWarpSize * kStripRows + lane / 4;
    const int key = block * Traits::kBlockKeys + block_row;
    uint32_t key_operand[Traits::kSharedOperands ? 1 : kHeadDim / 4];
    uint32_t value_operand[Traits::kSharedOperands ? 1 : kHeadDim / 4];
    if constexpr (Traits::kSharedOperands) {
      cute::wait_barrier(shared.block_full, block_position.parity);
    } else {
      LoadOperand<Element, kHeadDim>(params.key.Row(batch, kv_head, 0), params.key.strides.row, key,
                                     shape.keys, lane, key_operand);
      LoadOperand<Element, kHeadDim>(params.value.Row(batch, kv_head, 0), params.value.strides.row,
                                     key, shape.keys, lane, value_operand);
    }
    float key_sum[kHeadDim / 2] = {}, value_sum[kHeadDim / 2] = {};
    float scores[32], gradients[32];
    uint32_t p_operand[16], ds_operand[16];
    bool any = false;
#pragma unroll 1
    for (;;) {
      const int stage = position.stage;
      cute::wait_barrier(shared.full[stage], position.parity);
      const int first_query = __shfl_sync(kFullWarp, shared.first_query[stage], 0);
      if (first_query < 0) break;
      any = true;
      const char* const query_tile = shared.query[stage];
      const char* const gradient_tile = shared.gradient[stage];
      Fence(scores);
      Fence(gradients);
      cute::warpgroup_arrive();
      if constexpr (Traits::kSharedOperands) {
        // Not `group`: the broadcast needs no register over the loop.
        const int group_key = __shfl_sync(kFullWarp, thread / kWarpGroupThreads, 0) * 64;
        IssueSharedScores<Element, kHeadDim>(shared.key, Traits::kBlockKeys, group_key, query_tile,
                                             kStep, 0, scores);
        IssueSharedScores<Element, kHeadDim>(shared.value, Traits::kBlockKeys, group_key,
                                             gradient_tile, kStep, 0, gradients);
      } else {
        IssueScores<Element, kHeadDim>(key_operand, query_tile, kStep, 0, scores);
        IssueScores<Element, kHeadDim>(value_operand, gradient_tile, kStep, 0, gradients);
      }
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
      Fence(scores);
      Fence(gradients);
      if (params.saved.row_factor) {
#pragma unroll
        for (int e = 0; e < 32; e += 2) {
          const float2 pair =
              *reinterpret_cast<const float2*>(&shared.factor[stage][8 * (e / 4) + 2 * (lane % 4)]);
          const float factor[2] = {FiniteOrZero(pair.x), FiniteOrZero(pair.y)};
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            scores[e + x] *= factor[x];
            gradients[e + x] *= factor[x];
          }
        }
      }
      // Queries past the end have threshold +inf; keys past the end are not stored.
      if (shape.VisibleKeys(first_query) < (block + 1) * Traits::kBlockKeys) {
#pragma unroll
        for (int e = 0; e < 32; ++e) {
          const int query = first_query + 8 * (e / 4) + 2 * (lane % 4) + (e & 1);
          if (key + ((e & 2) ? 8 : 0) >= shape.VisibleKeys(query)) scores[e] = -INFINITY;
        }
      }
      constexpr float kScale = ElementTraits<Element>::kWeightScale;
#pragma unroll
      for (int column = 0; column < 8; ++column) {
        const int offset = 8 * column + 2 * (lane % 4);
        const float2 threshold = *reinterpret_cast<const float2*>(&shared.threshold[stage][offset]);
        const float2 delta = *reinterpret_cast<const float2*>(&shared.delta[stage][offset]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int e = 4 * column + 2 * r;
          float p[2], u[2];
          rule.Weights(__saturatef(fmaf(shape.coefficient, scores[e], -threshold.x)), &p[0], &u[0]);
          rule.Weights(__saturatef(fmaf(shape.coefficient, scores[e + 1], -threshold.y)), &p[1],
                       &u[1]);
          p_operand[e / 2] = ElementTraits<Element>::Pack(kScale * p[0], kScale * p[1]);
          ds_operand[e / 2] = ElementTraits<Element>::Pack(u[0] * (gradients[e] - delta.x),
                                                           u[1] * (gradients[e + 1] - delta.y));
        }
      }
      Fence(key_sum);
      Fence(value_sum);
      cute::warpgroup_arrive();
      IssueWeightedRows<Element, kHeadDim>(p_operand, gradient_tile, kStep, 0, value_sum);
      IssueWeightedRows<Element, kHeadDim>(ds_operand, query_tile, kStep, 0, key_sum);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
      Fence(key_sum);
      Fence(value_sum);
      if (lane == 0) cute::arrive_barrier(shared.empty[stage]);
      position.Advance();
    }
    if (lane == 0) {
      cute::arrive_barrier(shared.empty[position.stage]);
      if constexpr (Traits::kSharedOperands) cute::arrive_barrier(shared.block_empty);
    }
    position.Advance();
    block_position.Advance();
    if (any) {
      const int64_t offset =
          (static_cast<int64_t>(kv) * params.padded_keys + block * Traits::kBlockKeys) * kHeadDim;
      StoreSums<kHeadDim>(key_sum, 1.0f, params.key_gradient + offset, block_row, lane);
      StoreSums<kHeadDim>(value_sum, 1.0f / ElementTraits<Element>::kWeightScale,
                          params.value_gradient + offset, block_row, lane);
      int bad[2] = {0, 0};
      FindNonFinite(key_sum, bad);
      FindNonFinite(value_sum, bad);
      if (__any_sync(kFullWarp, bad[0] || bad[1])) {
        __syncwarp();
        RedoKeys<Element, kHeadDim, kAlpha>(params, rule, kv, key - lane / 4, bad);
      }
    }
    if (thread == 0) params.block_flag[kv * blocks + block] = any;
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_TILE_COLUMNS_BACKWARD_CUH_
