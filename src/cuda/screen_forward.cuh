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
//      thread's lists (candidate_list.cuh) while the next product is under way.
// Hits among the newest keys would be tested against the weak bounds of the beginning. Step 3 is
// therefore left out for 512 to 1,024 keys, and their tiles are visited again in the end, when the
// bounds are best: the second product costs less than the hits it avoids. Whenever one step gives a
// thread many hits of a row, keys of a kind that the bounds do not know yet, the bounds are raised
// before the hits are taken.
//
// Traffic: queries once; keys once a query tile (newest twice), from L2; 8 bytes an entry of the
// lists. Nothing of size queries x keys is written.
#ifndef FLASH_ENTMAX_CUDA_SCREEN_FORWARD_CUH_
#define FLASH_ENTMAX_CUDA_SCREEN_FORWARD_CUH_

#include "candidate_list.cuh"
#include "launch_order.cuh"
#include "tile_product.cuh"

namespace flash_entmax::cuda {

template <class Element>
struct ScreenParams {
  Shape shape;
  Tensor<const Element> query;
  const uint32_t* key_norms;  // (batch * kv_heads) x kKeyNorms: largest prefix norms, float bits
  CandidateEntry* lists;      // [strip][row half][kListCapacity][32]
  int* list_count;            // [strip][row half][32]
  RowBound* bound;            // (batch * heads) x padded_queries
  SavedState saved;
  Control* control;
  int first_head;  // this launch covers batch-heads [first_head, first_head + head_count)
  int head_count;
  int deferred_keys;  // newest keys of a row whose hits are taken in the end; 0: chosen
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
  static constexpr int kConsumerRegisters = kHeadDim <= 64 ? 112 : 160;
  static constexpr int kProducerRegisters = 32;
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

// A warp nearly all of whose group maxima are above their bounds has rows whose supports are too
// large for lists: its group gives up. Asked while a group stands for one step, 16 keys, of the
// `tiles` seen: later the maxima of all rows are above their bounds. With 512 keys or more, rows
// that will keep 200 are told from rows that will keep 270 (Gaussian scores). With fewer, only rows
// that have no more keys can be judged.
__device__ __forceinline__ bool LooksDense(const GroupCounts& groups, int tiles, bool all_seen) {
  return (tiles > 1 || all_seen) && tiles <= kMaximumSlots / 2 &&
         groups.above * 128 > groups.seen * 127;
}

// More hits of a row among a thread's 32 keys of a step than a bound that knows such keys lets
// through.
constexpr int kCrowdedStep = 6;

// What a work item covers.
template <int kHeadDim>
struct ScreenItem {
  static constexpr int kRows = ScreenTraits<kHeadDim>::kRows;
  static constexpr int kTileKeys = ScreenTraits<kHeadDim>::kTileKeys;

  int head;  // batch * heads + head
  int first_row;
  int tiles;   // key tiles that some row of the item sees; at least one is streamed
  int visits;  // of key tiles: all of them, and the deferred ones again

  __device__ __forceinline__ ScreenItem(const Shape& shape, int first_head, int head_count,
                                        int deferred_keys, int item) {
    const int row_tiles = (shape.queries + kRows - 1) / kRows;
    head = first_head + item % head_count;
    first_row = (row_tiles - 1 - item / head_count) * kRows;
    const int last_row = min(first_row + kRows, shape.queries) - 1;
    tiles = max(1, (shape.VisibleKeys(last_row) + kTileKeys - 1) / kTileKeys);
    visits = 2 * tiles - FirstDeferred(shape, deferred_keys, first_row);
  }

  static __device__ __forceinline__ int Count(const Shape& shape, int head_count) {
    return (shape.queries + kRows - 1) / kRows * head_count;
  }

  // Rows from `row` on take the hits of this tile and of newer ones in the second visit: enough
  // keys for a good bound. Measured: 512 to 1,024 are best from 2,048 to 131,072 keys. Grows with
  // the row.
  static __device__ __forceinline__ int FirstDeferred(const Shape& shape, int deferred_keys,
                                                      int row) {
    constexpr int kFewest = 512, kMost = 1024;
    const int visible = shape.VisibleKeys(row);
    const int wanted = deferred_keys > 0 ? deferred_keys : min(max(visible / 32, kFewest), kMost);
    return max(0, visible - wanted) / kTileKeys;
  }

  __device__ __forceinline__ bool IsSecond(int visit) const { return visit >= tiles; }
  __device__ __forceinline__ int Tile(int visit) const {
    return (IsSecond(visit) ? 2 * tiles : tiles) - 1 - visit;
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
    const ScreenItem<kHeadDim> work(shape, params.first_head, params.head_count,
                                    params.deferred_keys, item);
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
    for (int visit = 0; visit < work.visits && *finished < Traits::kConsumers; ++visit) {
      load(work.Tile(visit));
    }
  }
  cute::wait_barrier(shared.empty[position.stage], position.parity ^ 1);
  shared.stage_item[position.stage] = -1;
  cute::arrive_barrier(shared.full[position.stage]);
}

// Within an ulp or two, which the factors around its uses cover.
__device__ __forceinline__ float FastSquareRoot(float x) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}

// 2^exponent for whole exponents of normal numbers.
__device__ __forceinline__ float PowerOfTwo(float exponent) {
  return __int_as_float((static_cast<int>(exponent) + 127) << 23);
}

// The queries of a thread's two rows, scaled to fp16, and what makes their screening scores
// certain.
struct ScreenRows {
  RowBounds bounds;
  float2 slack;
  bool usable;  // false: not finite, or not representable in fp16
};

// Scales the queries in place. A screening score differs from the exact one by the rounding of its
// kHeadDim / 16 partial sums to fp16 (2^-10: even by truncation), each at most |q'||k'| of the
// parts of query and key summed so far; the sums inside an instruction and the final fp32 score are
// covered by 2^-14 |q||k|; rounding an input to fp16 loses at most 2^-25 where it becomes
// subnormal. The row's own factor (query_scale) goes into the conversion to z, its sign into the
// queries.
template <class Element, int kHeadDim, AlphaMode kAlpha>
__device__ __forceinline__ ScreenRows ScaleQueries(const Shape& shape, const uint32_t* key_norms,
                                                   const float (&row_factor)[2],
                                                   uint32_t (&query)[kHeadDim / 4]) {
  constexpr int kNormStep = 16 * kKeyNorms / kHeadDim;  // prefix norms a step of 16 dimensions
  float square[2] = {0, 0}, rounded[2] = {0, 0}, key_norm = 0, factor[2];
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    key_norm = __uint_as_float(__ldg(key_norms + (step + 1) * kNormStep - 1));
    float part[2] = {0, 0};
#pragma unroll
    for (int i = 4 * step; i < 4 * step + 4; ++i) {
      const float2 pair = ElementTraits<Element>::Unpack(query[i]);
      part[i & 1] = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, part[i & 1]));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      square[i] += QuadSum(part[i]);
      rounded[i] = fmaf(1.0002f * FastSquareRoot(square[i]), key_norm, rounded[i]);
    }
  }
  ScreenRows rows;
  float slack[2];
  rows.usable = true;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float norm = FastSquareRoot(square[i]) * 1.0001f;
    const float target =
        __fdividef(fminf(kLargestScreenScore, __fdividef(kLargestScreenScore, key_norm)), norm);
    const float exponent = fminf(fmaxf(floorf(__log2f(target)), -100.0f), 100.0f);
    factor[i] = PowerOfTwo(exponent);
    rows.bounds.to_z[i] = shape.coefficient * PowerOfTwo(-exponent) * fabsf(row_factor[i]);
    rows.bounds.screen[i] = __half2half2(__ushort_as_half(kLowestHalf));
    const float scaled = norm * factor[i];
    const float error = factor[i] * rounded[i] * 0x1p-10f + scaled * key_norm * 0x1p-14f +
                        sqrtf(static_cast<float>(kHeadDim)) * 0x1p-24f * (scaled + key_norm);
    slack[i] = fmaf(2.02f * rows.bounds.to_z[i], error, AlphaRule<kAlpha>::kStepSlack);
    // False for infinity and NaN, too.
    rows.usable &= scaled * key_norm <= 2 * kLargestScreenScore;
    // Rows without an order of their scores (factor 0), or far outside all that is reasonable.
    rows.usable &= fabsf(row_factor[i]) > 0x1p-40f && fabsf(row_factor[i]) < 0x1p40f;
    factor[i] = copysignf(factor[i], row_factor[i]);
  }
  rows.slack = make_float2(slack[0], slack[1]);
#pragma unroll
  for (int i = 0; i < kHeadDim / 4; ++i) {
    const float2 pair = ElementTraits<Element>::Unpack(query[i]);
    query[i] = ElementTraits<__half>::Pack(factor[i & 1] * pair.x, factor[i & 1] * pair.y);
  }
  return rows;
}

template <class Element, int kHeadDim, AlphaMode kAlpha>
__device__ __forceinline__ void ScreenConsumer(const ScreenParams<Element>& params,
                                               ScreenShared<kHeadDim>& shared, int group) {
  using Traits = ScreenTraits<kHeadDim>;
  using Item = ScreenItem<kHeadDim>;
  const Shape& shape = params.shape;
  const AlphaRule<kAlpha> rule(shape.alpha);
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  RingPosition<Traits::kStages> position;
  uint32_t scores[Traits::kBuffers][32];  // two halfs each

  const auto wait = [&] { cute::wait_barrier(shared.full[position.stage], position.parity); };
  const auto release = [&] {
    if (lane == 0) cute::arrive_barrier(shared.empty[position.stage]);
    position.Advance();
  };

  for (int sequence = 0;; ++sequence) {
    wait();
    // Broadcasts tell the compiler that the item is the same for the whole warp.
    const int item = __shfl_sync(kFullWarp, shared.stage_item[position.stage], 0);
    if (item < 0) break;
    const Item work(shape, params.first_head, params.head_count, params.deferred_keys, item);
    const int group_row = work.first_row + group * 64;
    const int row = work.first_row + warp * kStripRows + lane / 4;
    const int group_keys = shape.VisibleKeys(min(group_row + 64, shape.queries) - 1);
    const int group_tiles =
        group_row < shape.queries ? (group_keys + Traits::kTileKeys - 1) / Traits::kTileKeys : 0;
    const int first_deferred = Item::FirstDeferred(shape, params.deferred_keys, group_row);
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
    bool overflow;
    {
      const int kv_head =
          work.head / shape.heads * shape.kv_heads + work.head % shape.heads / shape.group;
      float row_factor[2] = {1.0f, 1.0f};
      if (params.saved.row_factor) {
        const float* const factors =
            params.saved.row_factor + static_cast<int64_t>(work.head) * shape.padded_queries + row;
#pragma unroll
        for (int i = 0; i < 2; ++i) row_factor[i] = __ldg(factors + 8 * i);
      }
      const ScreenRows rows = ScaleQueries<Element, kHeadDim, kAlpha>(
          shape, params.key_norms + static_cast<int64_t>(kv_head) * kKeyNorms, row_factor, query);
      bounds = rows.bounds;
      shared.slack[thread] = rows.slack;
      overflow = !rows.usable;
    }
    bool signed_scores = true;  // a bound of the warp is negative
#pragma unroll
    for (int slot = 0; slot < kMaximumSlots; ++slot) {
      shared.maximum[slot][thread] = make_uint2(0xfbfffbffu, 0xfbfffbffu);
    }

    const size_t strip =
        (static_cast<size_t>(work.head - params.first_head) * shape.padded_queries +
         work.first_row) /
            kStripRows +
        warp;
    CandidateEntry* lists = params.lists + strip * kStripListEntries + lane;
    asm volatile("" : "+l"(lists));  // the compiler would compute it again at every append
    int count[2] = {0, 0};
    StepHits hits;
    hits.maximum[0] = hits.maximum[1] = 0xfbfffbffu;

    const auto issue = [&](int half) {
      uint32_t(&sums)[32] = scores[half % Traits::kBuffers];
      Fence(sums);
      cute::warpgroup_arrive();
      IssueHalfScores<kHeadDim>(query, shared.key[position.stage], Traits::kTileKeys,
                                half * kStepKeys, sums);
      cute::warpgroup_commit_batch();
    };
    const auto group_maximum = [&](int i, int slot) {
      const uint2 m = shared.maximum[slot][thread];
      return AsHalf2(i ? m.y : m.x);
    };
    const auto raise_bounds = [&](int steps) {
      RaiseBounds<kAlpha>(rule, steps, shared.slack[thread], bounds, group_maximum);
      signed_scores =
          __any_sync(kFullWarp, (AsBits(bounds.screen[0]) | AsBits(bounds.screen[1])) & 0x8000u);
    };

    // Looks at the scores of one step: `hits` receives its maxima and, if asked, its hits.
    // `may_raise`: not while another step's scores hold the registers that this takes.
    const auto look = [&](uint32_t(&s)[32], int step, bool take_hits, bool may_raise) {
      const int first_key = step * kStepKeys;
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
      RowMaxima(s, signed_scores, hits.maximum);
      hits.step = step;
      hits.mask[0] = hits.mask[1] = 0;
      const uint32_t above = __hgt2_mask(AsHalf2(hits.maximum[0]), bounds.screen[0]) |
                             __hgt2_mask(AsHalf2(hits.maximum[1]), bounds.screen[1]);
      if (take_hits && __any_sync(kFullWarp, above)) {
        const auto find_hits = [&] {
#pragma unroll
          for (int i = 0; i < 2; ++i) hits.mask[i] = HitMask(s, i, bounds.screen[i]);
        };
        find_hits();
        // The first keys of a kind that the bounds do not know yet: they raise the bounds at once.
        if (may_raise &&
            __any_sync(kFullWarp, max(__popc(hits.mask[0]), __popc(hits.mask[1])) > kCrowdedStep)) {
          RecordMaxima(&shared.maximum[MaximumSlot(step)][thread], hits.maximum);
          raise_bounds(3);
          find_hits();
        }
      }
    };
    // Files the hits of the last look; done while a product is under way. Doing it twice is
    // harmless for the maxima, and the masks are cleared.
    const auto file_hits = [&] {
      RecordMaxima(&shared.maximum[MaximumSlot(hits.step)][thread], hits.maximum);
      hits.AppendTo(lists, count);
      hits.mask[0] = hits.mask[1] = 0;
    };
    // Makes room for the two entries of the next tile.
    const auto make_room = [&] {
      constexpr int kNeeded = 2;
      if (__any_sync(kFullWarp, max(count[0], count[1]) > kListCapacity - kNeeded)) {
        raise_bounds(2);
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
          const __half bound = __low2half(i ? bounds.screen[1] : bounds.screen[0]);
          const int kept = Compact(lists + i * kHalfListEntries, i ? count[1] : count[0], bound);
          overflow |= kept > kListCapacity * 7 / 8;
          if (i) {
            count[1] = kept;
          } else {
            count[0] = kept;
          }
        }
        if (overflow) count[0] = count[1] = 0;
      }
    };

    int next_raise = 3;  // tiles seen when the bounds are raised next
    int visit = 0;
    bool gave_up = false;
#pragma unroll 1
    for (; visit < work.visits && !gave_up; ++visit) {
      const int tile = work.Tile(visit);
      const bool second = work.IsSecond(visit);
      wait();
      if (tile >= group_tiles || (second && tile < first_deferred)) {
        release();
        continue;
      }
      const bool take_hits = second || tile < first_deferred;
      issue(1);
      if constexpr (Traits::kBuffers == 2) issue(0);
      file_hits();
      make_room();
      cute::warpgroup_wait<Traits::kBuffers - 1>();
      Fence(scores[Traits::kBuffers - 1]);
      look(scores[Traits::kBuffers - 1], 2 * tile + 1, take_hits, Traits::kBuffers == 1);
      if constexpr (Traits::kBuffers == 1) issue(0);
      file_hits();
      cute::warpgroup_wait<0>();
      Fence(scores[0]);
      release();
      look(scores[0], 2 * tile, take_hits, true);

      const int seen = group_tiles - tile;
      if (!second && (seen >= next_raise || tile == first_deferred || tile == 0)) {
        next_raise = seen * 3 / 2 + 1;
        file_hits();
        raise_bounds(take_hits ? 2 : 4);
        overflow |= LooksDense(CountGroups(bounds, group_maximum), seen, tile == 0);
        gave_up = WarpGroupAny(1 + group, kWarpGroupThreads, overflow);
      }
    }
    file_hits();
    if (gave_up) {
      // The remaining tiles are let through; the producer stops when every group has given up.
      if (thread % kWarpGroupThreads == 0) {
        atomicAdd(&shared.finished_groups[sequence % kItemWindow], 1);
      }
#pragma unroll 1
      for (; visit < work.visits; ++visit) {
        wait();
        if (__shfl_sync(kFullWarp, shared.stage_item[position.stage], 0) != item) break;
        release();
      }
    }

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
        // The lowest finite number says that nothing is known.
        bound[8 * i] = RowBound{screen, screen > -65504.0f ? screen * bounds.to_z[i] : -FLT_MAX};
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) params.list_count[(2 * strip + i) * kWarpSize + lane] = count[i];
  }
}

template <class Element, int kHeadDim, AlphaMode kAlpha>
__global__ void __launch_bounds__(ScreenTraits<kHeadDim>::kThreads, 1)
    ScreenForwardKernel(const __grid_constant__ CUtensorMap key_map,
                        const __grid_constant__ ScreenParams<Element> params) {
  WaitForEarlierKernels();
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
