// Forward for rows of any length.
//
// A block owns 64 queries of one head (32 for float rows of 256), a warp a strip of 16. Tiles of
// keys, only those that some row of the block sees, stream through a ring of three tiles in shared
// memory, several times; S is made anew on tensor cores each time and never stored:
//   1. maxima   of the row and of 32 (16 for float rows of 256) disjoint groups of its keys; the
//               threshold of the group maxima is a lower bound of the row's own, close to it;
//   2. sums     mass and slope at the present threshold, one Newton step from the left each, until
//               all rows of the block are settled: 2 to 4 passes;
//   3. output   O = P.V, and with a backward to come once more for the mean of V under
//               u = p^(2 - alpha).
// Every pass of the second kind marks the tiles in which some row has a key above its threshold.
// Thresholds only rise, so a tile without such a key is zero for good and no later pass loads it.
// In a head with an ALiBi slope pass 1 begins with the tiles around the diagonal. They give every
// row a bound, with which most other tiles are proved zero before their product (tile_bounds.cuh):
// what remains is as wide as the slope reaches, however long the row is.
// Memory traffic per block: queries once, keys 4 to 6 times (tiles proved zero: twice or less) and
// values once or twice, mostly from L2; each output row is written once. Blocks of one head run
// side by side, those with the most keys first.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_FORWARD_TILED_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_FORWARD_TILED_CUH_

#include "general/forward_key_tiles.cuh"

namespace flash_entmax::cuda::forward {

// A warp's strip of queries. kFast: alpha = 1.5, and z is a positive multiple of the dot product.
template <class Element, int kHeadDim, bool kFast>
struct TiledStrip {
  using M = Mma<Element>;
  using Shape = TiledShape<Element, kHeadDim>;
  using Tile = SharedTile<Element, kHeadDim>;
  static constexpr int kTileKeys = Shape::kTileKeys;
  static constexpr int kTiles = kTileKeys / 8;  // accumulators of a strip's scores
  static constexpr int kSteps = kHeadDim / M::kDepth;
  static constexpr bool kHoldQuery = M::kDepth == 16 && kSteps <= 4;
  static constexpr int kStepsAtOnce = kHoldQuery ? kSteps : M::kDepth == 16 ? 4 : 2;
  static constexpr int kGroups = kTileKeys / 4 < 8 ? kTileKeys / 4 : 8;  // of a thread, a row

  const GeneralForward& call;
  const SequencePart& part;
  AlphaCurve curve;
  int head;
  Tile query;          // of the block
  int query_row;       // the strip's first row of it
  int first_of_block;  // the block's first row, in the sequence
  int row;             // the thread's first row, in the sequence; the other one is row + 8

  KeyRange range[2];           // of the thread's rows
  int first_key, end_key;      // keys that some row of the strip sees
  int clear_first, clear_end;  // keys that every row of the strip sees
  float coefficient;           // z = coefficient * score
  float slope;
  float factor[2];  // (alpha - 1) scale query_scale
  float maximum[2], threshold[2];
  typename M::A held[kHoldQuery ? kSteps : 1];

  __device__ __forceinline__ void Place(int strip_row) {
    const GeneralProblem& problem = call.problem;
    row = strip_row + threadIdx.x % 32 / 4;
    first_key = end_key = clear_first = clear_end = 0;
    if (strip_row < part.queries) {
      const KeyRange top = KeyRange::Of(problem, part, strip_row);
      const KeyRange bottom =
          KeyRange::Of(problem, part, min(strip_row + kStripRows, part.queries) - 1);
      first_key = top.first;
      end_key = bottom.end;
      clear_first = bottom.first;
      clear_end = top.end;
    }
    coefficient = kFast ? curve.order * problem.scale : 1.0f;
    slope = kFast ? 0.0f : SlopeOf(problem, head);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      range[i] = KeyRange::Of(problem, part, row + 8 * i);
      if constexpr (!kFast) factor[i] = curve.order * FactorOf(problem, part, head, row + 8 * i);
    }
    if constexpr (kHoldQuery) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) held[step] = M::LoadRowsA(query, query_row, step);
    }
  }

  // Positions of the block's rows.
  __device__ __forceinline__ int FirstPosition() const {
    return first_of_block + part.keys - part.queries;
  }
  __device__ __forceinline__ int LastPosition() const {
    return min(FirstPosition() + Shape::kRows, part.keys) - 1;
  }

  __device__ __forceinline__ bool Sees(int first) const {
    return first < end_key && first + kTileKeys > first_key;
  }

  // Calls body(score, i) for all scores of the thread; i says which of its two rows.
  template <class Body>
  static __device__ __forceinline__ void ForScores(float (&score)[kTiles][4], Body body) {
#pragma unroll
    for (int e = 0; e < 4 * kTiles; ++e) body(score[e / 4][e % 4], e / 2 % 2);
  }

  // Scores of the tile of keys that starts at key `first`: z, or what it is proportional to; -inf
  // for hidden keys.
  __device__ __forceinline__ void ComputeScores(const Tile& key, int first,
                                                float (&score)[kTiles][4]) const {
    constexpr bool kFromZero = kStepsAtOnce == kSteps;
    if constexpr (!kFromZero) ForScores(score, [](float& s, int) { s = 0.0f; });
#pragma unroll(kStepsAtOnce)
    for (int step = 0; step < kSteps; ++step) {
      typename M::A a;
      if constexpr (kHoldQuery) {
        a = held[step];
      } else {
        a = M::LoadRowsA(query, query_row, step);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        typename M::B low, high;
        M::LoadRowsB2(key, tile * 8, step, &low, &high);
        MultiplyStep<M>(kFromZero && step == 0, a, low, score[tile]);
        MultiplyStep<M>(kFromZero && step == 0, a, high, score[tile + 1]);
      }
    }
    const auto key_of = [&](int e) {
      return first + e / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + e % 2;
    };
    if constexpr (!kFast) {
      ToZ<4 * kTiles>(
          call.problem, curve.order, slope, row + part.keys - part.queries - key_of(0),
          [&](int e) -> float& { return score[e / 4][e % 4]; },
          [&](int e) { return factor[e / 2 % 2]; },
          [](int e) { return 8 * (e / 2 % 2) - 8 * (e / 4) - e % 2; });
    }
    if (first < clear_first || first + kTileKeys > clear_end) {
#pragma unroll
      for (int e = 0; e < 4 * kTiles; ++e) {
        const KeyRange& seen = range[e / 2 % 2];
        if (key_of(e) < seen.first || key_of(e) >= seen.end) score[e / 4][e % 4] = -INFINITY;
      }
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

  // Passes 1 and 2: `maximum` and `threshold`, see Excess.
  __device__ __forceinline__ void Solve(KeyTiles<Element, kHeadDim>& keys) {
    StartFromGroups(keys);
#pragma unroll 1
    for (int pass = 0; pass < kMaxPasses; ++pass) {
      float mass[2] = {0.0f, 0.0f}, slope[2] = {0.0f, 0.0f};
      keys.StartMarking();
      keys.Visit([&](int tile, const Tile& key) {
        if (!Sees(keys.FirstKey(tile))) return;
        float score[kTiles][4];
        ComputeScores(key, keys.FirstKey(tile), score);
        // Sums of one tile first: less rounding in long rows.
        float tile_mass[2] = {0.0f, 0.0f}, tile_slope[2] = {0.0f, 0.0f};
        WithCurve([&](const auto& weights) {
          ForScores(score, [&](float s, int i) {
            AddKey(weights, Excess(coefficient, s - maximum[i], threshold[i]), &tile_mass[i],
                   &tile_slope[i]);
          });
        });
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mass[i] += tile_mass[i];
          slope[i] += tile_slope[i];
        }
        const bool positive = tile_slope[0] + tile_slope[1] > 0.0f;
        if (__any_sync(kWarp, positive) && threadIdx.x % 32 == 0) keys.Keep(tile);
      });
      bool unsettled = false;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mass[i] = QuadSum(mass[i]);
        slope[i] = QuadSum(slope[i]);
        WithCurve([&](const auto& weights) {
          const float delta = weights.Step(mass[i], slope[i]);
          threshold[i] += delta;
          unsettled |=
              IsUnsettled(weights, mass[i], slope[i], delta, range[i].end - range[i].first);
        });
      }
      const bool again = __syncthreads_or(unsettled);
      keys.FinishMarking();
      if (!again) break;
    }
  }

  // Pass 1: largest score, and a lower bound of the threshold from the maxima of disjoint groups.
  __device__ __forceinline__ void StartFromGroups(KeyTiles<Element, kHeadDim>& keys) {
    float group[2][kGroups];
#pragma unroll
    for (int g = 0; g < 2 * kGroups; ++g) group[g / kGroups][g % kGroups] = -INFINITY;
    // Ranges are found again where they are needed: registers are short in the loops.
    const bool skips = !kFast && call.key_norms != nullptr && keys.count > 0 &&
                       ScoreBound::Of(call.problem, curve.order, head).Skips();
    MarkedRange left{keys.begin, keys.end};
    if (skips) {
      const MarkedRange near = keys.NearDiagonal(FirstPosition(), LastPosition());
      keys.begin = near.begin;
      keys.end = near.end;
    }
    // All tiles; or those near the diagonal, then of what is left the ones before and after them.
#pragma unroll 1
    for (int part_of_pass = 0;; ++part_of_pass) {
      keys.Visit([&](int tile, const Tile& key) {
        if (!Sees(keys.FirstKey(tile))) return;
        float score[kTiles][4];
        ComputeScores(key, keys.FirstKey(tile), score);
#pragma unroll
        for (int e = 0; e < 4 * kTiles; ++e) {
          float& largest = group[e / 2 % 2][(e / 4 * 2 + e % 2) % kGroups];
          largest = MaxKeepNan(largest, score[e / 4][e % 4]);
        }
      });
      if (part_of_pass == 1) {
        const MarkedRange near = keys.NearDiagonal(FirstPosition(), LastPosition());
        keys.begin = max(near.end, left.begin);
        keys.end = left.end;
        continue;
      }
      SolveGroups(group, part_of_pass == 0);
      if constexpr (kFast) break;
      if (!skips || part_of_pass == 2) break;
      left = MarkPossible(keys);
      keys.begin = left.begin;
      keys.end = min(keys.NearDiagonal(FirstPosition(), LastPosition()).begin, left.end);
    }
    keys.begin = left.begin;
    keys.end = left.end;
  }

  // Largest score so far, and Newton on the maxima of the groups. What an earlier call found is a
  // bound still, in units of the new maximum. A key below it counts nothing here, so that it makes
  // no difference whether its tile was left out: see kBoundMargin.
  __device__ __forceinline__ void SolveGroups(const float (&group)[2][kGroups], bool first) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = group[i][0];
#pragma unroll
      for (int g = 1; g < kGroups; ++g) largest = MaxKeepNan(largest, group[i][g]);
      largest = QuadMax(largest);
      // A threshold that is not a number yields to -1.
      threshold[i] =
          first ? -1.0f : fmaxf(coefficient * (maximum[i] - largest) + threshold[i], -1.0f);
      maximum[i] = largest;
    }
#pragma unroll 1
    for (int pass = 0; pass < 8; ++pass) {
      bool moved = false;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        WithCurve([&](const auto& weights) {
          float mass = 0.0f, slope = 0.0f;
#pragma unroll
          for (int g = 0; g < kGroups; ++g) {
            AddKey(weights, Excess(coefficient, group[i][g] - maximum[i], threshold[i]), &mass,
                   &slope);
          }
          const float delta = weights.Step(QuadSum(mass), QuadSum(slope));
          threshold[i] += delta;
          moved |= delta > 1e-3f;
        });
      }
      // A bound need not be sharp. Every iterate from the left is one.
      if (!__any_sync(kWarp, moved)) break;
    }
  }

  // Takes the marks off tiles whose keys all lie at least kBoundMargin below the bounds that
  // SolveGroups found for the rows of the block; returns the range that is left. The margin is what
  // rounding may take from a threshold in all later steps, with much to spare.
  static constexpr float kBoundMargin = 0x1p-16f;
  __device__ __forceinline__ MarkedRange MarkPossible(KeyTiles<Element, kHeadDim>& keys) const {
    float size = 0.0f, lowest = INFINITY;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int lane = static_cast<int>(threadIdx.x) % 32;
      const Element* const elements = query.At(query_row + lane / 4 + 8 * i, lane % 4 * 2);
      float squares = 0.0f;
#pragma unroll 4
      for (int column = 0; column < kHeadDim; column += 8) {
        const float x = static_cast<float>(elements[column]);
        const float y = static_cast<float>(elements[column + 1]);
        squares = fmaf(x, x, fmaf(y, y, squares));
      }
      squares = QuadSum(squares);
      if (range[i].end <= range[i].first) continue;
      const float own_size = fabsf(factor[i]) * NormBound(squares, kQueryNormSlack);
      const float own_bound = __fadd_rd(maximum[i], threshold[i] - kBoundMargin);
      size = fmaxf(size, isnan(own_size) ? INFINITY : own_size);
      lowest = fminf(lowest, isnan(own_bound) ? -INFINITY : own_bound);
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      size = fmaxf(size, __shfl_xor_sync(kWarp, size, step));
      lowest = fminf(lowest, __shfl_xor_sync(kWarp, lowest, step));
    }
    const float* const norms =
        call.key_norms + BoundGroups::Of(call.problem, part, head / call.problem.group, true);
    return keys.MarkPossible(ScoreBound::Of(call.problem, curve.order, head), size, lowest,
                             FirstPosition(), LastPosition(), norms);
  }

  // From scores to weights times kWeightScale: p, or u for the mean.
  __device__ __forceinline__ void Weigh(bool mean, float (&score)[kTiles][4],
                                        float (&slope)[2]) const {
    WithCurve([&](const auto& weights) {
      ForScores(score, [&](float& s, int i) {
        float p, u;
        weights.Of(Excess(coefficient, s - maximum[i], threshold[i]), &p, &u);
        slope[i] += u;
        s = M::kWeightScale * (mean ? u : p);
      });
    });
  }

  // Pass 3: output rows, or rows of the weighted mean.
  __device__ __forceinline__ void StoreProduct(bool mean, KeyTiles<Element, kHeadDim>& keys) {
    constexpr int kCount = kHeadDim / 2;
    float sums[kHeadDim / 8][4], slope[2];
    InfiniteSums<kCount> infinite;
    Values values = Values::kAll;
#pragma unroll 1
    do {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i / 4][i % 4] = 0.0f;
      slope[0] = slope[1] = 0.0f;
      float score[kTiles][4];
      bool any = false;  // a positive weight in this tile
      keys.Visit(
          [&](int tile, const Tile& key) {
            any = Sees(keys.FirstKey(tile));
            if (!any) return;
            ComputeScores(key, keys.FirstKey(tile), score);
            Weigh(mean, score, slope);
            bool positive = false;
            ForScores(score, [&](float s, int) { positive |= s > 0.0f; });
            any = __any_sync(kWarp, positive);
            SelectWeights(values, score);
          },
          true,
          [&](const Tile& value) {
            if (!any) return;
#pragma unroll
            for (int tile = 0; tile < kTiles; tile += 2) {
              AddWeightedValues<Element>(score[tile], score[tile + 1], value, tile * 8, 0, values,
                                         sums);
            }
          });
      bool redo = false;
      if (values == Values::kAll) {
        redo = __syncthreads_or(InfiniteSums<kCount>::AnyNotFinite(sums));
      }
      values = infinite.Next(values, redo, sums);
    } while (values != Values::kAll);
    Store(mean, sums, slope);
  }

  __device__ __forceinline__ void Store(bool mean, float (&sums)[kHeadDim / 8][4],
                                        const float (&slope)[2]) const {
    const int lane = threadIdx.x % 32;
    const ResultRows<Element> result = ResultRows<Element>::Of(call, mean, part.batch, head);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float tau = fmaf(coefficient, maximum[i], threshold[i]);
      const bool empty = range[i].end <= range[i].first;
      const float total = QuadSum(slope[i]);
      float factor = 1.0f / M::kWeightScale;
      if (mean) factor = total > 0.0f ? __fdividef(factor, total) : 0.0f;
      if (!empty && isnan(tau)) factor = NAN;
      const int own_row = row + 8 * i;
      if (own_row >= part.queries) continue;
      if (!mean && lane % 4 == 0) {
        StoreThreshold(call, part.batch, head, part.first_query + own_row, empty ? NAN : tau);
      }
      Element* const destination = result.data + (part.first_query + own_row) * result.row_stride;
#pragma unroll
      for (int tile = 0; tile < kHeadDim / 8; ++tile) {
        const float x[2] = {sums[tile][2 * i] * factor, sums[tile][2 * i + 1] * factor};
        StoreColumns<2>(destination, result.column_stride, 8 * tile + 2 * (lane % 4),
                        call.problem.value_dim, result.vectors, x);
      }
    }
  }
};

template <class Element, int kHeadDim, bool kFast>
__global__ void __launch_bounds__((TiledShape<Element, kHeadDim>::kThreads),
                                  (TiledShape<Element, kHeadDim>::MinBlocks(kFast)))
    TiledForwardKernel(const __grid_constant__ GeneralForward call, const int tiles) {
  using Shape = TiledShape<Element, kHeadDim>;
  using Tile = SharedTile<Element, kHeadDim>;
  const GeneralProblem& problem = call.problem;
  const int head = blockIdx.x / tiles;
  const int tile = tiles - 1 - static_cast<int>(blockIdx.x % tiles);
  const TilePlace place = PlaceTile<false>(problem, tile, Shape::kRows);
  const SequencePart& part = place.part;
  if (place.first >= part.queries) return;
  const int last = min(place.first + Shape::kRows, part.queries) - 1;

  extern __shared__ __align__(16) unsigned char shared[];
  const Tile query{reinterpret_cast<Element*>(shared)};
  const Tile ring{query.At(Shape::kRows, 0)};
  auto* const marks = reinterpret_cast<uint32_t*>(ring.At(Shape::kSlots * Shape::kTileKeys, 0));

  LoadSharedTile<Element, kHeadDim, Shape::kRows, Shape::kThreads>(
      query, call.query.Row<const Element>(part.batch, head, part.first_query), call.query.row,
      call.query.column, place.first, part.queries, problem.head_dim, call.query.vectors);
  CommitCopies();
  const int kv_head = head / problem.group;
  KeyTiles<Element, kHeadDim> keys{
      call,
      call.key.Row<const Element>(part.batch, kv_head, part.first_key),
      call.value.Row<const Element>(part.batch, kv_head, part.first_key),
      part.keys,
      ring,
      marks};
  keys.SeeKeys(KeyRange::Of(problem, part, place.first).first,
               KeyRange::Of(problem, part, last).end);
  WaitCopies<0>();
  __syncthreads();

  const int warp = __shfl_sync(kWarp, static_cast<int>(threadIdx.x) / 32, 0);
  TiledStrip<Element, kHeadDim, kFast> strip{
      call, part, AlphaCurve::Of(problem, head), head, query, warp * kStripRows, place.first};
  strip.Place(place.first + warp * kStripRows);
  strip.Solve(keys);
#pragma unroll 1
  for (int result = 0; result < (call.saved.weighted_value ? 2 : 1); ++result) {
    strip.StoreProduct(result == 1, keys);
  }
}

}  // namespace flash_entmax::cuda::forward

#endif  // FLASH_ENTMAX_CUDA_GENERAL_FORWARD_TILED_CUH_
