// Backward of the general kernels, query side: dQ, and what each row adds to the gradients in
// alpha, ALiBi slope and query_scale. backward_columns.cuh is the key side: dK and dV.
//
// With u = p^(2 - alpha) on the support, dP = dO.V and delta the u-weighted mean of dP,
//
//   dS = u (dP - delta),   dR = dS cap'(f_i q.k),   f_i = scale query_scale_i,
//
//   dQ_i = f_i sum_j dR_ij K_j,   dK_j = sum_i f_i dR_ij Q_i,   dV_j = sum_i p_ij dO_i.
//
// delta_i = dO_i . (u-weighted mean of V), a mean that the forward saved; p and u come from the
// score and the saved threshold. Nothing else is needed, so every block works alone: a block here
// owns a tile of queries of one head and streams the tiles of keys they can see,
//
//   S = Q.K^T; no score above its threshold: done;  X = dO.V^T - delta;  dQ += (u X).K
//
// and a block of the key side owns a tile of keys of one key head and streams the queries of all
// heads of the group. Seven products a pair of tiles with support instead of five, and two without,
// but no atomics and no sums in global memory: results are the same in every run. Sums stay in
// registers, p and dS too: accumulators of one product are left operands of the next.
//
// Memory: each side reads its own tile once and the streamed tiles once a block, the latter from
// the L2 cache, as blocks of one head lie next to each other in the grid; each gradient is written
// once. Streamed tiles come by asynchronous copies, the next while the present one is used. In
// heads with an ALiBi slope only those are streamed that are not proved zero (backward_marks.cuh).
//
// NaN and infinities. Where a pair has weight zero, its tile still multiplies that zero by what the
// streamed row holds, and 0 * NaN is NaN. Blocks therefore look at their sums at the end; if one is
// not finite they run again with such elements of streamed rows cleared
// (BackwardVariant::kCareful). That loses nothing: a row with NaN or infinities in its query or in
// a key that it sees has the threshold NaN, so that its weights are NaN for all keys that it sees
// (unless the score is -inf: weight zero); one in dO or a value with weight makes delta so. Only
// the sums of dV need the cleared elements back (AddClearedGradients).
#ifndef FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_ROWS_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_ROWS_CUH_

#include "general/backward_marks.cuh"

namespace flash_entmax::cuda {

// Sums over a row for the optional results.
struct RowSums {
  float p_gradient = 0.0f;  // p X, with X = dP - delta in place of dP: the results do not change
  float u_gradient = 0.0f;  // u X
  float u = 0.0f;
  float entropy = 0.0f;           // h = -p log p
  float entropy_gradient = 0.0f;  // h X
  float distance = 0.0f;          // dS (-|i' - j|)
  float product = 0.0f;           // dR q.k
  float u_distance = 0.0f;        // the same two with u in place of dS
  float u_product = 0.0f;
};

// One warp's own queries.
template <class Variant>
struct QueryRows {
  using Shape = typename Variant::Shape;
  using Tile = typename Variant::Tile;
  using Own = typename Variant::Own;
  static constexpr int kRowTiles = Shape::kRowTiles;
  static constexpr int kTiles = Shape::kChunk / 8;
  using Scores = float[kRowTiles][kTiles][4];

  const GeneralBackward& call;
  AlphaCurve curve;
  const BlockPlace& place;
  int row;     // the first one, counted in the sequence; a thread has rows Row(m, half)
  int column;  // first of the gradient columns that this warp sums
  float slope;
  float gradient_scale;        // of dR, against overflow in fp16
  float factor[kRowTiles][2];  // scale * query_scale
  float threshold[kRowTiles][2];
  float minus_delta[kRowTiles][2];
  float sum[kRowTiles][Shape::kColumnTiles][4] = {};  // dQ gradient_scale / factor
  RowSums results[kRowTiles][2];

  __device__ __forceinline__ QueryRows(const GeneralBackward& backward,
                                       const BlockPlace& block_place, int first_row,
                                       int first_column, float scale_of_gradients)
      : call(backward),
        curve(CurveOf<Variant::kMode>(backward.problem, block_place.head)),
        place(block_place),
        row(first_row),
        column(first_column),
        slope(SlopeOf(backward.problem, block_place.head)),
        gradient_scale(scale_of_gradients) {
    const SequencePart part = place.part;
    const float* const saved = call.saved.threshold + FirstResult();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = Row(m, half);
        // Rows past the end have no weights.
        threshold[m][half] = r < part.queries ? saved[r] : __int_as_float(0x7f800000);
        if constexpr (Variant::kPlain) {
          factor[m][half] = call.problem.scale;
        } else {
          // A row that sees no key has the gradient 0, whatever its factor.
          const RowRange seen = place.band.SeenByAny(r, 1);
          factor[m][half] =
              seen.first < seen.end ? FactorOf(call.problem, part, place.head, r) : 0.0f;
        }
      }
    }
  }

  // Where results of the sequence's first row lie in arrays of a float a row.
  __device__ __forceinline__ int64_t FirstResult() const {
    const GeneralProblem& problem = call.problem;
    return (static_cast<int64_t>(place.part.batch) * problem.heads + place.head) * problem.queries +
           place.part.first_query;
  }
  __device__ __forceinline__ int Row(int m, int half) const {
    return row + 16 * m + 8 * half + static_cast<int>(threadIdx.x) % 32 / 4;
  }
  // The key of accumulator e of tile t.
  static __device__ __forceinline__ int Key(int chunk, int t, int e) {
    return chunk + 8 * t + 2 * (static_cast<int>(threadIdx.x) % 4) + e % 2;
  }
  // i' - j of the thread's first row and key of a chunk; the others are Distance(..) away.
  __device__ __forceinline__ int FirstDistance(int chunk) const {
    return Row(0, 0) + place.part.keys - place.part.queries - Key(chunk, 0, 0);
  }
  static __device__ __forceinline__ int Distance(int m, int t, int e) {
    return 16 * m + 8 * (e / 2) - 8 * t - e % 2;
  }

  // Adds what a streamed tile of keys, the first of them `first`, contributes.
  __device__ __forceinline__ void Add(const Own& query, const Own& gradient, const Tile& key,
                                      const Tile& value, const float* key_is_finite, int first) {
    const RowRange seen_by_any = place.band.SeenByAny(row, Shape::kWarpRows);
    const RowRange seen_by_all = place.band.SeenByAll(row, Shape::kWarpRows);
    const int begin = max(0, seen_by_any.first - first) / Shape::kChunk * Shape::kChunk;
    const int end = min(Shape::kStreamedRows, seen_by_any.end - first);
#pragma unroll 1
    for (int offset = begin; offset < end; offset += Shape::kChunk) {
      const int chunk = first + offset;
      const bool masked = chunk < seen_by_all.first || chunk + Shape::kChunk > seen_by_all.end;

      Scores dot;
      AddDotProducts<true>(query, key, offset, dot);
      Scores w;  // positive part of z - tau
      if (!Excess(dot, chunk, masked, key_is_finite + offset, w)) continue;

      Scores x;  // dP - delta, then dR
      ForAll(x, [&](int m, int t, int e) { x[m][t][e] = minus_delta[m][e / 2]; });
      AddDotProducts(gradient, value, offset, x);
      ScoreGradients(dot, w, chunk, x);
      AddWeightedRows(x, key, offset, column, sum);
    }
  }

  // True in all lanes if any weight of the warp is positive or NaN.
  __device__ __forceinline__ bool Excess(const Scores& dot, int chunk, bool masked,
                                         const float* key_is_finite, Scores& w) const {
    if constexpr (Variant::kPlain) {
      const float plain_factor = call.problem.scale * curve.order;
      ForAll(w, [&](int m, int t, int e) {
        w[m][t][e] = PlainProduct<Variant::kMode>(plain_factor, dot[m][t][e]);
      });
    } else {
      ForAll(w, [&](int m, int t, int e) { w[m][t][e] = dot[m][t][e]; });
      ToZ<4 * kTiles * kRowTiles, Variant::kAll>(
          call.problem, curve.order, slope, FirstDistance(chunk),
          [&](int i) -> float& { return w[i / (4 * kTiles)][i / 4 % kTiles][i % 4]; },
          [&](int i) { return curve.order * factor[i / (4 * kTiles)][i / 2 % 2]; },
          [](int i) { return Distance(i / (4 * kTiles), i / 4 % kTiles, i % 4); });
    }
    ForAll(w, [&](int m, int t, int e) { w[m][t][e] -= threshold[m][e / 2]; });
    if (masked) {
      const Band band = place.band;
      ForAll(w, [&](int m, int t, int e) {
        if (!band.Sees(Row(m, e / 2), Key(chunk, t, e))) w[m][t][e] = 0.0f;
      });
    }
    if constexpr (Variant::kCareful) {
      // With a threshold that is a number the score of such a key was -inf, before it was cleared.
      ForAll(w, [&](int m, int t, int e) {
        if (key_is_finite[Key(0, t, e)] == 0.0f && !isnan(w[m][t][e])) w[m][t][e] = 0.0f;
      });
    }
    return AnyPositive(w);
  }

  // Turns x = dP - delta into dR, and adds to the sums of the rows.
  __device__ __forceinline__ void ScoreGradients(const Scores& dot, const Scores& w, int chunk,
                                                 Scores& x) {
    if constexpr (!Variant::kPlain) {
      if ((Variant::kAll && (call.alpha_rows || call.slope_rows)) || call.query_scale_rows) {
        AddToResults(dot, w, chunk, x);
      }
      if (Variant::kAll && call.problem.softcap > 0.0f) {
        ForAll(x, [&](int m, int t, int e) { x[m][t][e] *= CapDerivativeOf(m, e, dot[m][t][e]); });
      }
    }
    ForAll(x, [&](int m, int t, int e) {
      if (Variant::kCareful && w[m][t][e] == 0.0f) {
        x[m][t][e] = 0.0f;
        return;
      }
      x[m][t][e] *= ProbabilityOf(w[m][t][e]).u;
      if constexpr (Variant::kCareful) x[m][t][e] *= gradient_scale;
    });
  }

  __device__ __forceinline__ Probability ProbabilityOf(float w) const {
    return Probability::Of<Variant::kMode>(w, curve.inverse - 1.0f);
  }
  __device__ __forceinline__ float CapDerivativeOf(int m, int e, float dot) const {
    return CapDerivative(call.problem.softcap, factor[m][e / 2], dot);
  }

  // Adds to the sums of the rows; x = dP - delta. A loop for each result, since most calls want at
  // most one. Where a score is not finite and its weight zero the sums become NaN, and the block
  // runs again, with care.
  __device__ __forceinline__ void AddToResults(const Scores& dot, const Scores& w, int chunk,
                                               const Scores& x) {
    const auto for_weights = [&](auto body) {
      ForAll(x, [&](int m, int t, int e) {
        if (Variant::kCareful && w[m][t][e] == 0.0f) return;
        body(m, t, e, ProbabilityOf(w[m][t][e]).u, results[m][e / 2]);
      });
    };
    for_weights([&](int m, int t, int e, float u, RowSums& sums) {
      sums.u += u;
      sums.u_gradient = fmaf(u, x[m][t][e], sums.u_gradient);
    });
    if (Variant::kAll && call.slope_rows) {
      const float origin = static_cast<float>(FirstDistance(chunk));
      for_weights([&](int m, int t, int e, float u, RowSums& sums) {
        const float distance = u * fabsf(origin + static_cast<float>(Distance(m, t, e)));
        sums.u_distance -= distance;
        sums.distance = fmaf(-distance, x[m][t][e], sums.distance);
      });
    }
    if (call.query_scale_rows) {
      const auto add = [&](bool capped) {
        for_weights([&](int m, int t, int e, float u, RowSums& sums) {
          float product = dot[m][t][e];
          if (capped) product *= CapDerivativeOf(m, e, dot[m][t][e]);
          sums.u_product = fmaf(u, product, sums.u_product);
          sums.product = fmaf(u * x[m][t][e], product, sums.product);
        });
      };
      if (Variant::kAll && call.problem.softcap > 0.0f) {
        add(true);
      } else {
        add(false);
      }
    }
    if (Variant::kAll && call.alpha_rows) {
      ForAll(x, [&](int m, int t, int e) {
        if (w[m][t][e] == 0.0f) return;
        AddToAlpha(w[m][t][e], ProbabilityOf(w[m][t][e]).p, x[m][t][e], &results[m][e / 2]);
      });
    }
  }

  __device__ __forceinline__ void AddToAlpha(float w, float p, float dp, RowSums* sums) const {
    // log p = log(w) / (alpha - 1).
    const float entropy = p == 0.0f ? 0.0f : -p * curve.inverse * logf(w);
    sums->p_gradient = fmaf(p, dp, sums->p_gradient);
    sums->entropy += entropy;
    sums->entropy_gradient = fmaf(entropy, dp, sums->entropy_gradient);
  }

  __device__ __forceinline__ bool ResultsAreFinite() const {
    float zero = 0.0f;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const RowSums& mine = results[m][half];
        zero = fmaf(mine.product + mine.u_product, 0.0f, zero);
        if (Variant::kAll) zero = fmaf(mine.distance + mine.entropy_gradient, 0.0f, zero);
      }
    }
    return zero == 0.0f;
  }
  // Optional results of the rows; call with all lanes.
  __device__ __forceinline__ void StoreResults() const {
    const int64_t first = FirstResult();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const RowSums& mine = results[m][half];
        const float p_gradient = QuadSum(mine.p_gradient), u_gradient = QuadSum(mine.u_gradient);
        const float u = QuadSum(mine.u), entropy = QuadSum(mine.entropy);
        const float entropy_gradient = QuadSum(mine.entropy_gradient);
        const float distance = QuadSum(mine.distance), product = QuadSum(mine.product);
        const float u_distance = QuadSum(mine.u_distance), u_product = QuadSum(mine.u_product);
        const int r = Row(m, half);
        if (r >= place.part.queries || threadIdx.x % 4 != 0) continue;
        // The mean under u of what should have mean zero: the delta that was subtracted came from a
        // rounded mean of V.
        const float mean = u == 0.0f ? 0.0f : u_gradient / u;
        if (Variant::kAll && call.alpha_rows) {
          const float m1 = curve.inverse;
          call.alpha_rows[first + r] =
              u == 0.0f ? 0.0f
                        : m1 * (m1 * (p_gradient - mean) + (entropy_gradient - mean * entropy));
        }
        if (Variant::kAll && call.slope_rows) {
          call.slope_rows[first + r] = distance - mean * u_distance;
        }
        if (call.query_scale_rows) {
          call.query_scale_rows[first + r] = call.problem.scale * (product - mean * u_product);
        }
      }
    }
  }

  // Sum over the four lanes that share rows.
  static __device__ __forceinline__ float QuadSum(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
  }
};

// The gradients of query tile `tile` of a head. False, in all threads, if a sum was not finite.
template <class Variant>
__device__ __forceinline__ bool BackwardRows(const GeneralBackward& call, int head, int tile,
                                             const typename Variant::Shared& shared,
                                             float gradient_scale) {
  using Element = typename Variant::Element;
  using Shape = typename Variant::Shape;
  constexpr int kHeadDim = Variant::kHeadDim;
  constexpr int kStreamed = Shape::kStreamedRows, kOwn = Shape::kOwnRows;
  const GeneralProblem& problem = call.problem;
  BlockPlace& place = shared.Place();
  if (threadIdx.x == 0) place = BlockPlace::Of<false>(problem, head, tile, kOwn);
  __syncthreads();
  const SequencePart& part = place.part;
  const RowRange& keys = place.streamed;
  if (place.first >= part.queries) return true;

  const auto query_position = [&](int columns) {
    return TilePosition{part.batch,  place.head,   part.first_query,
                        place.first, part.queries, columns};
  };
  const auto load_streamed = [&](int first, int stage) {
    TilePosition at{part.batch,      place.head / problem.group, part.first_key, first, part.keys,
                    problem.head_dim};
    LoadTile<Element, kHeadDim, kStreamed>(shared.Streamed(stage, 0), call.key, at);
    at.columns = problem.value_dim;
    LoadTile<Element, kHeadDim, kStreamed>(shared.Streamed(stage, 1), call.value, at);
    CommitCopies();
  };

  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0);
  const int own_row = warp / Shape::kParts * Shape::kWarpRows;
  const int column = warp % Shape::kParts * (kHeadDim / Shape::kParts);

  LoadTile<Element, kHeadDim, kOwn>(shared.Own(0), call.query, query_position(problem.head_dim));
  LoadTile<Element, kHeadDim, kOwn>(shared.Own(1), call.output_gradient,
                                    query_position(problem.value_dim));
  LoadTile<Element, kHeadDim, kOwn>(shared.OwnMean(), WeightedValue<Element>(call),
                                    query_position(problem.value_dim));
  int first = keys.end;
  if (keys.first < keys.end) {
    if constexpr (!Variant::kPlain) {
      const float order = CurveOf<Variant::kMode>(problem, head).order;
      MarkStreamed<false, kOwn, kStreamed>(call, place, head, order, shared.Marks());
    }
    first = NextStreamed<Variant>(shared.Marks(), keys, keys.first);
    if (first < keys.end) load_streamed(first, 0);
  }
  CommitCopies();
  QueryRows<Variant> rows(call, place, place.first + own_row, column, gradient_scale);
  WaitCopies<0>();
  __syncthreads();
  const typename Variant::Own query(shared.Own(0), own_row);
  const typename Variant::Own gradient(shared.Own(1), own_row);
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) {
    float delta[2];
    DiagonalProducts(shared.Own(1), shared.OwnMean(), own_row + 16 * m, delta);
    rows.minus_delta[m][0] = -delta[0];
    rows.minus_delta[m][1] = -delta[1];
  }

  int stage = 0;
#pragma unroll 1
  while (first < keys.end) {
    WaitCopies<0>();
    __syncthreads();  // The tile is here, and nobody reads the other stage any more.
    int next = first + kStreamed;
    if (next < keys.end) next = NextStreamed<Variant>(shared.Marks(), keys, next);
    if (Shape::kStages == 2 && next < keys.end) load_streamed(next, stage ^ 1);
    if constexpr (Variant::kCareful) {
      if (threadIdx.x < kStreamed) shared.KeyIsFinite()[threadIdx.x] = 1.0f;
      __syncthreads();
      ClearNonFinite(shared.Streamed(stage, 0), kStreamed, shared.KeyIsFinite());
      __syncthreads();
    }
    rows.Add(query, gradient, shared.Streamed(stage, 0), shared.Streamed(stage, 1),
             shared.KeyIsFinite(), first);
    if (Shape::kStages == 2) {
      stage ^= 1;
    } else if (next < keys.end) {
      __syncthreads();
      load_streamed(next, 0);
    }
    first = next;
  }

  if constexpr (!Variant::kPlain) {
    if (column == 0) rows.StoreResults();
  }
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) {
    rows.factor[m][0] /= gradient_scale;
    rows.factor[m][1] /= gradient_scale;
  }
  const bool finite =
      !__syncthreads_or(!(AllFinite(rows.sum) && (Variant::kPlain || rows.ResultsAreFinite())));
  PutSums(rows.sum, rows.factor, shared.Own(0), own_row, column);
  __syncthreads();
  StoreTile(shared.Own(0), call.query_gradient, query_position(problem.head_dim),
            Variant::kCareful);
  return finite;
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_ROWS_CUH_
