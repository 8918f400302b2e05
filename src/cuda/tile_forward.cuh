// Forward for units of 128 queries whose supports are too large for lists (or for all units).
//
// A persistent CTA: a producer warp and two warp groups of 64 queries. Keys stream through shared
// memory several times; scores are recomputed on the tensor cores each time and never stored.
//   sample         256 keys spread over those of the unit. Their scores stay in registers, and
//                  Newton's method on them gives a first estimate of each threshold. Units that see
//                  no more keys than these have their thresholds already;
//   sums           mass and slope at two nodes around the estimate (threshold_search.cuh), in long
//                  rows over every 32nd and every 8th tile of keys first, then over all keys until
//                  the search is settled: once for rows of many similar scores;
//   output         p = w^(1/(alpha-1)) rounded to 16 bits, output = P.V / sum p, and with
//                  `kSave` the mean of V under u = p^(2-alpha), which the backward needs. sum p in
//                  fp32 proves the threshold: where it is not 1, search and output are repeated.
// Both products of a tile's halves are in flight while the first half's scores are looked at.
// A product spreads a NaN or infinity of V over its 64 rows; rows it reached are done again without
// tensor cores (tile_careful.cuh).
// Traffic: queries once, keys about 2.2 times and values once a unit, from L2.
#ifndef FLASH_ENTMAX_CUDA_TILE_FORWARD_CUH_
#define FLASH_ENTMAX_CUDA_TILE_FORWARD_CUH_

#include <cfloat>
#include <type_traits>

#include "launch_order.cuh"
#include "threshold_search.cuh"
#include "tile_careful.cuh"
#include "tile_forward_stream.cuh"
#include "tile_product.cuh"

namespace flash_entmax::cuda {

// Writes what a warp has found out about its rows: thresholds, outputs and, with kSave, means of
// the values under u.
template <class Element, int kHeadDim, AlphaMode kAlpha, bool kSave, int kWeighted>
__device__ __forceinline__ void StoreUnitRows(const TileForwardParams<Element>& params,
                                              const TileRule<kAlpha>& rule, int unit,
                                              const float (&maximum)[2], const float (&estimate)[2],
                                              const float (&mass)[2], const float (&slope)[2],
                                              const float (&output)[kHeadDim / 2],
                                              const float (&weighted)[kWeighted]) {
  const Shape& shape = params.shape;
  const int lane = threadIdx.x % kWarpSize;
  const UnitRows rows(shape, unit);
  const int row = rows.warp_row + lane / 4;
  float threshold[2], factor[2], weighted_factor[2];
  int bad[2] = {0, 0};
  FindNonFinite(output, bad);
  if constexpr (kSave) FindNonFinite(weighted, bad);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (maximum[r] > -INFINITY && maximum[r] < INFINITY) {
      threshold[r] = estimate[r];
      factor[r] = mass[r] > 0.0f ? 1.0f / (ElementTraits<Element>::kWeightScale * mass[r]) : 0.0f;
      weighted_factor[r] = slope[r] > 0.0f ? 1.0f / slope[r] : 0.0f;
    } else {
      // Rows without keys: zeros, threshold +inf. Rows with NaN or +inf among their scores: NaN.
      const bool empty = maximum[r] == -INFINITY;
      threshold[r] = empty ? INFINITY : NAN;
      factor[r] = weighted_factor[r] = empty ? 0.0f : NAN;
      bad[r] = bad[r] && empty;
    }
    if (lane % 4 == 0) {
      const int64_t padded_row = rows.PaddedRow(shape, row + 8 * r);
      params.saved.threshold[padded_row] = threshold[r];
      if (params.all_units) params.saved.support_count[padded_row] = 0;
    }
  }
  Element* const outputs = params.output.Row(rows.batch, rows.query_head, 0);
  StoreRows<Element, kHeadDim>(output, factor[0], factor[1], outputs, params.output.strides.row,
                               row, shape.queries, lane);
  Element* means = nullptr;
  if constexpr (kSave) {
    means =
        static_cast<Element*>(params.saved.weighted_value) + rows.PaddedRow(shape, 0) * kHeadDim;
    StoreRows<Element, kHeadDim>(weighted, weighted_factor[0], weighted_factor[1], means, kHeadDim,
                                 row, shape.queries, lane);
  }
  if (!__any_sync(kFullWarp, bad[0] || bad[1])) return;
  __syncwarp();
  constexpr int kPart = kHeadDim / kLanesPerRow;
  const int part = lane / kLanesPerRow, part_lane = lane % kLanesPerRow;
  const int kv_head = rows.query_head / shape.group;
  const RowBase keys = RowBase::Of(params.key, rows.batch, kv_head, part_lane, kPart);
  const RowBase values = RowBase::Of(params.value, rows.batch, kv_head, part_lane, kPart);
#pragma unroll 1
  for (int index = part; index < kStripRows; index += kRowsPerWarp) {
    const bool again = OfRow(bad, index) && rows.warp_row + index < shape.queries;
    const int own_row = again ? rows.warp_row + index : 0;
    const float factor =
        params.saved.row_factor ? params.saved.row_factor[rows.PaddedRow(shape, own_row)] : 1.0f;
    CarefulOutput<Element, kHeadDim, kAlpha>(
        rule, shape.coefficient * factor, params.query.Row(rows.batch, rows.query_head, own_row),
        keys, values, OfRow(threshold, index), again, again ? shape.VisibleKeys(own_row) : 0,
        part_lane, outputs + own_row * params.output.strides.row,
        means ? means + static_cast<int64_t>(own_row) * kHeadDim : nullptr);
  }
}

template <class Element, int kHeadDim, AlphaMode kAlpha, bool kSave>
__device__ __forceinline__ void TileForwardConsumer(const TileForwardParams<Element>& params,
                                                    TileForwardShared<kHeadDim, kSave>& shared) {
  using Traits = TileForwardTraits<kHeadDim, kSave>;
  constexpr int kTileKeys = Traits::kTileKeys;
  constexpr float kTolerance = std::is_same_v<Element, __half> ? 2e-4f : 5e-4f;  // of sum p = 1
  constexpr float kWeightScale = ElementTraits<Element>::kWeightScale;
  const Shape& shape = params.shape;
  const TileRule<kAlpha> rule(shape.alpha);
  const float coefficient = shape.coefficient;
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  RingPosition<Traits::kStages> position;
  float scores[UnitPasses::kSamples][32];
  uint32_t query[Traits::kSharedQuery ? 1 : kHeadDim / 4];

  const auto wait = [&] { cute::wait_barrier(shared.full[position.stage], position.parity); };
  const auto release = [&](int stage) {
    if (lane == 0) cute::arrive_barrier(shared.empty[stage]);
  };
  // A broadcast where it is needed keeps no register over the loops.
  const auto warp_group = [&] { return __shfl_sync(kFullWarp, thread / kWarpGroupThreads, 0); };
  const auto issue = [&](int stage, int half, float(&sums)[32]) {
    Fence(sums);
    cute::warpgroup_arrive();
    if constexpr (Traits::kSharedQuery) {
      IssueSharedScores<Element, kHeadDim>(shared.query, Shape::kUnitRows, warp_group() * 64,
                                           shared.tile[stage], kTileKeys, half * kSumKeys, sums);
    } else {
      IssueScores<Element, kHeadDim>(query, shared.tile[stage], kTileKeys, half * kSumKeys, sums);
    }
    cute::warpgroup_commit_batch();
  };
  const auto send = [&](TileCommand command) {
    if (thread == 0) {
      shared.command = command;
      cute::arrive_barrier(shared.command_ready);
    }
  };

  for (int parity = 0;; parity ^= 1) {
    cute::wait_barrier(shared.unit_ready, parity);
    const int unit = __shfl_sync(kFullWarp, shared.unit, 0);
    if (unit < 0) break;
    // Before the producer may be told to go on, everybody must know the unit.
    cutlass::arch::NamedBarrier::sync(Traits::kConsumerThreads, Traits::kConsumerBarrier);
    const UnitPasses passes(shape, unit);
    const UnitRows rows(shape, unit);
    const int row = rows.warp_row + lane / 4;
    const int visible[2] = {shape.VisibleKeys(row), shape.VisibleKeys(row + 8)};
    const int warp_keys =
        rows.warp_row + kStripRows > shape.queries ? 0 : shape.VisibleKeys(rows.warp_row);
    const Element* const queries = params.query.Row(rows.batch, rows.query_head, 0);
    if constexpr (Traits::kSharedQuery) {
      LoadSharedOperand<Element, kHeadDim>(queries, params.query.strides.row,
                                           rows.warp_row / 64 * 64, shape.queries, shared.query,
                                           Shape::kUnitRows, warp_group() * 64);
      cutlass::arch::NamedBarrier::sync(kWarpGroupThreads, Traits::kGroupBarrier + warp_group());
    } else {
      LoadOperand<Element, kHeadDim>(queries, params.query.strides.row, row, shape.queries, lane,
                                     query);
    }

    if (params.saved.row_factor) {
      shared.factors.Load(params.saved.row_factor + rows.PaddedRow(shape, 0), rows.warp_row);
    }

    float maximum[2] = {-INFINITY, -INFINITY};  // of the scores seen
    ThresholdSearch<kAlpha> search[2];
    float mass[2] = {0, 0}, slope[2] = {0, 0};  // at the thresholds of the output
    float output[kHeadDim / 2] = {};
    float weighted[kSave ? kHeadDim / 2 : 1] = {};

    // Scores as they are needed: times the row's factor, -inf where the row must not look.
    const auto finish = [&](float(&s)[32], int first_key) {
      if (params.saved.row_factor) shared.factors.Scale(s);
      if (first_key + kSumKeys > warp_keys) {
#pragma unroll
        for (int e = 0; e < 32; ++e) {
          const int key = first_key + 8 * (e / 4) + 2 * (lane % 4) + (e & 1);
          if (key >= visible[(e >> 1) & 1]) s[e] = -INFINITY;
        }
      }
    };
    const auto find_maxima = [&](const float(&s)[32]) {
#pragma unroll
      for (int e = 0; e < 32; ++e) {
        maximum[(e >> 1) & 1] = MaxKeepNan(maximum[(e >> 1) & 1], s[e]);
      }
    };
    const auto share_maxima = [&] {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float m = MaxKeepNan(maximum[i], __shfl_xor_sync(kFullWarp, maximum[i], 1));
        maximum[i] = MaxKeepNan(m, __shfl_xor_sync(kFullWarp, m, 2));
      }
    };
    // Rows with a distribution: some key, and neither NaN nor infinity among the scores.
    const auto defined = [&](int i) { return maximum[i] > -INFINITY && maximum[i] < INFINITY; };

    if (passes.tiles > 0) {
      // Sample.
      int stages[UnitPasses::kSamples];
#pragma unroll
      for (int i = 0; i < UnitPasses::kSamples; ++i) {
        stages[i] = position.stage;
        wait();
        issue(position.stage, passes.SampleHalf(i) & 1, scores[i]);
        position.Advance();
      }
      cute::warpgroup_wait<0>();
      int sampled[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < UnitPasses::kSamples; ++i) {
        Fence(scores[i]);
        release(stages[i]);
        const int first_key = passes.SampleHalf(i) * kSumKeys;
        finish(scores[i], first_key);
        find_maxima(scores[i]);
#pragma unroll
        for (int r = 0; r < 2; ++r) sampled[r] += min(max(visible[r] - first_key, 0), kSumKeys);
      }
      share_maxima();

      // Newton from the left; the sample stands for all keys of its row.
      float estimate[2], bound[2], share[2], spread[2] = {0, 0};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        bound[r] =
            params.bound ? params.bound[rows.PaddedRow(shape, row + 8 * r)].threshold : -FLT_MAX;
        estimate[r] = fmaxf(bound[r], coefficient * maximum[r] - 1.0f);
        share[r] = __fdividef(static_cast<float>(sampled[r]), static_cast<float>(visible[r]));
      }
#pragma unroll 1
      for (int step = 0; step < 24; ++step) {
        ThresholdSums sums[2] = {};
        float squares[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < UnitPasses::kSamples; ++i) {
#pragma unroll
          for (int e = 0; e < 32; ++e) {
            const int r = (e >> 1) & 1;
            float p, u;
            rule.Weights(__saturatef(fmaf(coefficient, scores[i][e], -estimate[r])), &p, &u);
            sums[r].mass += p;
            sums[r].slope += u;
            squares[r] = fmaf(p, p, squares[r]);
          }
          Fence(scores[i]);
        }
        bool moves = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float sample_mass = QuadSum(sums[r].mass);
          const float row_mass = __fdividef(sample_mass, share[r]);
          slope[r] = __fdividef(QuadSum(sums[r].slope), share[r]);
          // Standard error of the estimate if the sample were all of the row.
          spread[r] = rule.order * __fdividef(sqrtf(QuadSum(squares[r])), sample_mass) *
                      __fdividef(row_mass, slope[r]);
          const float delta = rule.Step(row_mass, slope[r]);
          const float enough = passes.SampleIsAll()
                                   ? ThresholdSearch<kAlpha>::Resolution(estimate[r])
                                   : 0.1f * rule.order * __fdividef(row_mass, slope[r]);
          if (defined(r) && fabsf(delta) < FLT_MAX) {
            estimate[r] += delta;
            moves |= fabsf(delta) > enough;
          }
        }
        if (!__any_sync(kFullWarp, moves)) break;
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // The error of a part f of a row goes with sqrt((1 - f) / f), f = share.
        if (!(spread[r] < 0.25f)) spread[r] = 0.25f;
        const float rest = sqrtf(fmaxf(1.0f - share[r], 0.0f));
        search[r].Start(bound[r], fmaxf(estimate[r], bound[r]), 2.0f * spread[r] * rest);
        search[r].slope = slope[r];
        spread[r] *= sqrtf(share[r]);
      }

      // Sums at two nodes, over some tiles and then over all, then the output.
      int stride = passes.FirstStride();
      bool searching = !passes.SampleIsAll();
      int pass = 0;
#pragma unroll 1
      for (int attempt = 0; attempt < Traits::kMaxOutputs; ++attempt) {
#pragma unroll 1
        while (searching) {
          // The producer streams the first pass unasked.
          if (pass + attempt > 0) send(TileCommand::kSums);
          float low[2], high[2];
          ThresholdSums at_low[2] = {}, at_high[2] = {};
#pragma unroll
          for (int r = 0; r < 2; ++r) search[r].Nodes(coefficient * maximum[r], &low[r], &high[r]);
          const auto add = [&](const float(&s)[32]) {
#pragma unroll
            for (int e = 0; e < 32; ++e) {
              const int r = (e >> 1) & 1;
              rule.Add(__saturatef(fmaf(coefficient, s[e], -low[r])), &at_low[r].mass,
                       &at_low[r].slope);
              rule.Add(__saturatef(fmaf(coefficient, s[e], -high[r])), &at_high[r].mass,
                       &at_high[r].slope);
            }
            find_maxima(s);
          };
          const int first_tile = UnitPasses::FirstTile(stride), end_tile = passes.EndTile(stride);
          const int tile_step = UnitPasses::Step(stride);
#pragma unroll 1
          for (int tile = first_tile; tile < end_tile; tile += tile_step) {
            wait();
            issue(position.stage, 0, scores[0]);
            issue(position.stage, 1, scores[1]);
            cute::warpgroup_wait<1>();
            Fence(scores[0]);
            finish(scores[0], tile * kTileKeys);
            add(scores[0]);
            cute::warpgroup_wait<0>();
            Fence(scores[1]);
            release(position.stage);
            position.Advance();
            finish(scores[1], tile * kTileKeys + kSumKeys);
            add(scores[1]);
          }
          share_maxima();
          float weight[2] = {1.0f, 1.0f};
          if (stride > 0) {
            const int summed = (end_tile - first_tile + tile_step - 1) / tile_step * kTileKeys;
#pragma unroll
            for (int r = 0; r < 2; ++r) weight[r] = static_cast<float>(visible[r]) / summed;
          }
          bool unsettled = false;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const ThresholdSums sum_low = {weight[r] * QuadSum(at_low[r].mass),
                                           weight[r] * QuadSum(at_low[r].slope)};
            const ThresholdSums sum_high = {weight[r] * QuadSum(at_high[r].mass),
                                            weight[r] * QuadSum(at_high[r].slope)};
            // Bounds from a part of the keys do not hold for all.
            const float left = search[r].left;
            if (stride > 0) search[r].left = -FLT_MAX;
            const bool cubic = search[r].Refine(rule, low[r], high[r], sum_low, sum_high,
                                                coefficient * maximum[r]);
            if (stride > 0) {
              search[r].left = left;
              search[r].right = FLT_MAX;
              search[r].estimate = fmaxf(search[r].estimate, left);
              search[r].spread =
                  cubic ? fmaf(2.5f * spread[r], sqrtf(weight[r] - 1.0f), search[r].spread)
                        : fmaxf(search[r].spread, 2.5f * spread[r] * sqrtf(weight[r]));
            } else {
              unsettled |= defined(r) && !search[r].Settled(kTolerance);
            }
          }
          if (stride > 0) {
            stride = UnitPasses::NextStride(stride);
          } else {
            ++pass;
            searching = WarpGroupAny(Traits::kConsumerBarrier, Traits::kConsumerThreads,
                                     unsettled && pass < Traits::kMaxPasses);
          }
        }

        // Output pass.
        send(TileCommand::kOutput);
        constexpr int kSecondScores = Traits::kTwoScores ? 1 : 0;
        constexpr int kSecondOperands = Traits::kTwoOperands ? 1 : 0;
        uint32_t p_operand[kSecondOperands + 1][16], u_operand[kSave ? 16 : 1];
        const auto weigh = [&](float(&s)[32], int first_key, uint32_t(&operand)[16]) {
          finish(s, first_key);
#pragma unroll
          for (int j = 0; j < 16; ++j) {
            const int r = j & 1;
            float p[2], u[2];
#pragma unroll
            for (int x = 0; x < 2; ++x) {
              rule.Weights(__saturatef(fmaf(coefficient, s[2 * j + x], -search[r].estimate)), &p[x],
                           &u[x]);
              mass[r] += p[x];
              if (kSave) slope[r] += u[x];
            }
            operand[j] = ElementTraits<Element>::Pack(kWeightScale * p[0], kWeightScale * p[1]);
            if constexpr (kSave) u_operand[j] = ElementTraits<Element>::Pack(u[0], u[1]);
          }
        };
        const auto issue_values = [&](int stage, int half, const uint32_t(&operand)[16]) {
          Fence(output);
          Fence(weighted);
          cute::warpgroup_arrive();
          IssueWeightedRows<Element, kHeadDim>(operand, shared.tile[stage], kTileKeys,
                                               half * kSumKeys, output);
          if constexpr (kSave) {
            IssueWeightedRows<Element, kHeadDim>(u_operand, shared.tile[stage], kTileKeys,
                                                 half * kSumKeys, weighted);
          }
          cute::warpgroup_commit_batch();
        };
#pragma unroll
        for (int e = 0; e < kHeadDim / 2; ++e) output[e] = 0.0f;
        if constexpr (kSave) {
#pragma unroll
          for (int e = 0; e < kHeadDim / 2; ++e) weighted[e] = 0.0f;
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          mass[r] = 0.0f;
          if (kSave) slope[r] = 0.0f;
        }
#pragma unroll 1
        for (int tile = 0; tile < passes.tiles; ++tile) {
          const int key_stage = position.stage;
          wait();
          issue(key_stage, 0, scores[0]);
          if constexpr (Traits::kTwoScores) issue(key_stage, 1, scores[1]);
          position.Advance();
          const int value_stage = position.stage;
          cute::warpgroup_wait<kSecondScores>();
          Fence(scores[0]);
          weigh(scores[0], tile * kTileKeys, p_operand[0]);
          wait();
          position.Advance();
          issue_values(value_stage, 0, p_operand[0]);
          if constexpr (!Traits::kTwoScores) issue(key_stage, 1, scores[0]);
          // With two sets of operands only the scores are waited for.
          cute::warpgroup_wait<kSecondOperands>();
          Fence(scores[kSecondScores]);
          if constexpr (!Traits::kTwoOperands) {
            Fence(output);
            Fence(weighted);
          }
          release(key_stage);
          weigh(scores[kSecondScores], tile * kTileKeys + kSumKeys, p_operand[kSecondOperands]);
          issue_values(value_stage, 1, p_operand[kSecondOperands]);
          cute::warpgroup_wait<0>();
          Fence(output);
          Fence(weighted);
          release(value_stage);
        }
        bool wrong = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          mass[r] = QuadSum(mass[r]);
          if (kSave) slope[r] = QuadSum(slope[r]);
          const float threshold = search[r].estimate;
          const float delta = rule.Step(mass[r], kSave ? slope[r] : search[r].slope);
          const bool settled = fabsf(mass[r] - 1.0f) <= kTolerance ||
                               fabsf(delta) <= ThresholdSearch<kAlpha>::Resolution(threshold);
          const float better = fabsf(delta) < FLT_MAX ? threshold + delta : threshold;
          wrong |= defined(r) && !settled;
          // Should the search go on, it starts again around the better estimate.
          search[r].Start(coefficient * maximum[r] - 1.0f, better,
                          settled ? 0.0f : fminf(fabsf(delta), 0.25f));
        }
        searching = WarpGroupAny(Traits::kConsumerBarrier, Traits::kConsumerThreads,
                                 wrong && attempt + 1 < Traits::kMaxOutputs);
        if (!searching) break;
      }
    }
    send(TileCommand::kNextUnit);

    // The broadcast makes the compiler compute where the rows lie again instead of keeping it in
    // registers over all passes.
    const float estimate[2] = {search[0].estimate, search[1].estimate};
    StoreUnitRows<Element, kHeadDim, kAlpha, kSave>(params, rule, __shfl_sync(kFullWarp, unit, 0),
                                                    maximum, estimate, mass, slope, output,
                                                    weighted);
  }
}

template <class Element, int kHeadDim, AlphaMode kAlpha, bool kSave>
__global__ void __launch_bounds__((TileForwardTraits<kHeadDim, kSave>::kThreads), 1)
    TileForwardKernel(const __grid_constant__ CUtensorMap key_map,
                      const __grid_constant__ CUtensorMap value_map,
                      const __grid_constant__ TileForwardParams<Element> params) {
  WaitForEarlierKernels();
  using Traits = TileForwardTraits<kHeadDim, kSave>;
  const int flagged_count =
      params.all_units ? 1 : __shfl_sync(kFullWarp, params.control->flagged_count, 0);
  if (flagged_count == 0) return;
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<TileForwardShared<kHeadDim, kSave>*>(shared_bytes);
  const int group = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpGroupThreads, 0);
  if (threadIdx.x == 0) {
    shared.queue = &params.control->next_flagged;
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      cute::initialize_barrier(shared.full[stage], 1);
      cute::initialize_barrier(shared.empty[stage], Traits::kConsumerThreads / kWarpSize);
    }
    cute::initialize_barrier(shared.unit_ready, 1);
    cute::initialize_barrier(shared.command_ready, 1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  // Registers: 2 x 128 x 232 + 128 x 40 are those of 384 threads at the launch, 168 each.
  if (group == Traits::kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (threadIdx.x == Traits::kConsumerThreads) {
      TileForwardProducer<Element, kHeadDim, kSave>(key_map, value_map, params, flagged_count,
                                                    shared);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    TileForwardConsumer<Element, kHeadDim, kAlpha, kSave>(params, shared);
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_TILE_FORWARD_CUH_
