// From candidate lists to outputs: fp32 scores, exact threshold, P.V, support.
//
// A warp finishes eight rows, four lanes a row: the rows of one half of a strip, whose 32 lists it
// reads one a lane.
//   1. the keys of entries whose maximum is above the final bound of screening are counted, then
//      unpacked to the row's slots in shared memory: lane q of a row has slots q, q + 4, ...;
//   2. the keys are scored in fp32 from the inputs (candidate_scores.cuh), so that the support is
//      that of fp32 scores;
//   3. Newton from the left to the threshold, from the bound that screening proved;
//   4. survivors are moved together, in order;
//   5. if asked, the support goes to the pool (support_pool.cuh), with each entry's place among
//      those of its key (for the backward's transposition);
//   6. output = sum p V over the survivors.
// If a row has more keys than slots, the warp starts again with four rows at a time and twice the
// slots, then two and one. A row too large even for that or one whose support is larger than
// kMaxSupport sends its unit to the tile path, as do units that the pool has no room for.
// Traffic: 8 bytes an entry, one key row a candidate, one value row a support entry (both mostly
// from L2), 12 bytes written a support entry.
#ifndef FLASH_ENTMAX_CUDA_FINISH_FORWARD_CUH_
#define FLASH_ENTMAX_CUDA_FINISH_FORWARD_CUH_

#include <cutlass/fast_math.h>

#include <cfloat>

#include "candidate_list.cuh"
#include "candidate_scores.cuh"
#include "launch_order.cuh"
#include "support_pool.cuh"

namespace flash_entmax::cuda {

template <class Element>
struct FinishParams {
  Shape shape;
  Tensor<const Element> query, key, value;
  Tensor<Element> output;
  uint32_t query_row_bytes, key_row_bytes, value_row_bytes;
  cutlass::FastDivmod heads, group, head_groups;  // shape's, and groups of eight rows of a head
  const CandidateEntry* lists;
  const int* list_count;
  const RowBound* bound;
  SavedState saved;
  Control* control;
  int first_head;
  bool save_support;
};

// Small blocks: one slow warp keeps no others' place.
constexpr int kFinishThreads = 64;
constexpr int kFinishWarps = kFinishThreads / kWarpSize;
constexpr int kFinishBlockRows = kFinishWarps * kQueriesPerWarp;

// The slots of the rows that a warp has in work: slot 4 p + q of a row is the p-th of its lane q.
// The padding puts the slots of eight rows into different banks.
struct alignas(16) FinishSlots {
  static constexpr int kDepth = 24;  // slots of a lane with eight rows in work; even
  static constexpr int kPadding = 4;
  static constexpr int kSlots = kQueriesPerWarp * (kDepth * kLanesPerQuery + kPadding);

  int key[kSlots];
  float value[kSlots];  // z, then z - tau, then p

  // With fewer rows in work, a lane has more.
  static __device__ __forceinline__ int Depth(int rows) {
    return kDepth * kQueriesPerWarp >> (31 - __clz(rows));
  }
  static __device__ __forceinline__ int RowSlots(int rows) {
    return Depth(rows) * kLanesPerQuery + kPadding;
  }
};

struct FinishShared {
  FinishSlots slots[kFinishWarps];
};

// Where a head lies in the tensors.
struct HeadPlace {
  int batch, head, key_head;

  template <class Element>
  __device__ __forceinline__ HeadPlace(const FinishParams<Element>& params, int index) {
    int rest;
    params.heads(batch, head, index);
    params.group(key_head, rest, head);
  }
};

// The bits of an entry if its largest score is above the bound, otherwise none.
__device__ __forceinline__ uint32_t KeysAbove(const uint2& entry, __half screen) {
  return __hgt(EntryMaximum(entry.y), screen) ? entry.x : 0;
}

// Number of keys in those entries of a lane's list that are above the bound.
__device__ __forceinline__ int CountKeys(const CandidateEntry* list, int entries, __half screen) {
  constexpr int kBatch = 4;
  const uint2* source = reinterpret_cast<const uint2*>(list);
  int count = 0;
#pragma unroll 1
  for (int left = entries; left > 0; left -= kBatch) {
    uint2 entry[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      entry[i] = make_uint2(0, 0);
      if (i < left) entry[i] = __ldg(source + i * kWarpSize);
    }
    source += kBatch * kWarpSize;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) count += __popc(KeysAbove(entry[i], screen));
  }
  return count;
}

// Unpacks the keys that CountKeys counted to the slots from `place` on.
__device__ __forceinline__ void UnpackList(const CandidateEntry* list, int entries, __half screen,
                                           int quarter, SharedAddress place) {
  constexpr int kBatch = 4;
  const uint2* source = reinterpret_cast<const uint2*>(list);
  uint2 next[kBatch];
  int left = entries;
  const auto load = [&] {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      next[i] = make_uint2(0, 0);
      if (left > i) next[i] = __ldg(source + i * kWarpSize);
    }
    left -= kBatch;
    source += kBatch * kWarpSize;
  };
  const int longest = __reduce_max_sync(kFullWarp, entries);
  load();
#pragma unroll 1
  for (int first = 0; first < longest; first += kBatch) {
    uint2 entry[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) entry[i] = next[i];
    load();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      uint32_t bits = KeysAbove(entry[i], screen);
      const int first_key = static_cast<int>(entry[i].y >> 16) * kStepKeys + 2 * quarter;
      while (bits != 0) {
        const int bit = 31 - __clz(bits);
        bits ^= 1u << bit;
        // first_key + 8 * (bit & 15) + (bit >> 4)
        const int odd = bit >> 4;
        place.Set(first_key + 8 * bit - 127 * odd);
        place = place + 1;
      }
    }
  }
}

// The warp's rows.
template <class Element, int kHeadDim, AlphaMode kAlpha>
__device__ __forceinline__ void FinishRows(const FinishParams<Element>& params,
                                           FinishShared& shared) {
  constexpr int kPieces = PieceRows<kHeadDim>::kPieces;
  constexpr int kAtOnce = kHeadDim <= 64 ? 4 : 2;  // rows a lane loads at a time
  const Shape& shape = params.shape;
  const AlphaRule<kAlpha> rule(shape.alpha);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int index = lane / kLanesPerQuery, quarter = lane % kLanesPerQuery;  // row, lane of the row
  const int group = static_cast<int>(blockIdx.x) * kFinishWarps + warp;
  int head, row;
  params.head_groups(head, row, group);
  head += params.first_head;
  row = row * kQueriesPerWarp + index;
  if (row - index >= shape.queries) return;
  const bool valid = row < shape.queries;
  if (params.saved.unit_flag[head * shape.Units() + row / Shape::kUnitRows] ==
      kFlaggedByScreening) {
    if (quarter == 0) {
      params.saved.support_count[static_cast<int64_t>(head) * shape.padded_queries + row] = 0;
    }
    return;
  }
  const unsigned lower_lanes = (1u << quarter) - 1;

  const SharedAddress warp_slots(shared.slots[warp].key);
  int rows = kQueriesPerWarp;  // in work at a time
#pragma unroll 1
  for (int first = 0; first < kQueriesPerWarp;) {
    const bool active = index >= first && index < first + rows;
    const int depth = FinishSlots::Depth(rows);
    const SharedAddress keys = warp_slots + (index & (rows - 1)) * FinishSlots::RowSlots(rows);
    const SharedAddress scores = keys + FinishSlots::kSlots;
    // What depends on the head is computed again wherever it is needed: it is not worth registers.
    const auto hidden_head = [&] {
      int same = head;
      asm volatile("" : "+r"(same));
      return same;
    };
    const int padded_head = hidden_head();
    const int64_t padded_row = static_cast<int64_t>(padded_head) * shape.padded_queries + row;
    const auto flag_unit = [&] {
      FlagUnit(params.saved, params.control, padded_head * shape.Units() + row / Shape::kUnitRows,
               kFlaggedByFinish);
    };
    // The whole unit goes to the tile path.
    const auto give_up = [&] {
      if (lane == 0) flag_unit();
      if (quarter == 0 && index >= first) params.saved.support_count[padded_row] = 0;
    };

    const RowBound bound = params.bound[padded_row];
    const __half screen = __float2half_rd(bound.screen);  // exact: it was a half

    // 1. Keys: those of a row's four lanes one after the other, so that however they came, each of
    // the lanes has every fourth of them from here on.
    __syncwarp();
    int found, longest;
    {
      const CandidateEntry* const list =
          params.lists + static_cast<int64_t>(group) * kHalfListEntries + lane;
      const int entries = active ? params.list_count[group * kWarpSize + lane] : 0;
      const int own = CountKeys(list, entries, screen);
      int inclusive = own;
#pragma unroll
      for (int offset = 1; offset < kLanesPerQuery; offset *= 2) {
        const int other = __shfl_up_sync(kFullWarp, inclusive, offset, kLanesPerQuery);
        if (quarter >= offset) inclusive += other;
      }
      const int of_row = __shfl_sync(kFullWarp, inclusive, kLanesPerQuery - 1, kLanesPerQuery);
      found = (of_row + kLanesPerQuery - 1 - quarter) / kLanesPerQuery;
      longest = (__reduce_max_sync(kFullWarp, of_row) + kLanesPerQuery - 1) / kLanesPerQuery;
      if (longest > depth) {
        // Happens only with all rows in work: fewer rows have no longer lists than all of them.
        if (longest > FinishSlots::Depth(1)) {
          give_up();
          return;
        }
        while (longest > FinishSlots::Depth(rows)) rows /= 2;
        continue;
      }
      UnpackList(list, entries, screen, quarter, keys + (inclusive - own));
    }
    __syncwarp();

    // 2. Scores of the p-th keys of a row's four lanes. For a product, lane 8 c + 4 b + q works for
    // row 4 s + c of the warp, and its keys are those of the row's lanes 2 b and 2 b + 1.
    {
      const HeadPlace place(params, hidden_head());
      const auto rows_of_keys = PieceRows<kHeadDim>::Of(params.key, place.batch, place.key_head,
                                                        quarter, params.key_row_bytes);
      const int pair = 2 * (index & 1);
      QueryOperand<kPieces> query[2];
      SharedAddress slot[2] = {keys, keys};
      int found_by[2][2];
      int stores[2];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint4 piece[kPieces];
        const int query_row = row - index + 4 * s + index % 4;
        PieceRows<kHeadDim>::Of(params.query, place.batch, place.head, quarter,
                                params.query_row_bytes)
            .Load(min(query_row, shape.queries - 1), piece);
        query[s].Set(piece, lane);
        const int scored = 4 * s + lane / 8;
        slot[s] = warp_slots + (scored & (rows - 1)) * FinishSlots::RowSlots(rows) + pair;
        slot[s].Keep();
        stores[s] = scored >= first && scored < first + rows && quarter == lane / 16;
        asm volatile("" : "+r"(stores[s]));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          found_by[s][i] = __shfl_sync(kFullWarp, found, scored * kLanesPerQuery + pair + i);
        }
      }
      constexpr int kSetsAtOnce = kHeadDim <= 64 ? 2 : 1;
      uint4 piece[kSetsAtOnce][2][kPieces] = {};  // what a missing key leaves behind is not used
#pragma unroll 1
      for (int p = 0; p < longest; ++p) {
#pragma unroll
        for (int first_set = 0; first_set < 2; first_set += kSetsAtOnce) {
#pragma unroll
          for (int t = 0; t < kSetsAtOnce; ++t) {
            const int s = first_set + t;
            const int2 key = slot[s].TwoInts();
            if (p < found_by[s][0]) rows_of_keys.Load(key.x, piece[t][0]);
            if (p < found_by[s][1]) rows_of_keys.Load(key.y, piece[t][1]);
          }
#pragma unroll
          for (int t = 0; t < kSetsAtOnce; ++t) {
            const int s = first_set + t;
            const float z0 = shape.coefficient * Score<Element>(piece[t][0], query[s], lane);
            const float z1 = shape.coefficient * Score<Element>(piece[t][1], query[s], lane);
            if (stores[s]) (slot[s] + FinishSlots::kSlots).SetTwo(z0, z1);
            slot[s] = slot[s] + kLanesPerQuery;
          }
        }
      }
    }
    __syncwarp();

    // 3. Threshold. The number of scores is made even.
    float threshold;
    {
      const SharedAddress own = scores + quarter;
      if (params.saved.row_factor) {
        const float factor = __ldg(params.saved.row_factor + padded_row);
#pragma unroll 1
        for (int p = 0; p < found; ++p) {
          const SharedAddress z = own + kLanesPerQuery * p;
          z.Set(factor * z.Float());
        }
      }
      if (found & 1) (own + kLanesPerQuery * found).Set(-FLT_MAX);
      float maximum = -FLT_MAX;
#pragma unroll 1
      for (int p = 0; p < found; p += 2) {
        const SharedAddress z = own + kLanesPerQuery * p;
        maximum = fmaxf(maximum, fmaxf(z.Float(), (z + kLanesPerQuery).Float()));
      }
      threshold = fmaxf(bound.threshold, QuadMax(maximum) - 1.0f);
#pragma unroll 1
      for (int step = 0; step < 32; ++step) {
        float mass = 0, slope = 0;
#pragma unroll 1
        for (int p = 0; p < found; p += 2) {
          const SharedAddress z = own + kLanesPerQuery * p;
          const float z0 = z.Float(), z1 = (z + kLanesPerQuery).Float();
          rule.Add(__saturatef(z0 - threshold), &mass, &slope);
          rule.Add(__saturatef(z1 - threshold), &mass, &slope);
        }
        const float delta = rule.Step(QuadSum(mass), QuadSum(slope));
        const bool moves = delta > 1.2e-7f * fmaxf(1.0f, fabsf(threshold));
        if (moves) threshold += delta;
        if (!__any_sync(kFullWarp, moves)) break;
      }
    }

    // 4. Survivors. A slot is written only after it has been read: no more than 4 p + q survive
    // before it.
    int support = 0;
#pragma unroll 1
    for (int p = 0; p < longest; ++p) {
      const int slot = kLanesPerQuery * p + quarter;
      const int key = (keys + slot).Int();
      const float z = p < found ? (scores + slot).Float() : -FLT_MAX;
      const bool keep = z > threshold;
      const unsigned kept =
          __ballot_sync(kFullWarp, keep) >> (index * kLanesPerQuery) & ((1u << kLanesPerQuery) - 1);
      __syncwarp();
      if (keep) {
        const int place = support + __popc(kept & lower_lanes);
        (keys + place).Set(key);
        (scores + place).Set(z - threshold);
      }
      support += __popc(kept);
    }
    __syncwarp();
    if (__any_sync(kFullWarp, support > kMaxSupport)) {
      give_up();
      return;
    }

    // 5. Support.
    if (params.save_support) {
      int inclusive = support;
#pragma unroll
      for (int offset = kLanesPerQuery; offset < kWarpSize; offset *= 2) {
        const int other = __shfl_up_sync(kFullWarp, inclusive, offset);
        if (lane >= offset) inclusive += other;
      }
      const int total = __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
      int64_t base = 0;
      if (lane == 0 && total > 0) {
        base = ReserveSupport(params.saved, params.control,
                              hidden_head() * shape.Units() + row / Shape::kUnitRows, total);
      }
      const int64_t offset = __shfl_sync(kFullWarp, base, 0) + inclusive - support;
      const bool fits = offset + support <= params.saved.support_capacity;
      if (fits) {
        const HeadPlace place(params, hidden_head());
        int* const column_count =
            params.saved.column_count +
            (static_cast<int64_t>(place.batch) * shape.kv_heads + place.key_head) * shape.keys;
        for (int i = quarter; i < support; i += kLanesPerQuery) {
          const int key = (keys + i).Int();
          params.saved.support_key[offset + i] = key;
          params.saved.support_excess[offset + i] = (scores + i).Float();
          params.saved.support_slot[offset + i] = atomicAdd(&column_count[key], 1);
        }
      }
      if (active && quarter == 0) {
        params.saved.support_offset[padded_row] = offset;
        params.saved.support_count[padded_row] = fits ? support : 0;
      }
    } else if (active && quarter == 0) {
      params.saved.support_count[padded_row] = support;
    }
    if (active && quarter == 0) {
      params.saved.threshold[padded_row] = shape.VisibleKeys(row) > 0 ? threshold : INFINITY;
    }

    // 6. Output, four survivors at a time.
    for (int i = quarter; i < support; i += kLanesPerQuery) {
      float p, u;
      rule.Weights((scores + i).Float(), &p, &u);
      (scores + i).Set(p);
    }
    __syncwarp();
    const HeadPlace place(params, hidden_head());
    const auto rows_of_values = PieceRows<kHeadDim>::Of(params.value, place.batch, place.key_head,
                                                        quarter, params.value_row_bytes);
    float sum[8 * kPieces] = {};
    uint4 piece[kAtOnce][kPieces] = {};
#pragma unroll 1
    for (int i = 0; i < support; i += 4) {
      const int4 four = (keys + i).FourInts(), weights = (scores + i).FourInts();
      const int key[4] = {four.x, four.y, four.z, four.w};
      const int weight[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
      for (int j = 0; j < 4; j += kAtOnce) {
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          if (i + j + k < support) rows_of_values.Load(key[j + k], piece[k]);
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          if (i + j + k < support) AddPieces<Element>(__int_as_float(weight[j + k]), piece[k], sum);
        }
      }
    }
    if (active && valid) {
      StorePieces<Element>(sum, params.output.Row(place.batch, place.head, row) + 8 * quarter);
    }
    first += rows;
  }
}

template <class Element, int kHeadDim, AlphaMode kAlpha>
__global__ void __launch_bounds__(kFinishThreads, kHeadDim <= 64 ? 12 : 8)
    FinishForwardKernel(const __grid_constant__ FinishParams<Element> params) {
  WaitForEarlierKernels();
  extern __shared__ __align__(1024) char shared_bytes[];
  FinishRows<Element, kHeadDim, kAlpha>(params, *reinterpret_cast<FinishShared*>(shared_bytes));
  if (params.save_support) {
    const Shape& shape = params.shape;
    ClosePool(params.saved, params.control,
              shape.BatchHeads() * (shape.padded_queries / kQueriesPerWarp),
              shape.BatchHeads() * shape.Units());
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_FINISH_FORWARD_CUH_
