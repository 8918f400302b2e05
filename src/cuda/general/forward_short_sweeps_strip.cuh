// What one warp of the sweeping short forward kernel does with its 32 queries: scores, threshold,
// products, stores. forward_short_sweeps.cuh has the algorithm and the kernel.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_STRIP_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_STRIP_CUH_

#include "general/forward_common.cuh"

namespace flash_entmax::cuda::forward {

// Rows of 32 or 64 elements of 16 bits in shared memory without padding. The 16-byte pieces of a
// row are permuted, so that eight rows of ldmatrix, and accumulators stored by a warp, meet no bank
// conflicts. Rows and pieces that differ by an exclusive or have addresses that differ by one, if
// the tile starts at a multiple of 128 bytes.
template <class Element, int kColumns>
struct SwizzledTile {
  static_assert(sizeof(Element) == 2 && (kColumns == 32 || kColumns == 64));
  static constexpr int kPieces = kColumns / 8;
  static constexpr int kRowBytes = 2 * kColumns;

  Element* data;

  __device__ __forceinline__ Element* At(int row, int column) const {
    const int piece = (column / 8) ^ (row / (8 / kPieces) % kPieces);
    return data + row * kColumns + piece * 8 + column % 8;
  }
};

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
template <bool kTransposed>
__device__ __forceinline__ void LoadMatrices(uint32_t address, uint32_t (&x)[4]) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
  }
}

__device__ __forceinline__ void StoreShared(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
__device__ __forceinline__ float LoadShared(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}

// Within a few units in the last place.
__device__ __forceinline__ float SquareRoot(float x) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}

// The same number; what is computed from it is computed here. The compiler would otherwise take
// addresses out of the loop over strips, and they would occupy registers through all sweeps.
__device__ __forceinline__ int ComputeHere(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// How a launch of the sweeping kernel covers the problem.
struct SweepPlan {
  int warps = 0;     // of a block
  int turns = 1;     // strips of 32 queries for each warp
  int key_rows = 0;  // keys in shared memory, at most
  int tiles = 0;     // blocks a head

  FLASH_ENTMAX_HOST_DEVICE int BlockRows() const { return 32 * warps * turns; }
};

template <int kHeadDim>
struct SweepShape {
  static constexpr int kStrips = 2;  // of 16 queries, that a warp works on together
  static constexpr int kQueries = kStripRows * kStrips;
  static constexpr int kMostBlocks = 32;  // of 16 keys that a strip sees: the bits of a word
  // Registers of a thread: 128, or 168 where the sums of an output row take more of them.
  static constexpr int kMaxThreads = kHeadDim == 32 ? 256 : 384;
  static constexpr int kMinBlocks = kHeadDim == 32 ? 2 : 1;
  // Keys that a thread can list for two rows together, and entries of one row that it can hold.
  static constexpr int kSlots = 24;
  static constexpr int kHeld = 16;
  // Of a warp: its lists; before and after them its queries and output rows.
  static constexpr int kWarpBytes = kStrips * kSlots * 32 * static_cast<int>(sizeof(float));
  static_assert(kWarpBytes >= kQueries * kHeadDim * 2 && kWarpBytes % 128 == 0);

  static constexpr size_t Bytes(const SweepPlan& plan) {
    return static_cast<size_t>(2 * plan.key_rows) * kHeadDim * 2 +
           static_cast<size_t>(plan.warps) * kWarpBytes;
  }
};

// A warp's 32 queries. A thread has four of the rows, lane / 4 + 8 i; `i` always counts these.
// kFast: alpha = 1.5, and z is a positive multiple of the dot product.
template <class Element, int kHeadDim, bool kFast>
struct SweepStrip {
  using M = Mma<Element>;
  using Shape = SweepShape<kHeadDim>;
  using Tile = SwizzledTile<Element, kHeadDim>;
  static constexpr int kStrips = Shape::kStrips;
  static constexpr int kRows = 2 * kStrips;
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kTiles = kHeadDim / 8;  // accumulators of the output of 16 queries
  static constexpr int kSums = kStrips * kTiles;
  static constexpr int kGroups = 8;  // of a row's keys, for each thread: a maximum each

  const GeneralForward& call;
  const SequencePart& part;
  AlphaCurve curve;
  int head;
  float* own;                 // shared memory of the warp
  float coefficient;          // z = coefficient * score
  float inverse_coefficient;  // 1 / coefficient

  int first_row;               // of the strip, in the sequence
  int end_row;                 // rows from here on are not this block's
  int first_key;               // of the strip's blocks of keys, in the sequence
  int blocks;                  // of 16 keys, an even number
  uint32_t hits;               // blocks that may hold a positive probability
  int clear_first, clear_end;  // keys that every row of the strip sees, counted from first_key
  int end[kRows];              // of the row's keys, counted from the thread's first key
  float factor[kRows];         // of the dot product; only if not kFast
  float maximum[kRows], threshold[kRows];
  typename M::A query[kStrips][kSteps];
  uint32_t key_address, value_address;  // of the lane's row in the first block

  static __device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ int Row(int i) const {
    return first_row + ComputeHere(Lane()) / 4 + 8 * i;
  }

  // Places the strip that starts at `strip_row`. `base`: the sequence's key in the first row of the
  // tiles. Its queries must lie in the warp's shared memory.
  __device__ __forceinline__ void Place(int strip_row, int base, const Tile& key,
                                        const Tile& value) {
    const GeneralProblem& problem = call.problem;
    const int lane = ComputeHere(Lane());
    first_row = strip_row;
    const KeyRange top = KeyRange::Of(problem, part, strip_row);
    const KeyRange bottom =
        KeyRange::Of(problem, part, min(strip_row + Shape::kQueries, end_row) - 1);
    const int tile_row = max(top.first - base, 0) / 32 * 32;
    first_key = base + tile_row;
    blocks = bottom.end > top.first
                 ? min((bottom.end - first_key + 31) / 32 * 2, int{Shape::kMostBlocks})
                 : 0;
    clear_first = bottom.first - first_key;
    clear_end = top.end - first_key;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      end[i] = KeyRange::Of(problem, part, Row(i)).end - first_key - lane % 4 * 2;
      if constexpr (!kFast) {
        factor[i] = RowScore::Of(problem, part, head, curve.order, Row(i)).factor;
      }
    }
    key_address = SharedAddress(key.At(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8)) +
                  tile_row * Tile::kRowBytes;
    value_address = SharedAddress(value.At(lane % 16, lane / 16 * 8)) + tile_row * Tile::kRowBytes;
    const uint32_t query_address =
        SharedAddress(Tile{reinterpret_cast<Element*>(own)}.At(lane % 16, lane / 16 * 8));
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        LoadMatrices<false>((query_address ^ (step * 32)) + strip * kStripRows * Tile::kRowBytes,
                            query[strip][step].x);
      }
    }
    __syncwarp();  // The lists may take the place of the queries.
  }

  // Scores of 16 keys: z, or what it is proportional to; -inf for hidden keys.
  __device__ __forceinline__ void ComputeScores(int block, float (&score)[kStrips][2][4]) const {
#pragma unroll
    for (int e = 0; e < 8 * kStrips; ++e) score[e / 8][e / 4 % 2][e % 4] = 0.0f;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t x[4];
      LoadMatrices<false>((key_address ^ (step * 32)) + block * 16 * Tile::kRowBytes, x);
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
        M::Multiply(query[strip][step], {x[0], x[1]}, score[strip][0]);
        M::Multiply(query[strip][step], {x[2], x[3]}, score[strip][1]);
      }
    }
    const int first = 16 * block;
    if constexpr (!kFast) {
      const int key = first_key + first + Lane() % 4 * 2;
      const float slope = call.problem.slopes ? call.problem.slopes[head] : 0.0f;
#pragma unroll
      for (int e = 0; e < 8 * kStrips; ++e) {
        const int i = e / 8 * 2 + e / 2 % 2;
        const RowScore rule{factor[i], curve.order, call.problem.softcap, slope,
                            Row(i) + part.keys - part.queries};
        float& s = score[e / 8][e / 4 % 2][e % 4];
        s = rule.Z(s, key + e / 4 % 2 * 8 + e % 2);
      }
    }
    if (first + 16 > clear_end) {
#pragma unroll
      for (int e = 0; e < 8 * kStrips; ++e) {
        if (e / 4 % 2 * 8 + e % 2 >= end[e / 8 * 2 + e / 2 % 2] - first) {
          score[e / 8][e / 4 % 2][e % 4] = -INFINITY;
        }
      }
    }
    if (first < clear_first) {
      const int key = first_key + first + Lane() % 4 * 2;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int first_seen = KeyRange::Of(call.problem, part, Row(i)).first - key;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (e / 2 * 8 + e % 2 < first_seen) score[i / 2][e / 2][i % 2 * 2 + e % 2] = -INFINITY;
        }
      }
    }
  }

  // Calls body(score, i) for all scores of a block; i is a constant.
  template <class Body>
  static __device__ __forceinline__ void ForScores(float (&score)[kStrips][2][4], Body body) {
#pragma unroll
    for (int e = 0; e < 8 * kStrips; ++e) {
      body(score[e / 8][e / 4 % 2][e % 4], e / 8 * 2 + e / 2 % 2);
    }
  }

  // Calls body(weights) with the curve of this head.
  template <class Body>
  __device__ __forceinline__ void WithCurve(Body body) const {
    if constexpr (kFast) {
      body(Weights<Alpha::kOneAndHalf>{});
    } else {
      WithMode(curve, body);
    }
  }

  // The threshold of every row: in `maximum` and `threshold`, see Excess.
  __device__ __forceinline__ void Solve() {
    StartFromGroups();
    if (SolveLists()) return;
    hits = blocks == 32 ? ~0u : (1u << blocks) - 1;
#pragma unroll 1
    for (int pass = 0; pass < kMaxPasses; ++pass) {
      float mass[kRows] = {}, slope[kRows] = {};
#pragma unroll 1
      for (int block = 0; block < blocks; ++block) {
        float score[kStrips][2][4];
        ComputeScores(block, score);
        WithCurve([&](const auto& weights) {
          ForScores(score, [&](float s, int i) {
            AddKey(weights, Excess(coefficient, s - maximum[i], threshold[i]), &mass[i], &slope[i]);
          });
        });
      }
      if (!Advance(16 * blocks, mass, slope)) break;
    }
  }

  // Sums of x[i] over the four lanes that share the rows, row i's in the lane with lane % 4 == i.
  static __device__ __forceinline__ float SumRows(const float (&x)[kRows]) {
    const bool upper = Lane() & 2, odd = Lane() & 1;
    float y[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      y[i] = (upper ? x[i + 2] : x[i]) + __shfl_xor_sync(kWarp, upper ? x[i] : x[i + 2], 2);
    }
    return (odd ? y[1] : y[0]) + __shfl_xor_sync(kWarp, odd ? y[0] : y[1], 1);
  }

  // One step of Newton from every thread's sums. Four lanes have four rows together, so each does
  // the step of one of them. body(weights, mass, slope, step) sees the sums of this row.
  template <class Body>
  __device__ __forceinline__ void Step(const float (&mass)[kRows], const float (&slope)[kRows],
                                       Body body) {
    const float own_mass = SumRows(mass), own_slope = SumRows(slope);
    float delta;
    WithCurve([&](const auto& weights) {
      if constexpr (kFast) {
        // As Weights::Step. This form keeps its relative accuracy with an approximate root.
        const float root = SquareRoot(own_mass);
        delta = __fdividef((own_mass - 1.0f) * root, (1.0f + root) * own_slope);
      } else {
        delta = weights.Step(own_mass, own_slope);
      }
      body(weights, own_mass, own_slope, delta);
    });
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      threshold[i] += __shfl_sync(kWarp, delta, Lane() / 4 * 4 + i);
    }
  }

  // The same towards the threshold itself; whether some row of the warp is unsettled. `keys`: the
  // most that a row may have.
  __device__ __forceinline__ bool Advance(int keys, const float (&mass)[kRows],
                                          const float (&slope)[kRows]) {
    bool unsettled = false;
    // A row without a distribution steps to NaN, which is settled.
    Step(mass, slope, [&](const auto& weights, float own_mass, float own_slope, float delta) {
      unsettled = IsUnsettled(weights, own_mass, own_slope, delta, keys);
    });
    return __any_sync(kWarp, unsettled);
  }

  // First sweep: the largest score and a lower bound of the threshold, from the maxima of disjoint
  // groups of keys.
  __device__ __forceinline__ void StartFromGroups() {
    float group[kRows][kGroups];
#pragma unroll
    for (int g = 0; g < kRows * kGroups; ++g) group[g / kGroups][g % kGroups] = -INFINITY;
#pragma unroll 1
    for (int block = 0; block < blocks; block += 2) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        float score[kStrips][2][4];
        ComputeScores(block + odd, score);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& largest = group[i][4 * odd + e];
            largest = MaxKeepNan(largest, score[i / 2][e / 2][i % 2 * 2 + e % 2]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      maximum[i] = group[i][0];
#pragma unroll
      for (int g = 1; g < kGroups; ++g) maximum[i] = MaxKeepNan(maximum[i], group[i][g]);
      maximum[i] = QuadMax(maximum[i]);
      // Rows past the end have scores too, of a query of zeros. They would fill the lists.
      if (Row(i) >= end_row) maximum[i] = NAN;
      threshold[i] = -1.0f;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) group[i][g] -= maximum[i];
    }
#pragma unroll 1
    for (int pass = 0; pass < 8; ++pass) {
      float mass[kRows] = {}, slope[kRows] = {};
      WithCurve([&](const auto& weights) {
#pragma unroll
        for (int g = 0; g < kRows * kGroups; ++g) {
          const int i = g % kRows;
          AddKey(weights, Excess(coefficient, group[i][g / kRows], threshold[i]), &mass[i],
                 &slope[i]);
        }
      });
      // A bound need not be sharp. Every iterate from the left is one. The error that is left is of
      // the order of the last step squared; alpha near 1 magnifies it.
      bool moved = false;
      Step(mass, slope, [&](const auto&, float, float, float delta) {
        moved = delta > (kFast ? 0.03f : 1e-3f);
      });
      if (!__any_sync(kWarp, moved)) break;
    }
  }

  // Second sweep, and Newton on what it finds. Keys above the bound, the only ones that can have a
  // positive probability, are listed by the thread that has their score: of its rows lane / 4 + 16
  // k from the first slot up, of lane / 4 + 8 + 16 k from the last slot down. False, with the
  // thresholds still the bounds, if some list is too long.
  __device__ __forceinline__ bool SolveLists() {
    constexpr int kSlots = Shape::kSlots, kHeld = Shape::kHeld;
    // Places in the lists are kept in bytes, so that one addition moves to the next.
    constexpr int kStep = 32 * static_cast<int>(sizeof(float));
    const auto end_of_list = [](int i) { return (i / 2 * kSlots + i % 2 * (kSlots - 1)) * kStep; };
    const int lists = static_cast<int>(SharedAddress(own + Lane()));
    int next[kRows];
    float cut[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      next[i] = lists + end_of_list(i);
      // The bound in units of the score, a little lower so that rounding leaves nothing out.
      cut[i] = fmaf(threshold[i] * inverse_coefficient, 1.00001f,
                    fmaf(fabsf(maximum[i]), -4e-7f, maximum[i]));
    }
    int before = kStrips * (kSlots - 1) * kStep;
    hits = 0;
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      float score[kStrips][2][4];
      ComputeScores(block, score);
#pragma unroll
      for (int i = 0; i < kRows; i += 2) {
        // A block may fill four slots from either end. Lists that meet are noticed afterwards.
        if (next[i + 1] - next[i] < 3 * kStep) cut[i] = cut[i + 1] = INFINITY;
      }
      ForScores(score, [&](float s, int i) {
        if (s > cut[i]) {
          StoreShared(next[i], s);
          next[i] += i % 2 == 0 ? kStep : -kStep;
        }
      });
      int room = 0;
#pragma unroll
      for (int i = 0; i < kRows; i += 2) room += next[i + 1] - next[i];
      if (__any_sync(kWarp, room != before)) hits |= 1u << block;
      before = room;
    }
    int entries[kRows], most = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int first = lists + end_of_list(i);
      entries[i] = (i % 2 == 0 ? next[i] - first : first - next[i]) / kStep;
    }
#pragma unroll
    for (int i = 0; i < kRows; i += 2) {
      const bool full = cut[i] == INFINITY || next[i + 1] < next[i] - kStep;
      most = max(most, full ? kSlots : max(entries[i], entries[i + 1]));
    }
    most = __reduce_max_sync(kWarp, most);
    if (most > kHeld) return false;

    float d[kRows][kHeld];
    // Calls body(d[i][e], i, e) for the thread's entries, by fours; the number of fours is that of
    // the warp.
    const auto for_entries = [&](auto body) {
#pragma unroll
      for (int four = 0; four < kHeld; four += 4) {
        if (four < most) {
#pragma unroll
          for (int e = 4 * four; e < 4 * four + 16; ++e) body(d[e % 4][e / 4], e % 4, e / 4);
        }
      }
    };
    for_entries([&](float& x, int i, int e) {
      x = -INFINITY;
      if (e < entries[i]) {
        x = LoadShared(lists + end_of_list(i) + (i % 2 == 0 ? e : -e) * kStep) - maximum[i];
      }
    });
#pragma unroll 1
    for (int pass = 0; pass < kMaxPasses; ++pass) {
      float mass[kRows] = {}, slope[kRows] = {};
      WithCurve([&](const auto& weights) {
        for_entries([&](float x, int i, int) {
          AddKey(weights, Excess(coefficient, x, threshold[i]), &mass[i], &slope[i]);
        });
      });
      if (!Advance(4 * most, mass, slope)) break;
    }
    return true;
  }

  // Third sweep, over the blocks that matter: sums of weight * V; weights are p, or u for the
  // weighted mean. `slope`: sum of u. Plain: Values::kAll.
  template <bool kMean, bool kPlain>
  __device__ __forceinline__ void AddValues(Values values, float (&sums)[kSums][4],
                                            float (&slope)[kRows]) {
    if (kPlain) values = Values::kAll;
#pragma unroll
    for (int i = 0; i < 4 * kSums; ++i) sums[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) slope[i] = 0.0f;
#pragma unroll 1
    for (uint32_t left = hits; left != 0; left &= left - 1) {
      const int block = __ffs(left) - 1;
      float weight[kStrips][2][4];
      ComputeScores(block, weight);
      WithCurve([&](const auto& weights) {
        ForScores(weight, [&](float& s, int i) {
          const float excess = Excess(coefficient, s - maximum[i], threshold[i]);
          float p = excess * excess, u = excess;
          if constexpr (!kFast) weights.Of(excess, &p, &u);
          if constexpr (kMean) slope[i] += u;
          s = M::kWeightScale * (kMean ? u : p);
        });
      });
      typename M::A a[kStrips];
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
        if constexpr (!kPlain) SelectWeights(values, weight[strip]);
        a[strip] = M::FromAccumulators(weight[strip][0], weight[strip][1]);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        uint32_t x[4];
        LoadMatrices<true>((value_address ^ (tile * 16)) + block * 16 * Tile::kRowBytes, x);
        typename M::B low{x[0], x[1]}, high{x[2], x[3]};
        if (values != Values::kAll) {
          SelectValues<Element>(values, &low);
          SelectValues<Element>(values, &high);
        }
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
          M::Multiply(a[strip], low, sums[strip * kTiles + tile]);
          M::Multiply(a[strip], high, sums[strip * kTiles + tile + 1]);
        }
      }
    }
  }

  // Output rows and thresholds, or rows of the weighted mean.
  template <bool kMean>
  __device__ __forceinline__ void StoreProduct() {
    float sums[kSums][4], slope[kRows];
    AddValues<kMean, true>(Values::kAll, sums, slope);
    InfiniteSums<4 * kSums> infinite;
    const bool redo = __any_sync(kWarp, InfiniteSums<4 * kSums>::AnyNotFinite(sums));
    Values values = infinite.Next(Values::kAll, redo, sums);
#pragma unroll 1
    while (values != Values::kAll) {
      AddValues<kMean, false>(values, sums, slope);
      values = infinite.Next(values, redo, sums);
    }

    // Rows pass through the warp's shared memory, which makes their stores wide.
    const int lane = ComputeHere(Lane());
    const Tile rows{reinterpret_cast<Element*>(own)};
    __syncwarp();  // The warp may still be reading lists, or the rows of the other result.
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float scale = 1.0f / M::kWeightScale;
      if constexpr (kMean) {
        const float total = QuadSum(slope[i]);
        scale = total > 0.0f ? __fdividef(scale, total) : 0.0f;
      }
      const float tau = fmaf(coefficient, maximum[i], threshold[i]);
      const KeyRange range = KeyRange::Of(call.problem, part, Row(i));
      const bool empty = range.end <= range.first;
      if (!empty && isnan(tau)) scale = NAN;
      if (!kMean && lane % 4 == 0 && Row(i) < end_row) {
        StoreThreshold(call, part.batch, head, part.first_query + Row(i), empty ? NAN : tau);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const float* const pair = &sums[i / 2 * kTiles + tile][i % 2 * 2];
        *reinterpret_cast<uint32_t*>(rows.At(lane / 4 + 8 * i, 8 * tile + lane % 4 * 2)) =
            M::Pack(pair[0] * scale, pair[1] * scale);
      }
    }
    __syncwarp();
    StoreRows(rows, ResultRows<Element>::Of(call, kMean, part.batch, head));
  }

  // Four columns of a row for each lane at a time.
  __device__ __forceinline__ void StoreRows(const Tile& rows,
                                            const ResultRows<Element>& result) const {
    constexpr int kPieces = kHeadDim / 4, kRowsAtOnce = 32 / kPieces;
    const int lane = ComputeHere(Lane());
    const int column = lane % kPieces * 4;
    const int columns = call.problem.value_dim;
#pragma unroll 4
    for (int first = 0; first < Shape::kQueries; first += kRowsAtOnce) {
      const int row = first + lane / kPieces;
      const Element* const source = rows.At(row, column);
      if (first_row + row >= end_row) continue;
      Element* const destination =
          result.data + (part.first_query + first_row + row) * result.row_stride;
      if (result.vectors && column + 4 <= columns) {
        *reinterpret_cast<uint2*>(destination + column) = *reinterpret_cast<const uint2*>(source);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (column + e < columns) destination[(column + e) * result.column_stride] = source[e];
        }
      }
    }
  }
};

}  // namespace flash_entmax::cuda::forward

#endif  // FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_STRIP_CUH_
