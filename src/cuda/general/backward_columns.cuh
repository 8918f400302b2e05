// Backward of the general kernels, key side: dK and dV of a tile of keys of one key head.
// backward_rows.cuh has the algorithm and the memory traffic.
//
// Scores are made transposed, S^T = K.Q^T, so that keys are the rows of the accumulators and p^T
// and dR^T are left operands without passing through shared memory:
//
//   S^T = K.Q^T; no score above its threshold: done;  X^T = V.dO^T - delta;
//   dV += p^T.dO;  dK += (u X)^T.Q
//
// Threshold, delta and factor of a query belong to a column of the accumulators and lie in shared
// memory. All heads of a group are visited by one block, in order.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_COLUMNS_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_COLUMNS_CUH_

#include "general/backward_marks.cuh"

namespace flash_entmax::cuda {

// A streamed tile of queries.
template <class Variant>
struct QueryTile {
  typename Variant::Tile query, gradient;
  const float* threshold;
  const float* minus_delta;
  const float* factor;  // scale * query_scale; not for plain problems
  int head;
  int first;  // first query, counted in the sequence
  AlphaCurve curve;
  float slope;
};

// One warp's own keys.
template <class Variant>
struct KeyRows {
  using Element = typename Variant::Element;
  using Shape = typename Variant::Shape;
  using Own = typename Variant::Own;
  using Queries = QueryTile<Variant>;
  static constexpr int kRowTiles = Shape::kRowTiles;
  static constexpr int kTiles = Shape::kChunk / 8;
  // In fp16 small probabilities would be subnormal: scaled up, they are normal from 2^-28 on.
  static constexpr float kWeightScale = Mma<Element>::kWeightScale == 1.0f ? 1.0f : 16384.0f;
  using Scores = float[kRowTiles][kTiles][4];
  using Sums = float[kRowTiles][Shape::kColumnTiles][4];

  const GeneralBackward& call;
  const BlockPlace& place;
  int row;               // the first one, counted in the sequence; a thread has rows Row(m, half)
  int column;            // first of the gradient columns that this warp sums
  float gradient_scale;  // of dR, against overflow in fp16
  Sums key_sum = {};     // dK gradient_scale; divided by scale if plain
  Sums value_sum = {};   // dV kWeightScale

  __device__ __forceinline__ KeyRows(const GeneralBackward& backward, const BlockPlace& block_place,
                                     int first_row, int first_column, float scale_of_gradients)
      : call(backward),
        place(block_place),
        row(first_row),
        column(first_column),
        gradient_scale(scale_of_gradients) {}

  __device__ __forceinline__ int Row(int m, int half) const {
    return row + 16 * m + 8 * half + static_cast<int>(threadIdx.x) % 32 / 4;
  }
  // The column of tile t that a thread has first; the other one is the next.
  static __device__ __forceinline__ int Column(int t) {
    return 8 * t + 2 * (static_cast<int>(threadIdx.x) % 4);
  }
  static __device__ __forceinline__ float2 Pair(const float* values, int column) {
    return *reinterpret_cast<const float2*>(values + column);
  }

  // Adds what a streamed tile of queries contributes.
  __device__ __forceinline__ void Add(const Own& key, const Own& value, const Queries& queries) {
    const RowRange seen_by_any = place.band.SeenByAny(row, Shape::kWarpRows);
    const RowRange seen_by_all = place.band.SeenByAll(row, Shape::kWarpRows);
    const int begin = max(0, seen_by_any.first - queries.first) / Shape::kChunk * Shape::kChunk;
    const int end = min(Shape::kStreamedRows, seen_by_any.end - queries.first);
#pragma unroll 1
    for (int offset = begin; offset < end; offset += Shape::kChunk) {
      const int chunk = queries.first + offset;
      const bool masked = chunk < seen_by_all.first || chunk + Shape::kChunk > seen_by_all.end;

      Scores dot;
      AddDotProducts<true>(key, queries.query, offset, dot);
      Scores w;  // positive part of z - tau, then p
      if (!Excess(queries, dot, offset, masked, w)) continue;

      Scores x;  // dP - delta, then dR
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const float2 minus_delta = Pair(queries.minus_delta, offset + Column(t));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          x[m][t][0] = x[m][t][2] = minus_delta.x;
          x[m][t][1] = x[m][t][3] = minus_delta.y;
        }
      }
      AddDotProducts(value, queries.gradient, offset, x);
      WeightsAndGradients(queries, dot, offset, w, x);
      AddWeightedRows(w, queries.gradient, offset, column, value_sum);
      AddWeightedRows(x, queries.query, offset, column, key_sum);
      if constexpr (Variant::kCareful) AddClearedGradients(queries, offset, w);
    }
  }

  // True in all lanes if any weight of the warp is positive or NaN.
  __device__ __forceinline__ bool Excess(const Queries& queries, const Scores& dot, int offset,
                                         bool masked, Scores& w) const {
    if constexpr (Variant::kPlain) {
      const float factor = call.problem.scale * queries.curve.order;
      ForAll(w, [&](int m, int t, int e) {
        w[m][t][e] = PlainProduct<Variant::kMode>(factor, dot[m][t][e]);
      });
    } else {
      ForAll(w, [&](int m, int t, int e) { w[m][t][e] = dot[m][t][e]; });
      const SequencePart& part = place.part;
      ToZ<4 * kTiles * kRowTiles, Variant::kAll>(
          call.problem, queries.curve.order, queries.slope,
          queries.first + offset + Column(0) + part.keys - part.queries - Row(0, 0),
          [&](int i) -> float& { return w[i / (4 * kTiles)][i / 4 % kTiles][i % 4]; },
          [&](int i) {
            return queries.curve.order * queries.factor[offset + Column(i / 4 % kTiles) + i % 2];
          },
          [](int i) {
            return 8 * (i / 4 % kTiles) + i % 2 - 16 * (i / (4 * kTiles)) - 8 * (i / 2 % 2);
          });
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const float2 pair = Pair(queries.threshold, offset + Column(t));
      const float threshold[2] = {pair.x, pair.y};
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) w[m][t][e] -= threshold[e % 2];
      }
    }
    if (masked) {
      const Band band = place.band;
      ForAll(w, [&](int m, int t, int e) {
        const int query = queries.first + offset + Column(t) + e % 2;
        if (!band.Sees(Row(m, e / 2), query)) w[m][t][e] = 0.0f;
      });
    }
    return AnyPositive(w);
  }

  // Turns w into p and x = dP - delta into dR, the latter times the factor if it varies.
  __device__ __forceinline__ void WeightsAndGradients(const Queries& queries, const Scores& dot,
                                                      int offset, Scores& w, Scores& x) const {
    const auto factor = [&](int t, int e) { return queries.factor[offset + Column(t) + e % 2]; };
    if (Variant::kAll && call.problem.softcap > 0.0f) {
      ForAll(x, [&](int m, int t, int e) {
        x[m][t][e] *= CapDerivative(call.problem.softcap, factor(t, e), dot[m][t][e]);
      });
    }
    ForAll(x, [&](int m, int t, int e) {
      if (Variant::kCareful && w[m][t][e] == 0.0f) {
        x[m][t][e] = 0.0f;
        return;
      }
      const auto [p, u] = Probability::Of<Variant::kMode>(w[m][t][e], queries.curve.inverse - 1.0f);
      w[m][t][e] = kWeightScale * p;
      x[m][t][e] *= u;
      if constexpr (!Variant::kPlain) x[m][t][e] *= factor(t, e);
      if constexpr (Variant::kCareful) x[m][t][e] *= gradient_scale;
    });
  }

  // Adds p dO for the elements of dO that ClearNonFinite took out of the tile, where p is not zero.
  // Rows that have such elements are among those whose delta is not finite.
  __device__ __forceinline__ void AddClearedGradients(const Queries& queries, int offset,
                                                      const Scores& p) {
    const int lane = threadIdx.x % 32;
    const StridedTensor& gradient = call.output_gradient;
#pragma unroll 1
    for (int i = 0; i < Shape::kChunk; ++i) {
      if (IsFinite(queries.minus_delta[offset + i])) continue;
      const Element* const elements = gradient.Row<const Element>(
          place.part.batch, queries.head,
          static_cast<int64_t>(place.part.first_query) + queries.first + offset + i);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float weight = 0.0f;
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            if (i / 8 == t) weight = i % 2 ? p[m][t][2 * half + 1] : p[m][t][2 * half];
          }
          weight = __shfl_sync(kAllLanes, weight, lane / 4 * 4 + i % 8 / 2);
          if (weight == 0.0f) continue;
#pragma unroll
          for (int c = 0; c < Shape::kColumnTiles; ++c) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int at = column + Column(c) + e;
              if (at >= call.problem.value_dim) continue;
              const float element = static_cast<float>(elements[at * gradient.column]);
              if (!IsFinite(element)) value_sum[m][c][2 * half + e] += weight * element;
            }
          }
        }
      }
    }
  }
};

// The gradients of key tile `tile` of a key head. False, in all threads, if a sum was not finite.
template <class Variant>
__device__ __forceinline__ bool BackwardColumns(const GeneralBackward& call, int kv_head, int tile,
                                                const typename Variant::Shared& shared,
                                                float gradient_scale) {
  using Element = typename Variant::Element;
  using Shape = typename Variant::Shape;
  constexpr int kHeadDim = Variant::kHeadDim;
  constexpr int kStreamed = Shape::kStreamedRows, kOwn = Shape::kOwnRows;
  const GeneralProblem& problem = call.problem;
  BlockPlace& place = shared.Place();
  if (threadIdx.x == 0) place = BlockPlace::Of<true>(problem, kv_head, tile, kOwn);
  __syncthreads();
  const SequencePart& part = place.part;
  const RowRange& queries = place.streamed;
  // Keys past a key length have gradients too: zeros.
  const auto key_rows = [&] { return problem.cu_key ? part.keys : problem.keys; };
  if (place.first >= key_rows()) return true;
  const int members = queries.first < queries.end ? problem.group : 0;
  const int thread = threadIdx.x;

  const auto key_position = [&](int rows, int columns) {
    return TilePosition{part.batch, place.head, part.first_key, place.first, rows, columns};
  };
  const auto query_position = [&](int member, int first, int columns) {
    return TilePosition{part.batch,       place.head * problem.group + member,
                        part.first_query, first,
                        part.queries,     columns};
  };
  const auto load_streamed = [&](int member, int first, int stage) {
    LoadTile<Element, kHeadDim, kStreamed>(shared.Streamed(stage, 0), call.query,
                                           query_position(member, first, problem.head_dim));
    LoadTile<Element, kHeadDim, kStreamed>(shared.Streamed(stage, 1), call.output_gradient,
                                           query_position(member, first, problem.value_dim));
    if (thread < kStreamed) {
      const int64_t head =
          static_cast<int64_t>(part.batch) * problem.heads + place.head * problem.group + member;
      const float* const row = call.saved.threshold + head * problem.queries + part.first_query;
      const bool valid = first + thread < part.queries;
      CopyAsync4(shared.Threshold(stage) + thread, valid ? row + first + thread : row, valid);
    }
  };
  // Moves on to the first tile to visit from query `first` of `member` on; member == members if
  // there is none. Has barriers: all threads call it.
  const auto find_tile = [&](int& member, int& first) {
    while (true) {
      if (first < queries.end) first = NextStreamed<Variant>(shared.Marks(), queries, first);
      if (first < queries.end || ++member >= members) return;
      first = queries.first;
      if constexpr (!Variant::kPlain) {
        const int head = place.head * problem.group + member;
        const float order = CurveOf<Variant::kMode>(problem, head).order;
        MarkStreamed<true, kOwn, kStreamed>(call, place, head, order, shared.Marks());
      }
    }
  };
  const auto load_mean = [&](int member, int first) {
    LoadTile<Element, kHeadDim, kStreamed>(shared.Mean(), WeightedValue<Element>(call),
                                           query_position(member, first, problem.value_dim));
  };

  const int warp = __shfl_sync(kAllLanes, thread / 32, 0);
  const int own_row = warp / Shape::kParts * Shape::kWarpRows;
  const int column = warp % Shape::kParts * (kHeadDim / Shape::kParts);

  LoadTile<Element, kHeadDim, kOwn>(shared.Own(0), call.key,
                                    key_position(part.keys, problem.head_dim));
  LoadTile<Element, kHeadDim, kOwn>(shared.Own(1), call.value,
                                    key_position(part.keys, problem.value_dim));
  int member = -1, first = queries.end;
  find_tile(member, first);
  if (member < members) {
    load_streamed(member, first, 0);
    load_mean(member, first);
  }
  CommitCopies();
  KeyRows<Variant> rows(call, place, place.first + own_row, column, gradient_scale);
  WaitCopies<0>();
  __syncthreads();
  const typename Variant::Own key(shared.Own(0), own_row);
  const typename Variant::Own value(shared.Own(1), own_row);

  int stage = 0;
#pragma unroll 1
  while (member < members) {
    WaitCopies<0>();
    __syncthreads();  // The tile is here, and nobody reads the other stage any more.
    int next_member = member, next_first = first + kStreamed;
    find_tile(next_member, next_first);
    const bool more = next_member < members;
    if (Shape::kStages == 2 && more) load_streamed(next_member, next_first, stage ^ 1);

    const int head = place.head * problem.group + member;
    const QueryTile<Variant> streamed{shared.Streamed(stage, 0),
                                      shared.Streamed(stage, 1),
                                      shared.Threshold(stage),
                                      shared.MinusDelta(),
                                      shared.Factor(),
                                      head,
                                      first,
                                      CurveOf<Variant::kMode>(problem, head),
                                      SlopeOf(problem, head)};
    static_assert(kStreamed <= 16 * Shape::kWarps);
    if (16 * warp < kStreamed) {
      float delta[2];
      DiagonalProducts(streamed.gradient, shared.Mean(), 16 * warp, delta);
      const int lane = thread % 32, which = lane % 4;
      if (which < 2) {
        shared.MinusDelta()[16 * warp + 8 * which + lane / 4] = -(which ? delta[1] : delta[0]);
      }
    }
    if (!Variant::kPlain && thread < kStreamed) {
      shared.Factor()[thread] = FactorOf(problem, part, head, first + thread);
    }
    __syncthreads();  // Delta and factors are here, and the means have been read.
    if (Shape::kStages == 2 && more) load_mean(next_member, next_first);
    CommitCopies();
    if constexpr (Variant::kCareful) {
      ClearNonFinite(streamed.query, kStreamed, nullptr);
      ClearNonFinite(streamed.gradient, kStreamed, nullptr);
      __syncthreads();
    }

    rows.Add(key, value, streamed);
    if (Shape::kStages == 2) {
      stage ^= 1;
    } else if (more) {
      __syncthreads();
      load_streamed(next_member, next_first, 0);
      load_mean(next_member, next_first);
      CommitCopies();
    }
    member = next_member;
    first = next_first;
  }

  float key_factor[Shape::kRowTiles][2], value_factor[Shape::kRowTiles][2];
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      key_factor[m][half] = (Variant::kPlain ? problem.scale : 1.0f) / gradient_scale;
      value_factor[m][half] = 1.0f / rows.kWeightScale;
    }
  }
  const bool finite = !__syncthreads_or(!(AllFinite(rows.key_sum) && AllFinite(rows.value_sum)));
  PutSums(rows.key_sum, key_factor, shared.Own(0), own_row, column);
  PutSums(rows.value_sum, value_factor, shared.Own(1), own_row, column);
  __syncthreads();
  StoreTile(shared.Own(0), call.key_gradient, key_position(key_rows(), problem.head_dim),
            Variant::kCareful);
  StoreTile(shared.Own(1), call.value_gradient, key_position(key_rows(), problem.value_dim),
            Variant::kCareful);
  return finite;
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_COLUMNS_CUH_
