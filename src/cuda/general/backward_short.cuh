// Backward of short rows: the queries and keys of a head fit in one block's shared memory, which
// then makes all its gradients. Without a softcap and the gradient in alpha; heads that share keys
// take the other kernels. backward_rows.cuh has the formulas.
//
// A warp takes 16 queries at a time and sweeps twice over the tiles of 16 keys that they see:
//
//   1. S = Q.K^T, u, dP = dO.V^T; the sums over a row of u and u dP give delta, in fp32;
//   2. S and u again, X = dP - delta; dQ += (u X).K; p and c u X, where c is the query's
//      query_scale, go to shared memory, 16-bit.
//
// Then a warp takes 16 keys at a time: dV += p^T.dO, dK += (c u X)^T.Q. Seven products as in the
// tiled kernels, but loaded, stored and masked in one block instead of two, and delta needs no mean
// of V from the forward, which then neither makes nor stores it.
// Only pairs of tiles that see each other are kept; under a causal mask each warp gets about the
// same number of them.
//
// Memory: every input is read once and every gradient written once, in pieces of 16 bytes where
// rows begin at multiples of 16.
//
// NaN and infinities: where a weight is zero, its tile still multiplies it by what the other row
// holds. A block whose sums are not all finite does its head once more pair by pair, in fp32, with
// pairs of weight zero left out (backward_short_kernel.cuh). So also where fp16 overflows on the
// way.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_SHORT_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_SHORT_CUH_

#include "general/backward_tiles.cuh"
#include "general/forward_common.cuh"

namespace flash_entmax::cuda {

// One head.
template <class ElementType, int kColumns, Alpha kAlphaMode>
struct ShortBackward {
  using Element = ElementType;
  static constexpr int kHeadDim = kColumns;
  static constexpr Alpha kMode = kAlphaMode;
  static constexpr int kColumnTiles = kHeadDim / 8;
  using Product = Mma<Element>;
  static constexpr int kSteps = kHeadDim / Product::kDepth;
  using Tile = SharedTile<Element, kHeadDim>;
  using Scores = float[2][4];              // 16 queries, twice 8 keys
  using Sums = float[1][kColumnTiles][4];  // as AllFinite takes them
  // In fp16 small probabilities would be subnormal: scaled up, they are normal from 2^-28 on.
  static constexpr float kWeightScale = Product::kWeightScale == 1.0f ? 1.0f : 16384.0f;
  static constexpr int kPairs = ShortBackwardPlan::kPairs;
  static_assert(Tile::Bytes(1) == ShortBackwardPlan::kRowBytes);

  const GeneralBackward& call;
  const ShortBackwardPlan& plan;
  int head;
  SequencePart part;
  Band band;  // of queries
  AlphaCurve curve;
  float drop;  // of z a unit of distance
  bool fused;  // the forward did not round z
  Tile query, gradient, key, value;
  Element* weights;          // p kWeightScale of pairs, tile after tile
  Element* score_gradients;  // c u X
  float* deltas;             // of the queries; only for the pass by pairs
  int* first_pair_tile;      // of each 16 queries

  __device__ __forceinline__ ShortBackward(const GeneralBackward& backward,
                                           const ShortBackwardPlan& sizes, void* shared)
      : call(backward), plan(sizes) {
    const GeneralProblem& problem = call.problem;
    head = static_cast<int>(blockIdx.x) % problem.heads;
    part = PartOf(problem, static_cast<int>(blockIdx.x) / problem.heads);
    band = Band::OfQueries(problem, part);
    curve = CurveOf<kMode>(problem, head);
    drop = -curve.order * SlopeOf(problem, head);
    fused = curve.mode == Alpha::kOneAndHalf && !problem.alpha_per_head && !problem.slopes &&
            !problem.query_scale && problem.scale > 0.0f;
    query.data = static_cast<Element*>(shared);
    gradient.data = query.At(plan.query_rows, 0);
    key.data = gradient.At(plan.query_rows, 0);
    value.data = key.At(plan.key_rows, 0);
    weights = value.At(plan.key_rows, 0);
    score_gradients = weights + plan.pair_tiles * kPairs;
    deltas = reinterpret_cast<float*>(score_gradients + plan.pair_tiles * kPairs);
    first_pair_tile = reinterpret_cast<int*>(deltas + plan.query_rows);
  }

  __device__ __forceinline__ void Load() const {
    const GeneralProblem& problem = call.problem;
    const auto load = [&](const Tile& tile, const StridedTensor& tensor, int rows, int real,
                          int columns) {
      forward::LoadRows(threadIdx.x, blockDim.x, tile, 0,
                        tensor.Row<const Element>(part.batch, head, 0), tensor, 0, rows, real,
                        columns);
    };
    load(query, call.query, plan.query_rows, part.queries, problem.head_dim);
    load(key, call.key, plan.key_rows, part.keys, problem.head_dim);
    load(gradient, call.output_gradient, plan.query_rows, part.queries, problem.value_dim);
    load(value, call.value, plan.key_rows, part.keys, problem.value_dim);
    CommitCopies();
    if (threadIdx.x == 0) {
      int tiles = 0;
      for (int first_row = 0; first_row < part.queries; first_row += 16) {
        const RowRange seen = TilesSeen(first_row);
        first_pair_tile[first_row / 16] = tiles - seen.first;
        tiles += seen.end - seen.first;
      }
    }
    WaitCopies<0>();
    __syncthreads();
  }

  // Calls body(tile) for the tiles of 16 rows of this warp. Those with the most pairs under a
  // causal mask are dealt first, the rest backwards, so that every warp has about as many.
  template <class Body>
  static __device__ __forceinline__ void ForOwnTiles(int tiles, bool last_first, Body body) {
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0);
    const int warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll 1
    for (int turn = 0; turn * warps < tiles; ++turn) {
      const int index = turn * warps + (turn % 2 == 0 ? warp : warps - 1 - warp);
      if (index < tiles) body(last_first ? tiles - 1 - index : index);
    }
  }
  // The tiles of 16 keys that some of 16 queries see.
  __device__ __forceinline__ RowRange TilesSeen(int first_query) const {
    const RowRange seen = band.SeenByAny(first_query, 16);
    if (seen.end <= seen.first) return {};
    return {seen.first / 16, (seen.end + 15) / 16};
  }
  __device__ __forceinline__ float Threshold(int row) const {
    // Rows past the end have no weights.
    return row < part.queries ? call.saved.threshold[FirstResult() + row] : INFINITY;
  }
  // Where results of the first row lie in arrays of a float a row.
  __device__ __forceinline__ int64_t FirstResult() const {
    return (static_cast<int64_t>(part.batch) * call.problem.heads + head) * call.problem.queries;
  }
  __device__ __forceinline__ Probability ProbabilityOf(float w) const {
    return Probability::Of<kMode>(w, curve.inverse - 1.0f);
  }
  // The pairs of 16 queries with 16 keys, whose first rows these are.
  __device__ __forceinline__ Element* PairTile(Element* pairs, int first_row, int first_key) const {
    return pairs + (first_pair_tile[first_row / 16] + first_key / 16) * kPairs;
  }
  // Where pairs with keys `column` (a multiple of 8 here) to column + 7 lie: 16 bytes, the two of a
  // query in an order that keeps those of eight queries in different banks.
  static __device__ __forceinline__ int PairOffset(int row, int column) {
    return row * 16 + (column ^ row / 4 % 2 * 8);
  }

  // 16 queries.
  struct QueryTile {
    int row;  // first one of the thread; the other one is 8 further
    typename Product::A query[kSteps], gradient[kSteps];
    float threshold[2];
    float query_scale[2];
    RowRange clear;  // keys that all 16 see
  };

  // c += rows . transpose of 16 rows of the tile; kFresh: c = this.
  template <bool kFresh = false>
  static __device__ __forceinline__ void AddDots(const typename Product::A (&rows)[kSteps],
                                                 const Tile& tile, int first, Scores& c) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      typename Product::B low, high;
      Product::LoadRowsB2(tile, first, step, &low, &high);
      MultiplyStep<Product>(kFresh && step == 0, rows[step], low, c[0]);
      MultiplyStep<Product>(kFresh && step == 0, rows[step], high, c[1]);
    }
  }
  static __device__ __forceinline__ int KeyOf(int first, int t, int e) {
    return first + 8 * t + static_cast<int>(threadIdx.x) % 4 * 2 + e % 2;
  }
  // i' - j of the thread's first pair; the others are Distance(t, e) away.
  __device__ __forceinline__ float FirstDistance(const QueryTile& tile, int first_key) const {
    return static_cast<float>(tile.row + part.keys - part.queries - KeyOf(first_key, 0, 0));
  }
  static __device__ __forceinline__ float Distance(float first, int t, int e) {
    return fabsf(first + static_cast<float>(8 * (e / 2) - 8 * t - e % 2));
  }
  template <class Body>
  static __device__ __forceinline__ void ForPairs(Body body) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) body(t, e);
    }
  }

  // The positive part of z - tau from dot products. Rounds as the forward does: what is far from
  // zero beside the excess would show otherwise.
  __device__ __forceinline__ void Excess(const QueryTile& tile, const Scores& dot, int first_key,
                                         Scores& w) const {
    const float factor[2] = {curve.order * (call.problem.scale * tile.query_scale[0]),
                             curve.order * (call.problem.scale * tile.query_scale[1])};
    if (fused) {
      ForPairs(
          [&](int t, int e) { w[t][e] = fmaf(factor[e / 2], dot[t][e], -tile.threshold[e / 2]); });
    } else {
      ForPairs([&](int t, int e) { w[t][e] = __fmul_rn(factor[e / 2], dot[t][e]); });
      if (drop != 0.0f) {
        const float first = FirstDistance(tile, first_key);
        ForPairs([&](int t, int e) { w[t][e] = fmaf(drop, Distance(first, t, e), w[t][e]); });
      }
      ForPairs([&](int t, int e) { w[t][e] -= tile.threshold[e / 2]; });
    }
    if (first_key < tile.clear.first || first_key + 16 > tile.clear.end) {
      ForPairs([&](int t, int e) {
        if (!band.Sees(tile.row + 8 * (e / 2), KeyOf(first_key, t, e))) w[t][e] = 0.0f;
      });
    }
    ForPairs([&](int t, int e) { w[t][e] = PositivePart(w[t][e]); });
  }

  // The gradients of all queries, and the pairs for KeyHalf. False if a sum was not finite.
  __device__ __forceinline__ bool QueryHalf() const {
    bool finite = true;
    ForOwnTiles((part.queries + 15) / 16, true,
                [&](int tile) { finite &= QueryGradients(16 * tile); });
    return finite;
  }

  __device__ __forceinline__ bool QueryGradients(int first_row) const {
    QueryTile tile;
    tile.row = first_row + static_cast<int>(threadIdx.x) % 32 / 4;
    tile.clear = band.SeenByAll(first_row, 16);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      tile.query[step] = Product::LoadRowsA(query, first_row, step);
      tile.gradient[step] = Product::LoadRowsA(gradient, first_row, step);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tile.threshold[half] = Threshold(tile.row + 8 * half);
      tile.query_scale[half] = QueryScaleOf(call.problem, part, head, tile.row + 8 * half);
    }
    const RowRange seen = TilesSeen(first_row);

    float u_sum[2] = {}, u_gradient[2] = {};
#pragma unroll 1
    for (int first_key = 16 * seen.first; first_key < 16 * seen.end; first_key += 16) {
      Scores dot, w, dp;
      AddDots<true>(tile.query, key, first_key, dot);
      Excess(tile, dot, first_key, w);
      AddDots<true>(tile.gradient, value, first_key, dp);
      ForPairs([&](int t, int e) {
        const float u = ProbabilityOf(w[t][e]).u;
        u_sum[e / 2] += u;
        u_gradient[e / 2] = fmaf(u, dp[t][e], u_gradient[e / 2]);
      });
    }
    float minus_delta[2], pair_factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = forward::QuadSum(u_sum[half]),
                  weighted = forward::QuadSum(u_gradient[half]);
      // A row that sees no key has the gradient 0, whatever its factor.
      minus_delta[half] = sum == 0.0f ? 0.0f : -weighted / sum;
      pair_factor[half] = sum == 0.0f ? 0.0f : tile.query_scale[half];
    }

    Sums query_sum = {};
    float product[2] = {}, distance[2] = {};  // sums of dS q.k and -dS |i' - j|
#pragma unroll 1
    for (int first_key = 16 * seen.first; first_key < 16 * seen.end; first_key += 16) {
      Scores dot, w, x;
      AddDots<true>(tile.query, key, first_key, dot);
      Excess(tile, dot, first_key, w);
      ForPairs([&](int t, int e) { x[t][e] = minus_delta[e / 2]; });
      AddDots(tile.gradient, value, first_key, x);
      ForPairs([&](int t, int e) {
        const auto [p, u] = ProbabilityOf(w[t][e]);
        w[t][e] = kWeightScale * p;
        x[t][e] *= u;
      });
      if (call.query_scale_rows) {
        ForPairs([&](int t, int e) { product[e / 2] = fmaf(x[t][e], dot[t][e], product[e / 2]); });
      }
      if (call.slope_rows) {
        const float first = FirstDistance(tile, first_key);
        ForPairs([&](int t, int e) {
          distance[e / 2] = fmaf(-x[t][e], Distance(first, t, e), distance[e / 2]);
        });
      }
      AddProduct(Product::FromAccumulators(x[0], x[1]), key, first_key, query_sum);
      KeepPairs(PairTile(weights, first_row, first_key), w, 1.0f, 1.0f);
      KeepPairs(PairTile(score_gradients, first_row, first_key), x, pair_factor[0], pair_factor[1]);
    }
    StoreRowResults(tile, product, distance);
    const float scale = call.problem.scale;
    StoreSums(query_sum, scale * pair_factor[0], scale * pair_factor[1], call.query_gradient,
              first_row, part.queries, call.problem.head_dim);
    // A score of -inf is in these sums with the weight 0.
    const float results = product[0] + product[1] + distance[0] + distance[1];
    return AllFinite(query_sum) && IsFinite(results);
  }

  // sum += 16 x 16 pairs . rows [first_row, first_row + 16) of a tile.
  static __device__ __forceinline__ void AddProduct(const typename Product::A& pairs,
                                                    const Tile& tile, int first_row, Sums& sum) {
#pragma unroll
    for (int c = 0; c < kColumnTiles; c += 2) {
      typename Product::B low, high;
      Product::LoadSumB2(tile, first_row, 8 * c, &low, &high);
      Product::Multiply(pairs, low, sum[0][c]);
      Product::Multiply(pairs, high, sum[0][c + 1]);
    }
  }

  static __device__ __forceinline__ void KeepPairs(Element* tile, const Scores& x, float upper,
                                                   float lower) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = half == 0 ? upper : lower;
        *reinterpret_cast<uint32_t*>(tile + PairOffset(lane / 4 + 8 * half, 8 * t) + lane % 4 * 2) =
            Product::Pack(factor * x[t][2 * half], factor * x[t][2 * half + 1]);
      }
    }
  }

  __device__ __forceinline__ void StoreRowResults(const QueryTile& tile, const float (&product)[2],
                                                  const float (&distance)[2]) const {
    if (!call.query_scale_rows && !call.slope_rows) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float of_scale = forward::QuadSum(product[half]),
                  of_slope = forward::QuadSum(distance[half]);
      const int row = tile.row + 8 * half;
      if (row < part.queries && threadIdx.x % 4 == 0) PutRowResults(row, of_scale, of_slope);
    }
  }
  __device__ __forceinline__ void PutRowResults(int row, float product, float distance) const {
    if (call.query_scale_rows) {
      call.query_scale_rows[FirstResult() + row] = call.problem.scale * product;
    }
    if (call.slope_rows) call.slope_rows[FirstResult() + row] = distance;
  }

  // Stores 16 rows of sums times a factor. Four lanes have a row together, each two of every eight
  // columns; they trade them for eight neighbouring ones each.
  __device__ __forceinline__ void StoreSums(const Sums& sum, float upper, float lower,
                                            const StridedTensor& tensor, int first_row, int rows,
                                            int columns) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, quarter = lane % 4;
    const bool vectors = tensor.vectors && columns % 8 == 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + lane / 4 + 8 * half;
      const float factor = half == 0 ? upper : lower;
      Element* const target = tensor.Row<Element>(part.batch, head, row);
#pragma unroll
      for (int c = 0; c < kColumnTiles; c += 4) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] =
              Product::Pack(factor * sum[0][c + i][2 * half], factor * sum[0][c + i][2 * half + 1]);
        }
        if (vectors) {
          TransposeInQuad(words);
          const int column = 8 * (c + quarter);
          if (row < rows && column < columns) {
            *reinterpret_cast<uint4*>(target + column) =
                make_uint4(words[0], words[1], words[2], words[3]);
          }
        } else if (row < rows) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int column = 8 * (c + i / 2) + 2 * quarter + i % 2;
            if (column < columns) {
              target[column * tensor.column] =
                  Element(factor * sum[0][c + i / 2][2 * half + i % 2]);
            }
          }
        }
      }
    }
  }
  // Word i of lane j becomes word j of lane i, in each group of four lanes.
  static __device__ __forceinline__ void TransposeInQuad(uint32_t (&words)[4]) {
#pragma unroll
    for (int step = 1; step <= 2; ++step) {
      const bool upper = threadIdx.x & step;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int low = step == 1 ? 2 * i : i, high = low + step;
        const uint32_t got = __shfl_xor_sync(kAllLanes, upper ? words[low] : words[high], step);
        if (upper) {
          words[low] = got;
        } else {
          words[high] = got;
        }
      }
    }
  }

  // The gradients of all keys and values. False if a sum was not finite.
  __device__ __forceinline__ bool KeyHalf() const {
    bool finite = true;
    // Keys past a key length have gradients too: zeros.
    ForOwnTiles((call.problem.keys + 15) / 16, false,
                [&](int tile) { finite &= KeyGradients(16 * tile); });
    return finite;
  }

  __device__ __forceinline__ bool KeyGradients(int first_key) const {
    Sums key_sum = {}, value_sum = {};
#pragma unroll 1
    for (int first_row = 0; first_row < part.queries; first_row += 16) {
      const RowRange seen = TilesSeen(first_row);
      if (first_key < 16 * seen.first || first_key >= 16 * seen.end) continue;
      AddProduct(LoadTransposed(PairTile(weights, first_row, first_key)), gradient, first_row,
                 value_sum);
      AddProduct(LoadTransposed(PairTile(score_gradients, first_row, first_key)), query, first_row,
                 key_sum);
    }
    const float scale = call.problem.scale;
    StoreSums(key_sum, scale, scale, call.key_gradient, first_key, call.problem.keys,
              call.problem.head_dim);
    constexpr float kInverse = 1.0f / kWeightScale;
    StoreSums(value_sum, kInverse, kInverse, call.value_gradient, first_key, call.problem.keys,
              call.problem.value_dim);
    return AllFinite(key_sum) && AllFinite(value_sum);
  }

  // 16 x 16 pairs with keys as rows.
  static __device__ __forceinline__ typename Product::A LoadTransposed(const Element* tile) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    return Product::LoadTransposedA(tile + PairOffset(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8));
  }
};

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_SHORT_CUH_
