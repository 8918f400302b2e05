// From candidate lists to outputs: fp32 scores, exact threshold, P.V, support.
//
// A warp finishes four rows, eight lanes a row; a CTA of four warps finishes a strip of 16 rows,
// whose rows r and r + 8 share the lists of four screening threads.
//   1. candidates whose group maximum is above the final bound are unpacked to keys;
//   2. whenever kPending of them wait, and at the end, their scores are computed in fp32 from the
//      inputs, and those above the bound are kept (so the support is that of fp32 scores);
//   3. Newton from the left to the threshold, survivors kept in order;
//   4. output = sum p V over the survivors;
//   5. if asked, the support goes to the pool, with each entry's place among those of its key
//      (for the backward's transposition).
// Lists are read from their ends, where the bounds were tightest, and the bound is raised to the
// threshold of the keys seen so far whenever some have been scored: most of what the weaker bounds
// of the beginning let through is dropped unscored. A row whose support is larger than kMaxSupport,
// or one the pool has no room for, sends its unit to the tile path. Traffic: 16 bytes an entry, one
// key row a candidate, one value row a support entry (both mostly from L2), 12 bytes written a
// support entry.
#ifndef FLASH_ENTMAX_CUDA_FINISH_FORWARD_CUH_
#define FLASH_ENTMAX_CUDA_FINISH_FORWARD_CUH_

#include <cfloat>

#include "candidate_list.cuh"
#include "gather.cuh"

namespace flash_entmax::cuda {

template <class Element>
struct FinishParams {
  Shape shape;
  Tensor<const Element> query, key, value;
  Tensor<Element> output;
  const CandidateEntry* lists;
  const int* list_count;
  const RowBound* bound;
  SavedState saved;
  Control* control;
  int first_head;
  bool save_support;
};

constexpr int kFinishThreads = 128;
constexpr int kPending = 64;     // candidates of a row that wait for their scores
constexpr int kFlushAbove = 32;  // scored when more than this many wait; a pass adds at most 32
constexpr int kKept = kMaxSupport + kPending;

template <class Element, int kHeadDim, AlphaMode kAlpha>
__global__ void __launch_bounds__(kFinishThreads)
    FinishForwardKernel(const __grid_constant__ FinishParams<Element> params) {
  constexpr int kWarps = kFinishThreads / kWarpSize;
  constexpr int kPart = kHeadDim / kLanesPerRow;
  __shared__ int shared_pending[kWarps][kRowsPerWarp][kPending + kListPadding];
  __shared__ int shared_key[kWarps][kRowsPerWarp][kKept + kListPadding];
  __shared__ float shared_value[kWarps][kRowsPerWarp][kKept + kListPadding];

  const Shape& shape = params.shape;
  const AlphaRule<kAlpha> rule(shape.alpha);
  const int warp = threadIdx.x / kWarpSize, warp_lane = threadIdx.x % kWarpSize;
  const int part = warp_lane / kLanesPerRow, lane = warp_lane % kLanesPerRow;
  const int strips = shape.padded_queries / kStripRows;
  const int head = params.first_head + blockIdx.x / strips;
  const int first_row = blockIdx.x % strips * kStripRows;
  if (first_row >= shape.queries) return;
  const int half = warp & 1;  // row or row + 8 of a screening thread
  const int pair = warp / 2 * kRowsPerWarp + part;
  const int row = first_row + pair + 8 * half;
  const size_t padded_row = static_cast<size_t>(head) * shape.padded_queries + row;
  const int unit = head * shape.Units() + row / Shape::kUnitRows;
  if (params.saved.unit_flag[unit] == kFlaggedByScreening) {
    if (lane == 0) params.saved.support_count[padded_row] = 0;
    return;
  }
  int* const key = shared_key[warp][part];
  float* const value = shared_value[warp][part];
  const unsigned lower_lanes = (1u << lane) - 1;
  const auto row_ballot = [&](bool predicate) {
    return __ballot_sync(kFullWarp, predicate) >> (part * kLanesPerRow) & 0xff;
  };

  const int batch = head / shape.heads, query_head = head % shape.heads;
  const int kv_head = query_head / shape.group;
  const bool valid = row < shape.queries;
  const RowBound bound = params.bound[padded_row];
  float query[kPart];
  LoadVector<Element, kPart>(params.query.Row(batch, query_head, valid ? row : 0) + lane * kPart,
                             query);
  const RowBase keys = RowBase::Of(params.key, batch, kv_head, lane, kPart);

  int* const pending = shared_pending[warp][part];
  int pending_count = 0, count = 0;
  float maximum = -FLT_MAX, threshold = bound.threshold;
  // Loads past the end of an empty list read row 0.
  if (lane == 0) pending[0] = key[0] = 0;
  __syncwarp();

  // 3. Newton from the left on the keys kept so far.
  const auto solve = [&](int steps) {
    threshold = fmaxf(threshold, RowMax(maximum) - 1.0f);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      float mass = 0, slope = 0;
#pragma unroll 2
      for (int i = lane; i < count; i += kLanesPerRow) {
        rule.Add(__saturatef(value[i] - threshold), &mass, &slope);
      }
      const float delta = rule.Step(RowSum(mass), RowSum(slope));
      const bool moves = delta > 1.2e-7f * fmaxf(1.0f, fabsf(threshold));
      if (moves) threshold += delta;
      if (!__any_sync(kFullWarp, moves)) break;
    }
  };
  // Drops the keys at or below the threshold, in place and in order; values become value - offset.
  const auto compact = [&](float offset) {
    const int longest = __reduce_max_sync(kFullWarp, count);
    int kept_count = 0;
#pragma unroll 1
    for (int first = 0; first < longest; first += kLanesPerRow) {
      const int i = first + lane;
      const int candidate = i < count ? key[i] : 0;
      const float z = i < count ? value[i] : -FLT_MAX;
      const bool keep = z > threshold;
      const unsigned kept = row_ballot(keep);
      __syncwarp();
      if (keep) {
        const int place = kept_count + __popc(kept & lower_lanes);
        key[place] = candidate;
        value[place] = z - offset;
      }
      kept_count += __popc(kept);
    }
    count = kept_count;
    __syncwarp();
  };
  // 1. and 2. One place in the code scores, solves and compacts: the instruction cache is small.
  // The last turn unpacks nothing.
  const int quarter = lane % 4;
  const size_t strip = blockIdx.x;
  const int list_lane = pair * 4 + quarter;
  const int entries = params.list_count[strip * kWarpSize + list_lane];
  const CandidateEntry* const list = params.lists + strip * kStripListEntries + list_lane;
  const int rounds = (__reduce_max_sync(kFullWarp, entries) + 1) / 2;
  const auto load_entry = [&](int round) {
    const int index = entries - 1 - (round * 2 + lane / 4);
    return index >= 0 ? __ldg(reinterpret_cast<const uint4*>(list + index * kWarpSize))
                      : make_uint4(0, 0, 0, 0);
  };
  uint4 next = load_entry(0);
#pragma unroll 1
  for (int round = 0; round <= rounds; ++round) {
    const uint4 entry = next;
    next = load_entry(round + 1);
    const bool last = round == rounds;
    const float2 largest = __half22float2(AsHalf2(entry.z));
    const float score = half ? largest.y : largest.x;
    const bool live = score > bound.screen && fmaf(score, bound.to_z, bound.slack) > threshold;
    uint32_t bits = live && !last ? (half ? entry.y : entry.x) : 0;
    const int first_key = static_cast<int>(entry.w) * kStepKeys + 2 * quarter;
    // Each lane unpacks up to four keys a pass.
    while (last || __any_sync(kFullWarp, bits != 0)) {
      const int own = min(__popc(bits), 4);
      int inclusive = own;
#pragma unroll
      for (int offset = 1; offset < kLanesPerRow; offset *= 2) {
        const int other = __shfl_up_sync(kFullWarp, inclusive, offset, kLanesPerRow);
        if (lane >= offset) inclusive += other;
      }
      int* place = pending + pending_count + inclusive - own;
#pragma unroll 1
      for (int j = 0; j < own; ++j) {
        const int bit = __ffs(bits) - 1;
        bits &= bits - 1;
        *place++ = first_key + 8 * (bit & 15) + (bit >> 4);
      }
      pending_count += __shfl_sync(kFullWarp, inclusive, kLanesPerRow - 1, kLanesPerRow);
      if (!last && !__any_sync(kFullWarp, pending_count > kFlushAbove)) continue;

      __syncwarp();
      const int longest = __reduce_max_sync(kFullWarp, pending_count);
#pragma unroll 1
      for (int first = 0; first < longest; first += kLanesPerRow) {
        const float z = shape.coefficient * GatherDots<Element, kHeadDim>(
                                                keys, pending, first, pending_count, query, lane);
        const bool keep = first + lane < pending_count && z > threshold;
        const unsigned kept = row_ballot(keep);
        if (keep) {
          const int at = count + __popc(kept & lower_lanes);
          key[at] = pending[first + lane];
          value[at] = z;
          maximum = fmaxf(maximum, z);
        }
        count += __popc(kept);
      }
      pending_count = 0;
      __syncwarp();
      solve(last ? 32 : 2);
      if (last || __any_sync(kFullWarp, count > kMaxSupport)) {
        compact(last ? threshold : 0.0f);
        if (__any_sync(kFullWarp, count > kMaxSupport)) {
          // The whole unit goes to the tile path.
          if (warp_lane == 0) FlagUnit(params.saved, params.control, unit, kFlaggedByFinish);
          if (lane == 0) params.saved.support_count[padded_row] = 0;
          return;
        }
      }
      if (last) break;
    }
  }
  const int support = count;

  // 5. Support (before p replaces the excess).
  const bool empty = shape.VisibleKeys(row) == 0;
  if (params.save_support) {
    int before = 0, total = 0;
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) {
      const int other = __shfl_sync(kFullWarp, support, i * kLanesPerRow);
      if (i < part) before += other;
      total += other;
    }
    unsigned long long offset = 0;
    if (warp_lane == 0 && total > 0) {
      offset = atomicAdd(&params.control->support_used, static_cast<unsigned long long>(total));
    }
    offset = __shfl_sync(kFullWarp, offset, 0) + before;
    const bool fits = offset + support <= params.saved.support_capacity;
    if (fits) {
      int* const column_count = params.saved.column_count +
                                static_cast<size_t>(batch * shape.kv_heads + kv_head) * shape.keys;
      for (int i = lane; i < support; i += kLanesPerRow) {
        params.saved.support_key[offset + i] = key[i];
        params.saved.support_excess[offset + i] = value[i];
        params.saved.support_slot[offset + i] = atomicAdd(&column_count[key[i]], 1);
      }
    } else if (lane == 0) {
      FlagUnit(params.saved, params.control, unit, kFlaggedByFinish);
    }
    if (lane == 0) {
      params.saved.support_offset[padded_row] = static_cast<int64_t>(offset);
      params.saved.support_count[padded_row] = fits ? support : 0;
    }
  } else if (lane == 0) {
    params.saved.support_count[padded_row] = support;
  }
  if (lane == 0) params.saved.threshold[padded_row] = valid && !empty ? threshold : INFINITY;

  // 4. Output.
  __syncwarp();
  for (int i = lane; i < support; i += kLanesPerRow) {
    float p, u;
    rule.Weights(value[i], &p, &u);
    value[i] = p;
  }
  __syncwarp();
  float sum[kPart] = {};
  GatherAccumulate<Element, kHeadDim>(RowBase::Of(params.value, batch, kv_head, lane, kPart), key,
                                      value, support, sum);
  if (valid) {
    StoreVector<Element, kPart>(sum, 1.0f,
                                params.output.Row(batch, query_head, row) + lane * kPart);
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_FINISH_FORWARD_CUH_
