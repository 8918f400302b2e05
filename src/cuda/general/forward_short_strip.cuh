// What one team of warps of the short forward kernel does with one strip of 16 queries to find
// their thresholds. forward_short.cuh has the algorithm and the kernel, forward_short_product.cuh
// what follows: products and stores.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_STRIP_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_STRIP_CUH_

#include "general/forward_short_shape.cuh"

namespace flash_entmax::cuda::forward {

// One strip of queries and the team of warps that works on it. kFast: alpha = 1.5, and z is a
// positive multiple of the dot product.
template <class Element, int kHeadDim, int kSplit, bool kFast, int kHeldBlocks>
struct ShortStrip {
  using M = Mma<Element>;
  using Shape = ShortShape<Element, kHeadDim, kSplit, kHeldBlocks>;
  using Tile = SharedTile<Element, kHeadDim>;
  using Team = typename Shape::Team;
  static constexpr int kBlocks = Shape::kBlocks;
  static constexpr int kGroupsPerThread = Shape::kGroups / (4 * kSplit);

  const GeneralForward& call;
  const SequencePart& part;
  Team& team;
  AlphaCurve curve;
  int head;
  int team_index;  // in the block
  int warp;        // in the team

  int first_row;               // of the strip, in the sequence
  int end_row;                 // rows from here on are not this block's
  int first_key;               // of the strip's blocks of keys, in the sequence
  int blocks;                  // of this warp
  int most_keys;               // that a row of the strip may see
  int clear_first, clear_end;  // keys that every row of the strip sees, counted like the blocks
  float coefficient;           // z = coefficient * score
  float inverse_coefficient;   // 1 / coefficient
  float maximum[2], threshold[2];
  float score[kBlocks][2][4];

  __device__ __forceinline__ void Sync() const {
    if constexpr (kSplit == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(team_index + 1), "n"(32 * kSplit) : "memory");
    }
  }

  // Calls body(block, first) for the warp's blocks, `first` counted from first_key. The number of a
  // block is a constant, so that scores stay in registers.
  template <class Body>
  __device__ __forceinline__ void ForBlocks(Body body) const {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (block < blocks) body(block, 16 * (block * kSplit + warp));
    }
  }

  // Calls body(score, i) for all scores of the thread; i says which of its two rows.
  template <class Body>
  __device__ __forceinline__ void ForScores(Body body) {
    ForBlocks([&](int block, int) {
#pragma unroll
      for (int e = 0; e < 8; ++e) body(score[block][e / 4][e % 4], e / 2 % 2);
    });
  }

  // Places the strip that starts at `strip_row`. `base`: the sequence's key in the first row of the
  // key tile.
  __device__ __forceinline__ void Place(int strip_row, int base) {
    const GeneralProblem& problem = call.problem;
    first_row = strip_row;
    first_key = base;
    blocks = most_keys = clear_first = clear_end = 0;
    if (strip_row >= end_row) return;
    const KeyRange top = KeyRange::Of(problem, part, strip_row);
    const KeyRange bottom = KeyRange::Of(problem, part, min(strip_row + kStripRows, end_row) - 1);
    first_key += max(top.first - base, 0) / 16 * 16;
    const int count = (bottom.end - first_key + 15) / 16;  // all warps together
    blocks = bottom.end > top.first ? min((count - warp + kSplit - 1) / kSplit, kBlocks) : 0;
    clear_first = bottom.first - first_key;
    clear_end = top.end - first_key;
    most_keys = bottom.end - top.first;
  }

  // The thread's row i, in the sequence.
  __device__ __forceinline__ int Row(int i) const {
    return first_row + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * i;
  }

  // S = Q.K^T; `key_row`: the tile's row of first_key.
  __device__ __forceinline__ void ComputeScores(const Tile& query, int query_row, const Tile& key,
                                                int key_row) {
    constexpr int kSteps = kHeadDim / M::kDepth;
    constexpr int kHeld = M::kDepth == 8 ? 2 : (kSteps < 4 ? kSteps : 4);
    if constexpr (kSteps > kHeld) {
#pragma unroll
      for (int e = 0; e < 8 * kBlocks; ++e) score[e / 8][e / 4 % 2][e % 4] = 0.0f;
    }
#pragma unroll 1
    for (int first_step = 0; first_step < kSteps; first_step += kHeld) {
      typename M::A a[kHeld];
#pragma unroll
      for (int step = 0; step < kHeld; ++step) {
        a[step] = M::LoadRowsA(query, query_row, first_step + step);
      }
      ForBlocks([&](int block, int first) {
#pragma unroll
        for (int step = 0; step < kHeld; ++step) {
          typename M::B low, high;
          M::LoadRowsB2(key, key_row + first, first_step + step, &low, &high);
          MultiplyStep<M>(kSteps == kHeld && step == 0, a[step], low, score[block][0]);
          MultiplyStep<M>(kSteps == kHeld && step == 0, a[step], high, score[block][1]);
        }
      });
    }
    FinishScores();
  }

  // From dot products to z (unless they are proportional), hidden keys to -inf.
  __device__ __forceinline__ void FinishScores() {
    const int lane = threadIdx.x % 32;
    const float slope = kFast ? 0.0f : SlopeOf(call.problem, head);
    float factor[2];
    KeyRange range[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (!kFast) factor[i] = curve.order * FactorOf(call.problem, part, head, Row(i));
      range[i] = KeyRange::Of(call.problem, part, Row(i));
    }
    ForBlocks([&](int block, int first) {
      if constexpr (!kFast) {
        ToZ<8>(
            call.problem, curve.order, slope,
            Row(0) + part.keys - part.queries - first_key - first - lane % 4 * 2,
            [&](int e) -> float& { return score[block][e / 4][e % 4]; },
            [&](int e) { return factor[e / 2 % 2]; },
            [](int e) { return 8 * (e / 2 % 2) - 8 * (e / 4) - e % 2; });
      }
      if (first < clear_first || first + 16 > clear_end) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int key = first_key + first + e / 4 * 8 + lane % 4 * 2 + e % 2;
          if (key < range[e / 2 % 2].first || key >= range[e / 2 % 2].end)
            score[block][e / 4][e % 4] = -INFINITY;
        }
      }
    });
  }

  // The threshold of every row: in `maximum` and `threshold`, see Excess.
  template <class Weights>
  __device__ __forceinline__ void Solve(const Weights& weights) {
    if constexpr (kSplit == 1) {
      maximum[0] = maximum[1] = -INFINITY;
      ForScores([&](float s, int i) { maximum[i] = MaxKeepNan(maximum[i], s); });
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        maximum[i] = QuadMax(maximum[i]);
        threshold[i] = -1.0f;
      }
      ForScores([&](float& s, int i) { s -= maximum[i]; });
    } else {
      StartFromGroups(weights);
      ListKeys();
      if (SolveLists(weights)) return;
    }
#pragma unroll 1
    for (int pass = 0; pass < kMaxPasses; ++pass) {
      float mass[2] = {0.0f, 0.0f}, slope[2] = {0.0f, 0.0f};
      ForScores([&](float s, int i) {
        AddKey(weights, Excess(coefficient, s, threshold[i]), &mass[i], &slope[i]);
      });
      SumOverTeam(pass % 2, mass, slope);
      bool unsettled = false;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float delta = weights.Step(mass[i], slope[i]);
        threshold[i] += delta;
        // A row without a distribution is NaN from the start.
        unsettled |=
            !isnan(threshold[i]) && IsUnsettled(weights, mass[i], slope[i], delta, most_keys);
      }
      // All warps of a team have the same sums, hence the same answer.
      if (!__any_sync(kWarp, unsettled)) break;
    }
  }

  // In the threshold's steps through shared memory, kLanes lanes of a warp solve one row.
  static constexpr int kLanes = 2 * kSplit;
  __device__ __forceinline__ int SolvedRow() const {
    return (warp * 32 + static_cast<int>(threadIdx.x) % 32) / kLanes;
  }

  // Largest score and a lower bound of the threshold, from the maxima of disjoint groups of keys:
  // every warp shares those of its keys, then solves a part of the strip's rows.
  template <class Weights>
  __device__ __forceinline__ void StartFromGroups(const Weights& weights) {
    const int lane = threadIdx.x % 32;
    float group[2][kGroupsPerThread];
#pragma unroll
    for (int g = 0; g < 2 * kGroupsPerThread; ++g) {
      group[g / kGroupsPerThread][g % kGroupsPerThread] = -INFINITY;
    }
    ForBlocks([&](int block, int) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& largest = group[e / 2 % 2][block % kGroupsPerThread];
        largest = MaxKeepNan(largest, score[block][e / 4][e % 4]);
      }
    });
    Sync();  // The team may still be storing rows of the strip before.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int g = 0; g < kGroupsPerThread; g += 2) {
        const int column = (warp * 4 + lane % 4) * kGroupsPerThread + g;
        *reinterpret_cast<float2*>(&team.maxima[lane / 4 + 8 * i][column]) =
            make_float2(group[i][g], group[i][g + 1]);
      }
    }
    Sync();
    constexpr int kOwn = Shape::kGroups / kLanes;
    const int solved_row = SolvedRow();
    float d[kOwn];
    float largest = -INFINITY;
#pragma unroll
    for (int g = 0; g < kOwn; g += 4) {
      const float4 four =
          *reinterpret_cast<float4*>(&team.maxima[solved_row][lane % kLanes * kOwn + g]);
      d[g] = four.x, d[g + 1] = four.y, d[g + 2] = four.z, d[g + 3] = four.w;
    }
#pragma unroll
    for (int g = 0; g < kOwn; ++g) largest = MaxKeepNan(largest, d[g]);
#pragma unroll
    for (int other = 1; other < kLanes; other *= 2) {
      largest = MaxKeepNan(largest, __shfl_xor_sync(kWarp, largest, other));
    }
    float bound = -1.0f;
#pragma unroll
    for (int g = 0; g < kOwn; ++g) d[g] -= largest;
#pragma unroll 1
    for (int pass = 0; pass < 8; ++pass) {
      float mass = 0.0f, slope = 0.0f;
#pragma unroll
      for (int g = 0; g < kOwn; ++g) {
        AddKey(weights, Excess(coefficient, d[g], bound), &mass, &slope);
      }
#pragma unroll
      for (int other = 1; other < kLanes; other *= 2) {
        mass += __shfl_xor_sync(kWarp, mass, other);
        slope += __shfl_xor_sync(kWarp, slope, other);
      }
      const float delta = weights.Step(mass, slope);
      bound += delta;
      // A bound need not be sharp. Every iterate from the left is one. The error that is left is of
      // the order of the last step squared; alpha near 1 magnifies it.
      if (!__any_sync(kWarp, delta > (kFast ? 0.03f : 1e-3f))) break;
    }
    if (lane % kLanes == 0) team.start[solved_row] = make_float2(largest, bound);
    Sync();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 start = team.start[lane / 4 + 8 * i];
      maximum[i] = start.x;
      threshold[i] = start.y;
    }
  }

  // Where a thread's slots are in a row of `list` and `listed`. Every other warp swaps its halves:
  // the lanes that solve some rows then read from all banks.
  static __device__ __forceinline__ int ListColumn(int listing_warp, int lane) {
    return lane ^ (listing_warp % 2 * 16);
  }

  // Scores become relative to the row's largest. Those that are above the bound, the only ones that
  // can have a positive probability, are listed: the thread's first row from the first slot up, its
  // second row from the last slot down. If the two might meet, the lists are marked as too long.
  __device__ __forceinline__ void ListKeys() {
    constexpr int kSlots = Shape::kSlots;
    const int column = ListColumn(warp, static_cast<int>(threadIdx.x) % 32);
    // Places in the lists are kept in bytes, so that one addition moves to the next.
    constexpr int kStep = kSplit * 32 * static_cast<int>(sizeof(float));
    char* const lists = reinterpret_cast<char*>(team.list);
    const int bottom = (warp * 32 + column) * static_cast<int>(sizeof(float));
    const int top = bottom + (kSlots - 1) * kStep;
    int next[2] = {bottom, top};
    float cut[2];
    // The bound in units of the score, a little lower so that rounding leaves nothing out.
#pragma unroll
    for (int i = 0; i < 2; ++i) cut[i] = threshold[i] * inverse_coefficient * 1.00001f;
    ForBlocks([&](int block, int) {
      // A block may fill eight slots.
      if (8 * (block + 1) > kSlots && next[1] < next[0] + 7 * kStep) cut[0] = cut[1] = INFINITY;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int i = e / 2 % 2;
        float& d = score[block][e / 4][e % 4];
        d -= maximum[i];
        if (d > cut[i]) {
          *reinterpret_cast<float*>(lists + next[i]) = d;
          next[i] += i == 0 ? kStep : -kStep;
        }
      }
    });
    const bool full = cut[0] == INFINITY;
    const int count[2] = {(next[0] - bottom) / kStep, (top - next[1]) / kStep};
#pragma unroll
    for (int i = 0; i < 2; ++i) team.listed[i][warp][column] = full ? kSlots : count[i];
    Sync();
  }

  // The threshold from the lists, where they are complete: Newton from the bound, every row by
  // kLanes lanes that hold its entries in registers. False, with the thresholds still the bounds,
  // if some lists are too long; the same for all warps of the team.
  template <class Weights>
  __device__ __forceinline__ bool SolveLists(const Weights& weights) {
    constexpr int kStep = kSplit * 32;
    constexpr int kHeld = 12;  // entries that a lane can hold
    static_assert(kHeld < Shape::kSlots);
    const int lane = threadIdx.x % 32;
    const int row = SolvedRow();
    // The two lists of this lane: those of two neighbouring threads of one warp.
    const int listing_warp = lane % kLanes / 2;
    const int column = ListColumn(listing_warp, 4 * (row % 8) + lane % 2 * 2);
    const bool upward = warp < kSplit / 2;  // the rows of this warp are first rows: row < 8
    const int2 count =
        *reinterpret_cast<const int2*>(&team.listed[upward ? 0 : 1][listing_warp][column]);
    const int entries = count.x + count.y;
    const int most = __reduce_max_sync(kWarp, entries);
    const bool complete = most <= kHeld;
    float bound = team.start[row].y;
    if (complete) {
      float d[kHeld];
      // Calls body(d[e]) for the lane's entries, by fours; the number of fours is that of the warp.
      const auto for_entries = [&](auto body) {
#pragma unroll
        for (int four = 0; four < kHeld; four += 4) {
          if (four < most) {
#pragma unroll
            for (int e = four; e < four + 4; ++e) body(d[e], e);
          }
        }
      };
      const auto load = [&]<int kSlot, int kDirection>() {
        const float* const first = &team.list[kSlot][listing_warp][column];
        const float* const second = first + 1 - count.x * kDirection;
        for_entries([&](float& x, int e) {
          x = e < entries ? (e < count.x ? first : second)[e * kDirection] : -INFINITY;
        });
      };
      if (upward) {
        load.template operator()<0, kStep>();
      } else {
        load.template operator()<Shape::kSlots - 1, -kStep>();
      }
#pragma unroll 1
      for (int pass = 0; pass < kMaxPasses; ++pass) {
        float mass = 0.0f, slope = 0.0f;
        for_entries(
            [&](float x, int) { AddKey(weights, Excess(coefficient, x, bound), &mass, &slope); });
#pragma unroll
        for (int other = 1; other < kLanes; other *= 2) {
          mass += __shfl_xor_sync(kWarp, mass, other);
          slope += __shfl_xor_sync(kWarp, slope, other);
        }
        const float delta = weights.Step(mass, slope);
        bound += delta;
        const bool unsettled =
            !isnan(bound) && IsUnsettled(weights, mass, slope, delta, kLanes * most);
        if (!__any_sync(kWarp, unsettled)) break;
      }
    }
    __syncwarp();  // The lanes of the row have read where it starts.
    if (lane % kLanes == 0) team.start[row] = make_float2(bound, complete ? 0.0f : 1.0f);
    Sync();
    float2 result[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) result[i] = team.start[lane / 4 + 8 * i];
    if (__any_sync(kWarp, result[0].y + result[1].y > 0.0f)) return false;
    threshold[0] = result[0].x;
    threshold[1] = result[1].x;
    return true;
  }

  // Adds up what the threads that share a row have; the order is always the same. Slots alternate,
  // so that one barrier is enough: whoever writes a slot again has passed the barrier that all
  // reach after they read it.
  __device__ __forceinline__ void SumOverTeam(int slot, float (&mass)[2], float (&slope)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mass[i] = QuadSum(mass[i]);
      slope[i] = QuadSum(slope[i]);
    }
    if constexpr (kSplit > 1) {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (lane % 4 == 0) {
          team.newton[slot][warp][lane / 4 + 8 * i] = make_float2(mass[i], slope[i]);
        }
      }
      Sync();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mass[i] = slope[i] = 0.0f;
#pragma unroll
        for (int other = 0; other < kSplit; ++other) {
          const float2 sums = team.newton[slot][other][lane / 4 + 8 * i];
          mass[i] += sums.x;
          slope[i] += sums.y;
        }
      }
    }
  }

  // Threshold to memory; for the stores of the team: which rows are NaN.
  __device__ __forceinline__ void FinishThreshold() {
    const int lane = threadIdx.x % 32;
    if (kSplit == 1) __syncwarp();  // The warp may still be storing rows of the strip before.
    if (warp == 0 && lane % 4 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const KeyRange range = KeyRange::Of(call.problem, part, Row(i));
        const bool empty = range.end <= range.first;
        const float tau = empty ? NAN : fmaf(coefficient, maximum[i], threshold[i]);
        team.invalid[lane / 4 + 8 * i] = !empty && isnan(tau) ? NAN : 0.0f;
        if (Row(i) < end_row) {
          StoreThreshold(call, part.batch, head, part.first_query + Row(i), tau);
        }
      }
    }
    __syncwarp();
  }
};

}  // namespace flash_entmax::cuda::forward

#endif  // FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_STRIP_CUH_
