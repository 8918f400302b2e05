// The one dense product of the list path: every score is computed once, compared with a lower bound
// of its row's threshold, and forgotten unless it may belong to the support.
//
// Scores are screened in fp16 (products of fp16 inputs, fp16 sums): two scores a register halve the
// registers and the instructions of everything below. The difference to the exact score is bounded
// from the norms and part of every bound, so nothing of the support is lost; what passes is scored
// again in fp32 later (finish_forward.cuh).
//
// One persistent CTA a multiprocessor: a producer warp streams key tiles of 256 rows into a ring of
// shared-memory stages, and `kConsumers` warp groups of 64 query rows (queries in registers) share
// them. Work items are query tiles of 64 * kConsumers rows, longest first. A warp group visits its
// keys from the newest to the oldest, two steps of 128 keys a tile:
//   1. the maxima of each row's 16 even and 16 odd scores a thread (a quarter instruction a score);
//   2. folded into 16 running group maxima a row and thread in shared memory, from which Newton
//      gives a certified bound whenever the keys seen have grown by half (bounds.cuh);
//   3. if a maximum of the warp is above its bound: a bit a score, appended with the maxima to the
//      thread's list (candidate_list.cuh).
// The newest keys also raise the bound by Newton on the scores in registers. An optional sample
// pass first looks at every `sample_stride`-th tile for maxima only.
//
// Traffic: queries once; keys once a query tile, from L2; 16 bytes an entry of the lists. Nothing
// of size queries x keys is written.
#ifndef FLASH_ENTMAX_CUDA_SCREEN_FORWARD_CUH_
#define FLASH_ENTMAX_CUDA_SCREEN_FORWARD_CUH_

#include "candidate_list.cuh"
#include "tile_product.cuh"

namespace flash_entmax::cuda {

template <class Element>
struct ScreenParams {
  Shape shape;
  Tensor<const Element> query;
  const uint32_t* key_norm;  // (batch * kv_heads): largest key norm, as float bits
  CandidateEntry* lists;     // [strip][kListCapacity][32]
  int* list_count;           // [strip][32]
  RowBound* bound;           // (batch * heads) x padded_queries
  SavedState saved;
  Control* control;
  int first_head;  // this launch covers batch-heads [first_head, first_head + head_count)
  int head_count;
  int sample_stride;  // 0: no sample pass
};

// Measured: 4 groups with one product in flight each beat 5 and 6 lighter ones, and 3 with two.
template <int kHeadDim>
struct ScreenTraits {
  static constexpr int kConsumers = kHeadDim <= 64 ? 4 : 3;
  static constexpr int kBuffers = kHeadDim <= 64 ? 1 : 2;  // products in flight of a group
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kTileKeys = 256;
  static constexpr int kStages = kHeadDim <= 64 ? 4 : 3;
  static constexpr int kConsumerThreads = kConsumers * kWarpGroupThreads;
  static constexpr int kThreads = kConsumerThreads + kWarpGroupThreads;
  static constexpr int kConsumerRegisters = kHeadDim <= 64 ? 112 : 152;
  static constexpr int kProducerRegisters = kHeadDim <= 64 ? 32 : 24;
  static constexpr int kStageBytes = kTileBytes<kHeadDim, kTileKeys>;
};

// Items between a producer and its slowest consumer are fewer than this.
constexpr int kItemWindow = 8;

template <int kHeadDim>
struct ScreenShared {
  using Traits = ScreenTraits<kHeadDim>;
  alignas(1024) char key[Traits::kStages][Traits::kStageBytes];
  uint2 maximum[kMaximumSlots][Traits::kConsumerThreads];
  float2 slack[Traits::kConsumerThreads];  // of each thread's two rows
  uint64_t full[Traits::kStages];
  uint64_t empty[Traits::kStages];
  int stage_item[Traits::kStages];   // work item of a stage, -1 = no more work
  int finished_groups[kItemWindow];  // warp groups that gave an item up
};

// A warp most of whose group maxima are above their bounds has rows with large supports: its group
// gives up. `tiles` = key tiles seen; each fills two slots of 4 maxima a thread.
__device__ __forceinline__ bool LooksDense(int groups_above, int tiles) {
  constexpr int kGroupsInSlot = kWarpSize * 4;
  return tiles > 1 && groups_above * 16 > min(2 * tiles, kMaximumSlots) * kGroupsInSlot * 15;
}

// What a work item covers.
template <int kHeadDim>
struct ScreenItem {
  int head;  // batch * heads + head
  int first_row;
  int tiles;         // key tiles that some row of the item sees; at least one is streamed
  int shared_tiles;  // key tiles that every row of the item sees whole

  __device__ __forceinline__ ScreenItem(const Shape& shape, int first_head, int head_count,
                                        int item) {
    constexpr int kRows = ScreenTraits<kHeadDim>::kRows;
    constexpr int kTileKeys = ScreenTraits<kHeadDim>::kTileKeys;
    const int row_tiles = (shape.queries + kRows - 1) / kRows;
    head = first_head + item % head_count;
    first_row = (row_tiles - 1 - item / head_count) * kRows;
    const int last_row = min(first_row + kRows, shape.queries) - 1;
    tiles = max(1, (shape.VisibleKeys(last_row) + kTileKeys - 1) / kTileKeys);
    shared_tiles = shape.VisibleKeys(first_row) / kTileKeys;
  }

  static __device__ __forceinline__ int Count(const Shape& shape, int head_count) {
    constexpr int kRows = ScreenTraits<kHeadDim>::kRows;
    return (shape.queries + kRows - 1) / kRows * head_count;
  }

  // First tile of the sample pass; negative when there is nothing to sample.
  __device__ __forceinline__ int FirstSample(int stride) const {
    return stride ? shared_tiles - 1 - stride / 2 : -1;
  }
};

template <class Element, int kHeadDim>
__device__ __forceinline__ void ScreenProducer(const CUtensorMap& key_map,
                                               const ScreenParams<Element>& params,
                                               ScreenShared<kHeadDim>& shared) {
  using Traits = ScreenTraits<kHeadDim>;
  const Shape& shape = params.shape;
  const int items = ScreenItem<kHeadDim>::Count(shape, params.head_count);
  RingPosition<Traits::kStages> position;
  for (int sequence = 0;; ++sequence) {
    const int item = atomicAdd(&params.control->next_item, 1);
    if (item >= items) break;
    const ScreenItem<kHeadDim> work(shape, params.first_head, params.head_count, item);
    const int batch = work.head / shape.heads;
    const int kv_head = work.head % shape.heads / shape.group;
    volatile int* finished = &shared.finished_groups[sequence % kItemWindow];
    shared.finished_groups[(sequence + 1) % kItemWindow] = 0;
    const auto load = [&](int tile) {
      cute::wait_barrier(shared.empty[position.stage], position.parity ^ 1);
      shared.stage_item[position.stage] = item;
      cute::set_barrier_transaction_bytes(shared.full[position.stage], Traits::kStageBytes);
      LoadTile<kHeadDim, Traits::kTileKeys>(key_map, &shared.full[position.stage],
                                            shared.key[position.stage], tile * Traits::kTileKeys,
                                            kv_head, batch);
      position.Advance();
    };
    const int first_sample = work.FirstSample(params.sample_stride);
    for (int tile = first_sample; tile >= 0; tile -= params.sample_stride) load(tile);
    for (int tile = work.tiles - 1; tile >= 0 && *finished < Traits::kConsumers; --tile) {
      load(tile);
    }
  }
  cute::wait_barrier(shared.empty[position.stage], position.parity ^ 1);
  shared.stage_item[position.stage] = -1;
  cute::arrive_barrier(shared.full[position.stage]);
}

template <class Element, int kHeadDim, AlphaMode kAlpha>
__device__ __forceinline__ void ScreenConsumer(const ScreenParams<Element>& params,
                                               ScreenShared<kHeadDim>& shared, int group) {
  using Traits = ScreenTraits<kHeadDim>;
  const Shape& shape = params.shape;
  const AlphaRule<kAlpha> rule(shape.alpha);
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  RingPosition<Traits::kStages> position;
  uint32_t scores[Traits::kBuffers][32];  // two halfs each

  const auto wait = [&] { cute::wait_barrier(shared.full[position.stage], position.parity); };
  const auto release = [&](int stage) {
    if (lane == 0) cute::arrive_barrier(shared.empty[stage]);
  };

  for (int sequence = 0;; ++sequence) {
    wait();
    // Broadcasts tell the compiler that the item is the same for the whole warp.
    const int item = __shfl_sync(kFullWarp, shared.stage_item[position.stage], 0);
    if (item < 0) break;
    const ScreenItem<kHeadDim> work(shape, params.first_head, params.head_count, item);
    const int group_row = work.first_row + group * 64;
    const int row = work.first_row + warp * kStripRows + lane / 4;
    const int group_keys = shape.VisibleKeys(min(group_row + 64, shape.queries) - 1);
    const int group_tiles =
        group_row < shape.queries ? (group_keys + Traits::kTileKeys - 1) / Traits::kTileKeys : 0;
    // Keys that every row of the warp sees.
    const int warp_keys =
        shape.VisibleKeys(work.first_row + warp * kStripRows + kStripRows - 1) == 0
            ? 0
            : shape.VisibleKeys(work.first_row + warp * kStripRows);

    uint32_t query[kHeadDim / 4];
    LoadOperand<Element, kHeadDim>(
        params.query.Row(work.head / shape.heads, work.head % shape.heads, 0),
        params.query.strides.row, row, shape.queries, lane, query);

    RowBounds bounds;
    {
      const int kv_head =
          work.head / shape.heads * shape.kv_heads + work.head % shape.heads / shape.group;
      const float key_norm = __uint_as_float(__ldg(params.key_norm + kv_head));
      float square[2] = {0, 0}, factor[2], slack[2];
#pragma unroll
      for (int i = 0; i < kHeadDim / 4; ++i) {
        const float2 pair = ElementTraits<Element>::Unpack(query[i]);
        square[i & 1] = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, square[i & 1]));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float norm = sqrtf(QuadSum(square[i])) * 1.0001f;
        const float target = fminf(kLargestScreenScore, kLargestScreenScore / key_norm) / norm;
        const float exponent = fminf(fmaxf(floorf(log2f(target)), -100.0f), 100.0f);
        factor[i] = exp2f(exponent);
        bounds.to_z[i] = shape.coefficient * exp2f(-exponent);
        // Each of the kHeadDim / 16 partial sums is rounded to fp16 (2^-10: even by truncation) and
        // is at most |q||k|; the sums inside an instruction and the final fp32 score are covered by
        // 2^-14; rounding an input to fp16 loses at most 2^-25 where it becomes subnormal.
        const float scaled = norm * factor[i];
        const float error = scaled * key_norm * (kHeadDim / 16 * 0x1p-10f + 0x1p-14f) +
                            sqrtf(static_cast<float>(kHeadDim)) * 0x1p-24f * (scaled + key_norm);
        slack[i] = fmaf(2.02f * bounds.to_z[i], error, AlphaRule<kAlpha>::kStepSlack);
        bounds.screen[i] = __half2half2(__ushort_as_half(0xfbff));  // lowest finite
      }
      shared.slack[thread] = make_float2(slack[0], slack[1]);
#pragma unroll
      for (int i = 0; i < kHeadDim / 4; ++i) {
        const float2 pair = ElementTraits<Element>::Unpack(query[i]);
        query[i] = ElementTraits<__half>::Pack(factor[i & 1] * pair.x, factor[i & 1] * pair.y);
      }
    }
#pragma unroll
    for (int slot = 0; slot < kMaximumSlots; ++slot) {
      shared.maximum[slot][thread] = make_uint2(0xfbfffbffu, 0xfbfffbffu);
    }

    const size_t strip =
        (static_cast<size_t>(work.head - params.first_head) * shape.padded_queries +
         work.first_row) /
            kStripRows +
        warp;
    CandidateEntry* const list = params.lists + strip * kStripListEntries + lane;
    int count = 0;
    bool overflow = false;

    const auto issue = [&](int half) {
      uint32_t(&sums)[32] = scores[half % Traits::kBuffers];
      Fence(sums);
      cute::warpgroup_arrive();
      IssueHalfScores<kHeadDim>(query, shared.key[position.stage], Traits::kTileKeys,
                                half * kStepKeys, sums);
      cute::warpgroup_commit_batch();
    };
    const auto signed_scores = [&] {
      return __any_sync(kFullWarp, (AsBits(bounds.screen[0]) | AsBits(bounds.screen[1])) & 0x8000u);
    };
    const auto group_maximum = [&](int i, int slot) {
      const uint2 m = shared.maximum[slot][thread];
      return AsHalf2(i ? m.y : m.x);
    };
    const auto raise_from_maxima = [&](int steps) {
      RaiseBounds<kAlpha, kMaximumSlots>(rule, steps, shared.slack[thread], bounds, group_maximum);
    };

    // Looks at the scores of one step.
    const auto look = [&](uint32_t(&s)[32], int step, bool near) {
      const int first_key = step * kStepKeys;
      if (first_key >= group_keys) return;
      if (first_key + kStepKeys > warp_keys) {
        constexpr uint32_t kLowMasked = 0xfc00u, kHighMasked = 0xfc000000u;  // -inf
        const int visible0 = shape.VisibleKeys(row), visible1 = shape.VisibleKeys(row + 8);
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const int key = first_key + 8 * (i / 2) + 2 * (lane % 4);
          const int visible = (i & 1) ? visible1 : visible0;
          if (key >= visible) s[i] = kLowMasked | kHighMasked;
          if (key + 1 == visible) s[i] = (s[i] & 0xffffu) | kHighMasked;
        }
      }
      if (near) {
        RaiseBounds<kAlpha, 16>(rule, 3, shared.slack[thread], bounds,
                                [&](int i, int pair) { return AsHalf2(s[2 * pair + i]); });
      }
      uint32_t maximum[2];
      RowMaxima(s, signed_scores(), maximum);
      RecordMaxima(&shared.maximum[MaximumSlot(step)][thread], maximum);
      const uint32_t above = __hgt2_mask(AsHalf2(maximum[0]), bounds.screen[0]) |
                             __hgt2_mask(AsHalf2(maximum[1]), bounds.screen[1]);
      if (__any_sync(kFullWarp, above)) {
        if (__any_sync(kFullWarp, count >= kListCapacity)) {
          raise_from_maxima(2);
          count = Compact(list, count, bounds);
          overflow |= count > kListCapacity * 7 / 8;
          if (overflow) count = 0;
        }
        const uint32_t mask0 = HitMask(s, 0, bounds.screen[0]);
        const uint32_t mask1 = HitMask(s, 1, bounds.screen[1]);
        Append(list, count, mask0, mask1, maximum, step);
      }
    };

    const int first_sample = work.FirstSample(params.sample_stride);
    if (first_sample >= 0) {
#pragma unroll 1
      for (int tile = first_sample; tile >= 0; tile -= params.sample_stride) {
        wait();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          issue(half);
          cute::warpgroup_wait<0>();
          uint32_t(&sums)[32] = scores[half % Traits::kBuffers];
          Fence(sums);
          uint32_t maximum[2];
          RowMaxima(sums, false, maximum);
          RecordMaxima(&shared.maximum[MaximumSlot(2 * tile + half)][thread], maximum);
        }
        release(position.stage);
        position.Advance();
      }
      raise_from_maxima(4);
    }
#pragma unroll 1
    for (int tile = work.tiles - 1; tile >= group_tiles; --tile) {
      wait();
      release(position.stage);
      position.Advance();
    }

    const int newest = group_tiles - 1;
    // Bounds are raised when `tile` falls to this.
    int next_raise =
        first_sample >= 0 ? newest - max(2, work.tiles / params.sample_stride) + 1 : newest;
    int tile = newest;
    bool gave_up = false;
#pragma unroll 1
    for (; tile >= 0 && !gave_up; --tile) {
      const bool near = tile == newest;
      wait();
      issue(1);
      if constexpr (Traits::kBuffers == 2) {
        issue(0);
        cute::warpgroup_wait<1>();
        Fence(scores[1]);
        look(scores[1], 2 * tile + 1, near);
      } else {
        cute::warpgroup_wait<0>();
        Fence(scores[0]);
        look(scores[0], 2 * tile + 1, near);
        issue(0);
      }
      cute::warpgroup_wait<0>();
      Fence(scores[0]);
      release(position.stage);
      position.Advance();
      look(scores[0], 2 * tile, near);
      if (tile <= next_raise) {
        next_raise = newest - (newest - tile + 1) * 3 / 2;
        raise_from_maxima(2);
        overflow |= LooksDense(GroupsAbove(bounds, group_maximum), newest - tile + 1);
        gave_up = WarpGroupAny(1 + group, kWarpGroupThreads, overflow);
      }
    }
    if (gave_up) {
      // The remaining tiles are let through; the producer stops when every group has given up.
      if (thread % kWarpGroupThreads == 0) {
        atomicAdd(&shared.finished_groups[sequence % kItemWindow], 1);
      }
#pragma unroll 1
      for (; tile >= 0; --tile) {
        wait();
        if (__shfl_sync(kFullWarp, shared.stage_item[position.stage], 0) != item) break;
        release(position.stage);
        position.Advance();
      }
    }
    raise_from_maxima(2);

    bool tile_path = overflow || gave_up;
#pragma unroll
    for (int slot = 0; slot < kMaximumSlots; ++slot) {
      const uint2 m = shared.maximum[slot][thread];
      // Infinity or NaN somewhere.
      tile_path |= __hlt2_mask(__hmax2_nan(AsHalf2(m.x), AsHalf2(m.y)),
                               __half2half2(__ushort_as_half(0x7c00))) != 0xffffffffu;
    }
    if (tile_path && group_row < shape.queries) {
      FlagUnit(params.saved, params.control,
               work.head * shape.Units() + group_row / Shape::kUnitRows, kFlaggedByScreening);
    }
    if (lane % 4 == 0) {
      RowBound* const bound =
          params.bound + static_cast<size_t>(work.head) * shape.padded_queries + row;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float screen = __low2float(bounds.screen[i]);
        const float2 slack = shared.slack[thread];
        // The lowest finite number says that nothing is known.
        bound[8 * i] = RowBound{screen, screen > -65504.0f ? screen * bounds.to_z[i] : -FLT_MAX,
                                bounds.to_z[i], i ? slack.y : slack.x};
      }
    }
    params.list_count[strip * kWarpSize + lane] = count;
  }
}

template <class Element, int kHeadDim, AlphaMode kAlpha>
__global__ void __launch_bounds__(ScreenTraits<kHeadDim>::kThreads, 1)
    ScreenForwardKernel(const __grid_constant__ CUtensorMap key_map,
                        const __grid_constant__ ScreenParams<Element> params) {
  using Traits = ScreenTraits<kHeadDim>;
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<ScreenShared<kHeadDim>*>(shared_bytes);
  const int group = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpGroupThreads, 0);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      cute::initialize_barrier(shared.full[stage], 1);
      cute::initialize_barrier(shared.empty[stage], Traits::kConsumerThreads / kWarpSize);
    }
    for (int i = 0; i < kItemWindow; ++i) shared.finished_groups[i] = 0;
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (group == Traits::kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x == Traits::kConsumerThreads) {
      ScreenProducer<Element, kHeadDim>(key_map, params, shared);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    ScreenConsumer<Element, kHeadDim, kAlpha>(params, shared, group);
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_SCREEN_FORWARD_CUH_
