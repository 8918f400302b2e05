// Forward for units of 128 queries whose supports are too large for lists (or
// for all units).
//
// A persistent CTA: a producer warp and two warp groups of 64 queries. Keys
// stream through shared memory several times; scores are recomputed on the
// tensor cores each time and never stored.
//   sample passes  (long rows) about 16 key tiles stand for all: an estimate of
//   each threshold; full passes    mass and slope at the present threshold, one
//   Newton step each (threshold.cuh).
//                  From either side a step lands at or left of the root, so the
//                  sample may be wrong without harm. Passes repeat until the
//                  last step's error, of the order of (mass - 1)^2 / slope, is
//                  below 1e-6 in every row;
//   output pass    p = w^(1/(alpha-1)) rounded to 16 bits, output = P.V, and
//   with `kSave` the mean of
//                  V under u = p^(2-alpha), which the backward needs.
// The product of the next 64 keys is in flight while the present ones are
// looked at. Traffic: queries once, keys about 3 times and values once a unit,
// from L2.
#ifndef FLASH_ENTMAX_CUDA_TILE_FORWARD_CUH_
#define FLASH_ENTMAX_CUDA_TILE_FORWARD_CUH_

#include <cfloat>

#include "tile_careful.cuh"
#include "tile_product.cuh"

namespace flash_entmax::cuda {

template <class Element>
struct TileForwardParams {
  Shape shape;
  Tensor<const Element> query;
  Tensor<Element> output;
  const RowBound* bound;  // from screening; null: none
  SavedState saved;
  Control* control;
  bool all_units;                    // every unit, not only the flagged ones
  Tensor<const Element> key, value;  // the tensors of the maps
};

// Packs a 64 x 64 accumulator as operand A.
template <class Element>
__device__ __forceinline__ void PackOperand(const float (&accumulator)[32], uint32_t (&a)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    a[i] = ElementTraits<Element>::Pack(accumulator[2 * i], accumulator[2 * i + 1]);
  }
}

template <int kHeadDim, bool kSave>
struct TileForwardTraits {
  static constexpr int kConsumers = 2;
  static constexpr int kTileKeys = 128;
  static constexpr int kStages = kHeadDim == 128 ? 6 : 8;
  static constexpr int kConsumerThreads = kConsumers * kWarpGroupThreads;
  static constexpr int kThreads = kConsumerThreads + kWarpGroupThreads;
  static constexpr int kStageBytes = kTileBytes<kHeadDim, kTileKeys>;
  static constexpr int kConsumerBarrier = 1;
  static constexpr int kMaxPasses = 40;
};

// What the producer streams next.
struct TileCommand {
  int unit;  // -1: stop
  int first_tile;
  int stride;
  bool with_values;  // value tile after each key tile
};

template <int kHeadDim, bool kSave>
struct TileForwardShared {
  using Traits = TileForwardTraits<kHeadDim, kSave>;
  alignas(1024) char tile[Traits::kStages][Traits::kStageBytes];
  uint64_t full[Traits::kStages];
  uint64_t empty[Traits::kStages];
  uint64_t command_ready;
  TileCommand command;
  int unit[2];  // present and next work unit
};

template <int kHeadDim, bool kSave>
__device__ __forceinline__ void TileForwardProducer(const CUtensorMap& key_map,
                                                    const CUtensorMap& value_map,
                                                    const Shape& shape,
                                                    TileForwardShared<kHeadDim, kSave>& shared) {
  using Traits = TileForwardTraits<kHeadDim, kSave>;
  RingPosition<Traits::kStages> position;
  for (int parity = 0;; parity ^= 1) {
    cute::wait_barrier(shared.command_ready, parity);
    const TileCommand command = shared.command;
    if (command.unit < 0) break;
    const int head = command.unit / shape.Units();
    const int batch = head / shape.heads, kv_head = head % shape.heads / shape.group;
    const int tiles = UnitTiles(shape, command.unit, Traits::kTileKeys);
    const auto load = [&](const CUtensorMap& map, int tile) {
      cute::wait_barrier(shared.empty[position.stage], position.parity ^ 1);
      cute::set_barrier_transaction_bytes(shared.full[position.stage], Traits::kStageBytes);
      LoadTile<kHeadDim, Traits::kTileKeys>(map, &shared.full[position.stage],
                                            shared.tile[position.stage], tile * Traits::kTileKeys,
                                            kv_head, batch);
      position.Advance();
    };
    for (int tile = command.first_tile; tile < tiles; tile += command.stride) {
      load(key_map, tile);
      if (command.with_values) load(value_map, tile);
    }
  }
}

template <class Element, int kHeadDim, AlphaMode kAlpha, bool kSave>
__device__ __forceinline__ void TileForwardConsumer(const TileForwardParams<Element>& params,
                                                    TileForwardShared<kHeadDim, kSave>& shared,
                                                    int group) {
  using Traits = TileForwardTraits<kHeadDim, kSave>;
  const Shape& shape = params.shape;
  const AlphaRule<kAlpha> rule(shape.alpha);
  const float coefficient = shape.coefficient;
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize % 4;
  const int work_count =
      params.all_units ? shape.BatchHeads() * shape.Units() : params.control->flagged_count;
  RingPosition<Traits::kStages> position;
  float scores[2][32];
  uint32_t query[kHeadDim / 4];

  const auto wait = [&] { cute::wait_barrier(shared.full[position.stage], position.parity); };
  const auto release = [&](int stage) {
    if (lane == 0) cute::arrive_barrier(shared.empty[stage]);
  };
  const auto issue = [&](int stage, int half) {
    Fence(scores[half]);
    cute::warpgroup_arrive();
    IssueScores<Element, kHeadDim>(query, shared.tile[stage], Traits::kTileKeys, half * kSumKeys,
                                   scores[half]);
    cute::warpgroup_commit_batch();
  };

  for (int turn = 0;; turn ^= 1) {
    if (thread == 0) {
      const int index = atomicAdd(&params.control->next_flagged, 1);
      int unit = -1;
      if (index < work_count) {
        unit = params.all_units ? index % shape.BatchHeads() * shape.Units() + shape.Units() - 1 -
                                      index / shape.BatchHeads()
                                : params.saved.flagged_units[index];
      }
      shared.unit[turn] = unit;
    }
    cutlass::arch::NamedBarrier::sync(Traits::kConsumerThreads, Traits::kConsumerBarrier);
    const int unit = __shfl_sync(kFullWarp, shared.unit[turn], 0);
    const auto send = [&](int unit, int first_tile, int stride, bool with_values) {
      if (thread == 0) {
        shared.command = TileCommand{unit, first_tile, stride, with_values};
        cute::arrive_barrier(shared.command_ready);
      }
    };
    if (unit < 0) {
      send(-1, 0, 1, false);
      break;
    }
    const int head = unit / shape.Units();
    const int batch = head / shape.heads, query_head = head % shape.heads;
    const int group_row = unit % shape.Units() * Shape::kUnitRows + group * 64;
    const int warp_row = group_row + warp * kStripRows;
    const int row = warp_row + lane / 4;
    const int visible[2] = {shape.VisibleKeys(row), shape.VisibleKeys(row + 8)};
    const int warp_keys = warp_row + kStripRows > shape.queries ? 0 : shape.VisibleKeys(warp_row);
    const int tiles = UnitTiles(shape, unit, Traits::kTileKeys);
    const size_t padded_row = static_cast<size_t>(head) * shape.padded_queries + row;
    LoadOperand<Element, kHeadDim>(params.query.Row(batch, query_head, 0), params.query.strides.row,
                                   row, shape.queries, lane, query);

    const auto mask = [&](float(&s)[32], int first_key) {
      if (first_key + kSumKeys > warp_keys) {
#pragma unroll
        for (int e = 0; e < 32; ++e) {
          const int key = first_key + 8 * (e / 4) + 2 * (lane % 4) + (e & 1);
          if (key >= visible[(e >> 1) & 1]) s[e] = -INFINITY;
        }
      }
    };
    // Streams tiles first_tile, first_tile + stride, ... and calls look(scores)
    // for 64 keys at a time.
    const auto for_each_step = [&](int first_tile, int stride, auto look) {
#pragma unroll 1
      for (int tile = first_tile; tile < tiles; tile += stride) {
        wait();
        issue(position.stage, 0);
        issue(position.stage, 1);
        cute::warpgroup_wait<1>();
        Fence(scores[0]);
        mask(scores[0], tile * Traits::kTileKeys);
        look(scores[0]);
        cute::warpgroup_wait<0>();
        Fence(scores[1]);
        release(position.stage);
        position.Advance();
        mask(scores[1], tile * Traits::kTileKeys + kSumKeys);
        look(scores[1]);
      }
    };

    float threshold[2], maximum[2] = {-FLT_MAX, -FLT_MAX};
    float mass[2], slope[2];
    bool maximum_known = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      threshold[i] = params.bound ? params.bound[padded_row + 8 * i].threshold : -FLT_MAX;
    }
    const auto find_maxima = [&](int first_tile, int stride) {
      for_each_step(first_tile, stride, [&](const float(&s)[32]) {
#pragma unroll
        for (int e = 0; e < 32; ++e) {
          maximum[(e >> 1) & 1] = MaxKeepNan(maximum[(e >> 1) & 1], s[e]);
        }
      });
    };
    const auto share_maxima = [&] {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float m = MaxKeepNan(maximum[i], __shfl_xor_sync(kFullWarp, maximum[i], 1));
        maximum[i] = MaxKeepNan(m, __shfl_xor_sync(kFullWarp, m, 2));
      }
    };
    // The threshold is never below the maximum - 1. NaN stays.
    const auto lift = [&] {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float lowest = coefficient * maximum[i] - 1.0f;
        if (threshold[i] < lowest) threshold[i] = lowest;
      }
    };
    const auto clear_sums = [&] {
#pragma unroll
      for (int i = 0; i < 2; ++i) mass[i] = slope[i] = 0;
    };
    const auto add = [&](const float(&s)[32]) {
#pragma unroll
      for (int e = 0; e < 32; ++e) {
        const int i = (e >> 1) & 1;
        rule.Add(__saturatef(fmaf(coefficient, s[e], -threshold[i])), &mass[i], &slope[i]);
      }
    };

    if (tiles > 0) {
      if (tiles >= 24) {
        // Estimate from a sample; a part of the tiles counts for all of them.
        const int stride = tiles >= 64 ? tiles / 16 : tiles / 8;
        const int first_tile = stride / 2;
        const float weight =
            static_cast<float>(tiles) / ((tiles - first_tile + stride - 1) / stride);
        send(unit, first_tile, stride, false);
        find_maxima(first_tile, stride);
        share_maxima();
        lift();
        for (int step = 0; step < 4; ++step) {
          send(unit, first_tile, stride, false);
          clear_sums();
          for_each_step(first_tile, stride, add);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float delta = rule.Step(weight * QuadSum(mass[i]), weight * QuadSum(slope[i]));
            if (fabsf(delta) < FLT_MAX) threshold[i] += delta;
          }
        }
      } else {
        send(unit, 0, 1, false);
        find_maxima(0, 1);
        share_maxima();
        lift();
        maximum_known = true;
      }
#pragma unroll 1
      for (int pass = 0; pass < Traits::kMaxPasses; ++pass) {
        send(unit, 0, 1, false);
        clear_sums();
        if (maximum_known) {
          for_each_step(0, 1, add);
        } else {
          for_each_step(0, 1, [&](const float(&s)[32]) {
            add(s);
#pragma unroll
            for (int e = 0; e < 32; ++e) {
              maximum[(e >> 1) & 1] = MaxKeepNan(maximum[(e >> 1) & 1], s[e]);
            }
          });
        }
        if (!maximum_known) share_maxima();
        maximum_known = true;
        bool unsettled = false;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float row_mass = QuadSum(mass[i]), row_slope = QuadSum(slope[i]);
          const float delta = rule.Step(row_mass, row_slope);
          // Excesses above 1 were cut off where the threshold was too low: the
          // sums do not count.
          const bool exact = threshold[i] >= coefficient * maximum[i] - 1.00001f;
          const bool finite = fabsf(delta) < FLT_MAX;
          // A step's error is about (mass - 1)^2 / (10 slope), in tau; more
          // where u jumps (alpha = 2).
          constexpr float kSettled = kAlpha == AlphaMode::kOneAndHalf ? 5e-6f : 1e-6f;
          const float excess = fabsf(row_mass - 1.0f);
          const bool settled =
              exact &&
              (excess <= 1e-3f || (excess <= 2e-2f && excess * excess <= kSettled * row_slope) ||
               fabsf(delta) <= 2e-7f * fmaxf(1.0f, fabsf(threshold[i])));
          // An estimate above every score leaves no mass: start again from the
          // maximum - 1.
          threshold[i] = finite ? threshold[i] + delta : -FLT_MAX;
          if (!(maximum[i] < INFINITY)) threshold[i] = NAN;
          unsettled |= visible[i] > 0 && !settled && !isnan(threshold[i]);
        }
        lift();
        if (!WarpGroupAny(Traits::kConsumerBarrier, Traits::kConsumerThreads, unsettled)) break;
      }
    }

    // Output pass.
    float output[kHeadDim / 2] = {};
    float weighted[kSave ? kHeadDim / 2 : 1] = {};
    float slope_sum[2] = {0, 0};
    if (tiles > 0) {
      send(unit, 0, 1, true);
      uint32_t p_operand[16], u_operand[kSave ? 16 : 1];
      const auto weigh = [&](float(&s)[32], int first_key) {
        mask(s, first_key);
        constexpr float kScale = ElementTraits<Element>::kWeightScale;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          const int i = j & 1;
          float p[2], u[2];
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            rule.Weights(__saturatef(fmaf(coefficient, s[2 * j + x], -threshold[i])), &p[x], &u[x]);
            if (kSave) slope_sum[i] += u[x];
          }
          p_operand[j] = ElementTraits<Element>::Pack(kScale * p[0], kScale * p[1]);
          if constexpr (kSave) u_operand[j] = ElementTraits<Element>::Pack(u[0], u[1]);
        }
      };
      const auto issue_values = [&](int stage, int half) {
        Fence(output);
        Fence(weighted);
        cute::warpgroup_arrive();
        IssueWeightedRows<Element, kHeadDim>(p_operand, shared.tile[stage], Traits::kTileKeys,
                                             half * kSumKeys, output);
        if constexpr (kSave) {
          IssueWeightedRows<Element, kHeadDim>(u_operand, shared.tile[stage], Traits::kTileKeys,
                                               half * kSumKeys, weighted);
        }
        cute::warpgroup_commit_batch();
      };
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        const int key_stage = position.stage;
        wait();
        issue(key_stage, 0);
        issue(key_stage, 1);
        position.Advance();
        const int value_stage = position.stage;
        cute::warpgroup_wait<1>();
        Fence(scores[0]);
        weigh(scores[0], tile * Traits::kTileKeys);
        wait();
        issue_values(value_stage, 0);
        cute::warpgroup_wait<1>();
        Fence(scores[1]);
        release(key_stage);
        position.Advance();
        cute::warpgroup_wait<0>();
        Fence(output);
        Fence(weighted);
        weigh(scores[1], tile * Traits::kTileKeys + kSumKeys);
        issue_values(value_stage, 1);
        cute::warpgroup_wait<0>();
        Fence(output);
        Fence(weighted);
        release(value_stage);
      }
    }

    // Rows without keys: zero output, threshold +inf. Rows with a NaN score:
    // NaN.
    float factor[2], weighted_factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (visible[i] == 0) threshold[i] = INFINITY;
      factor[i] = isnan(threshold[i]) ? NAN : 1.0f / ElementTraits<Element>::kWeightScale;
      const float total = QuadSum(slope_sum[i]);
      weighted_factor[i] = total > 0 ? 1.0f / total : 0.0f;
      if (lane % 4 == 0) {
        params.saved.threshold[padded_row + 8 * i] = threshold[i];
        if (params.all_units) params.saved.support_count[padded_row + 8 * i] = 0;
      }
    }
    Element* const outputs = params.output.Row(batch, query_head, 0);
    StoreRows<Element, kHeadDim>(output, factor[0], factor[1], outputs, params.output.strides.row,
                                 row, shape.queries, lane);
    Element* means = nullptr;
    if constexpr (kSave) {
      means = static_cast<Element*>(params.saved.weighted_value) +
              static_cast<size_t>(head) * shape.padded_queries * kHeadDim;
      StoreRows<Element, kHeadDim>(weighted, weighted_factor[0], weighted_factor[1], means,
                                   kHeadDim, row, shape.queries, lane);
    }

    // Infinities or NaN from values that the row does not keep: again without
    // them.
    int bad[2] = {0, 0};
    FindNonFinite(output, bad);
    if constexpr (kSave) FindNonFinite(weighted, bad);
#pragma unroll
    for (int i = 0; i < 2; ++i) bad[i] = bad[i] && !isnan(threshold[i]);
    if (__any_sync(kFullWarp, bad[0] || bad[1])) {
      __syncwarp();
      constexpr int kPart = kHeadDim / kLanesPerRow;
      const TileRule<kAlpha> careful(shape.alpha);
      const int part = lane / kLanesPerRow, part_lane = lane % kLanesPerRow;
      const int kv_head = query_head / shape.group;
      const RowBase keys = RowBase::Of(params.key, batch, kv_head, part_lane, kPart);
      const RowBase values = RowBase::Of(params.value, batch, kv_head, part_lane, kPart);
#pragma unroll 1
      for (int index = part; index < kStripRows; index += kRowsPerWarp) {
        const bool again = OfRow(bad, index) && warp_row + index < shape.queries;
        const int own_row = again ? warp_row + index : 0;
        CarefulOutput<Element, kHeadDim, kAlpha>(
            careful, coefficient, params.query.Row(batch, query_head, own_row), keys, values,
            OfRow(threshold, index), again, again ? shape.VisibleKeys(own_row) : 0, part_lane,
            outputs + own_row * params.output.strides.row,
            means ? means + static_cast<int64_t>(own_row) * kHeadDim : nullptr);
      }
    }
  }
}

template <class Element, int kHeadDim, AlphaMode kAlpha, bool kSave>
__global__ void __launch_bounds__((TileForwardTraits<kHeadDim, kSave>::kThreads), 1)
    TileForwardKernel(const __grid_constant__ CUtensorMap key_map,
                      const __grid_constant__ CUtensorMap value_map,
                      const __grid_constant__ TileForwardParams<Element> params) {
  using Traits = TileForwardTraits<kHeadDim, kSave>;
  if (!params.all_units && __shfl_sync(kFullWarp, params.control->flagged_count, 0) == 0) return;
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<TileForwardShared<kHeadDim, kSave>*>(shared_bytes);
  const int group = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpGroupThreads, 0);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      cute::initialize_barrier(shared.full[stage], 1);
      cute::initialize_barrier(shared.empty[stage], Traits::kConsumerThreads / kWarpSize);
    }
    cute::initialize_barrier(shared.command_ready, 1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (group == Traits::kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<24>();
    if (threadIdx.x == Traits::kConsumerThreads) {
      TileForwardProducer<kHeadDim, kSave>(key_map, value_map, params.shape, shared);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<240>();
    TileForwardConsumer<Element, kHeadDim, kAlpha, kSave>(params, shared, group);
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_TILE_FORWARD_CUH_
