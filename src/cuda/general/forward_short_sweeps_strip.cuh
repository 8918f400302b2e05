// What one warp of the sweeping short forward kernel does with a strip of queries to find their
// thresholds. forward_short_sweeps.cuh has the algorithm and the kernel,
// forward_short_sweeps_product.cuh the third sweep.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_STRIP_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_STRIP_CUH_

#include "general/forward_short_sweeps_shape.cuh"

namespace flash_entmax::cuda::forward {

// A strip of 16 or 32 queries. A thread has two or four of the rows, lane / 4 + 8 i; `i` always
// counts these.
// kFast: alpha = 1.5, and z is a positive multiple of the dot product.
template <class Element, int kHeadDim, bool kFast>
struct SweepStrip {
  using M = Mma<Element>;
  using Shape = SweepShape<kHeadDim>;
  using Tile = SwizzledTile<Element, kHeadDim>;
  static constexpr int kStrips = Shape::kStrips;
  static constexpr int kRows = 2 * kStrips;
  static constexpr int kSteps = kHeadDim / 16;
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
  int blocks;                  // of 16 keys
  uint32_t hits;               // blocks that may hold a positive probability
  int clear_first, clear_end;  // keys that every row of the strip sees, counted from first_key
  int pairs_first, pairs_end;  // blocks without hidden keys, two at a time
  int end[kRows];              // of the row's keys, counted from the thread's first key
  float factor[kRows];         // of the dot product; only if not kFast
  float maximum[kRows], threshold[kRows];  // see Excess
  float tau[kRows];                        // both together, in units of z
  typename M::A query[kStrips][kSteps];
  uint32_t key_address, value_address;  // of the lane's row in the first block

  static __device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x % 32); }
  // Worked out where it is used. The mask tells the compiler that it is not negative.
  static __device__ __forceinline__ int LaneHere() { return ComputeHere(Lane()) & 31; }
  __device__ __forceinline__ int Row(int i) const { return first_row + LaneHere() / 4 + 8 * i; }

  // Places the strip that starts at `strip_row` and loads its queries. `base`: the sequence's key
  // in the first row of the tiles.
  __device__ __forceinline__ void Place(int strip_row, int base, const Tile& key,
                                        const Tile& value) {
    const GeneralProblem& problem = call.problem;
    const int lane = LaneHere();
    first_row = strip_row;
    LoadQueries();
    const KeyRange top = KeyRange::Of(problem, part, strip_row);
    const KeyRange bottom =
        KeyRange::Of(problem, part, min(strip_row + Shape::kQueries, end_row) - 1);
    const int tile_row = max(top.first - base, 0) / 32 * 32;
    first_key = base + tile_row;
    blocks = bottom.end > top.first
                 ? min((bottom.end - first_key + 15) / 16, int{Shape::kMostBlocks})
                 : 0;
    clear_first = bottom.first - first_key;
    clear_end = top.end - first_key;
    pairs_first = min(max(clear_first + 15, 0) / 16, blocks);
    pairs_end = pairs_first + max(min(max(clear_end, 0) / 16, blocks) - pairs_first, 0) / 2 * 2;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      end[i] = KeyRange::Of(problem, part, Row(i)).end - first_key - lane % 4 * 2;
      if constexpr (!kFast) {
        factor[i] = curve.order * FactorOf(problem, part, head, Row(i));
      }
    }
    key_address = SharedAddress(key.At(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8)) +
                  tile_row * Tile::kRowBytes;
    value_address = SharedAddress(value.At(lane % 16, lane / 16 * 8)) + tile_row * Tile::kRowBytes;
  }

  // Straight into operands: every thread has two neighbouring columns of its rows in each eight.
  __device__ __forceinline__ void LoadQueries() {
    const int columns = call.problem.head_dim, first_column = LaneHere() % 4 * 2;
    const Element* const rows =
        call.query.Row<const Element>(part.batch, head, part.first_query + Row(0));
    const auto for_pairs = [&](auto load) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool valid = Row(i) < part.queries;
        const Element* const row = rows + 8 * i * call.query.row;
#pragma unroll
        for (int piece = 0; piece < kHeadDim / 8; ++piece) {
          uint32_t& pair = query[i / 2][piece / 2].x[piece % 2 * 2 + i % 2];
          pair = valid ? load(row, 8 * piece + first_column) : 0;
        }
      }
    };
    if (call.query.vectors && columns == kHeadDim) {
      for_pairs([](const Element* row, int column) {
        return *reinterpret_cast<const uint32_t*>(row + column);
      });
    } else {
      for_pairs([&](const Element* row, int column) {
        return LoadPair(row, call.query.column, column, columns);
      });
    }
  }

  // Column number `column` of a row and the next one, wherever they are; zeros from `columns` on.
  static __device__ __forceinline__ uint32_t LoadPair(const Element* row, int64_t column_stride,
                                                      int column, int columns) {
    uint32_t pair = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (column + e >= columns) break;
      const auto* const source =
          reinterpret_cast<const uint16_t*>(row + (column + e) * column_stride);
      pair |= static_cast<uint32_t>(*source) << 16 * e;
    }
    return pair;
  }

  // Calls body(block, count, masked) for all blocks: `count` of them from `block` on, 1 or 2;
  // `masked`: some of their keys may be hidden from some rows. Both are constants. Unless kSplit,
  // all are taken singly and count as masked.
  template <bool kSplit = true, class Body>
  __device__ __forceinline__ void ForBlocks(Body body) const {
    int skipped = 0;
    if constexpr (kSplit) {
#pragma unroll 1
      for (int block = pairs_first; block < pairs_end; block += 2) {
        body(block, std::integral_constant<int, 2>{}, std::false_type{});
      }
      skipped = pairs_end - pairs_first;
    }
#pragma unroll 1
    for (int i = 0; i < blocks - skipped; ++i) {
      const int block = kSplit && i >= pairs_first ? i + skipped : i;
      body(block, std::integral_constant<int, 1>{}, std::true_type{});
    }
  }

  // Scores of 16 keys, for strips of 16 queries from number kFirst on: z, or what it is
  // proportional to; -inf for hidden keys. kMasked: there may be some.
  template <bool kMasked, int kFirst = 0, int kCount>
  __device__ __forceinline__ void ComputeScores(int block, float (&score)[kCount][2][4]) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t x[4];
      LoadMatrices<false>((key_address ^ (step * 32)) + block * 16 * Tile::kRowBytes, x);
#pragma unroll
      for (int strip = 0; strip < kCount; ++strip) {
        const typename M::A& rows = query[kFirst + strip][step];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const typename M::B keys{x[2 * half], x[2 * half + 1]};
          MultiplyStep<M>(step == 0, rows, keys, score[strip][half]);
        }
      }
    }
    const int first = 16 * block;
    if constexpr (!kFast) {
      const int key = first_key + first + Lane() % 4 * 2;
      ToZ<8 * kCount>(
          call.problem, curve.order, SlopeOf(call.problem, head),
          Row(2 * kFirst) + part.keys - part.queries - key,
          [&](int e) -> float& { return score[e / 8][e / 4 % 2][e % 4]; },
          [&](int e) { return factor[2 * kFirst + e / 8 * 2 + e / 2 % 2]; },
          [](int e) { return kStripRows * (e / 8) + 8 * (e / 2 % 2) - 8 * (e / 4 % 2) - e % 2; });
    }
    if constexpr (!kMasked) return;
    if (first + 16 > clear_end) {
#pragma unroll
      for (int e = 0; e < 8 * kCount; ++e) {
        if (e / 4 % 2 * 8 + e % 2 >= end[2 * kFirst + e / 8 * 2 + e / 2 % 2] - first) {
          score[e / 8][e / 4 % 2][e % 4] = -INFINITY;
        }
      }
    }
    if (first < clear_first) {
      const int key = first_key + first + Lane() % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2 * kCount; ++i) {
        const int row = Row(2 * kFirst + i);
        const int first_seen = KeyRange::Of(call.problem, part, row).first - key;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (e / 2 * 8 + e % 2 < first_seen) score[i / 2][e / 2][i % 2 * 2 + e % 2] = -INFINITY;
        }
      }
    }
  }

  // Calls body(score, i) for all scores of a block; i is a constant.
  template <int kFirst = 0, int kCount, class Body>
  static __device__ __forceinline__ void ForScores(float (&score)[kCount][2][4], Body body) {
#pragma unroll
    for (int e = 0; e < 8 * kCount; ++e) {
      body(score[e / 8][e / 4 % 2][e % 4], 2 * kFirst + e / 8 * 2 + e / 2 % 2);
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

  // The threshold of every row, in `tau`, after StartFromGroups.
  __device__ __forceinline__ void Solve() {
    if (!SolveLists()) SolveScores();
#pragma unroll
    for (int i = 0; i < kRows; ++i) tau[i] = fmaf(coefficient, maximum[i], threshold[i]);
  }

  // Newton with a sweep over the scores in every step.
  __device__ __forceinline__ void SolveScores() {
    hits = blocks == 32 ? ~0u : (1u << blocks) - 1;
#pragma unroll 1
    for (int pass = 0; pass < kMaxPasses; ++pass) {
      float mass[kRows] = {}, slope[kRows] = {};
#pragma unroll 1
      for (int block = 0; block < blocks; ++block) {
        float score[kStrips][2][4];
        ComputeScores<true>(block, score);
        WithCurve([&](const auto& weights) {
          ForScores(score, [&](float s, int i) {
            AddKey(weights, Excess(coefficient, s - maximum[i], threshold[i]), &mass[i], &slope[i]);
          });
        });
      }
      if (!Advance(16 * blocks, mass, slope)) break;
    }
  }

  // Sums of x[i] over the four lanes that share the rows, row i's in the lanes with lane % kRows ==
  // i.
  static __device__ __forceinline__ float SumRows(const float (&x)[kRows]) {
    const bool upper = Lane() & 2, odd = Lane() & 1;
    float y[2] = {x[0], x[1]};
    if constexpr (kRows == 4) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        y[i] = (upper ? x[i + 2] : x[i]) + __shfl_xor_sync(kWarp, upper ? x[i] : x[i + 2], 2);
      }
    }
    const float sum = (odd ? y[1] : y[0]) + __shfl_xor_sync(kWarp, odd ? y[0] : y[1], 1);
    return kRows == 4 ? sum : sum + __shfl_xor_sync(kWarp, sum, 2);
  }

  // One step of Newton from every thread's sums. Four lanes have the rows together, so each does
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
    Move(delta);
  }

  // Adds every row's step, which one of its four lanes has, see SumRows, to its threshold.
  __device__ __forceinline__ void Move(float delta) {
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
    ForBlocks([&](int block, auto count, auto masked) {
#pragma unroll
      for (int place = 0; place < count.value; ++place) {
        float score[kStrips][2][4];
        ComputeScores<masked.value>(block + place, score);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& largest = group[i][4 * place + e];
            largest = MaxKeepNan(largest, score[i / 2][e / 2][i % 2 * 2 + e % 2]);
          }
        }
      }
    });
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
      Step(mass, slope,
           [&](const auto&, float, float, float delta) { moved = delta > (kFast ? 0.1f : 1e-3f); });
      if (!__any_sync(kWarp, moved)) break;
    }
  }

  // Second sweep, and Newton on what it finds. Keys above the bound, the only ones that can have a
  // positive probability, are listed by the thread that has their score: of its rows lane / 4 + 16
  // k from the first slot up, of lane / 4 + 8 + 16 k from the last slot down. Empty slots hold
  // -inf, so that Newton takes all lists as far as the longest goes. False, with the thresholds
  // still the bounds, if some list is too long.
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
    // Of a row in the thread's list, in bytes.
    const auto entries = [&](int i) {
      const int start = lists + end_of_list(i);
      return i % 2 == 0 ? next[i] - start : start - next[i];
    };
    static_assert(kHeld + 2 * 4 <= kSlots && 2 * kHeld <= kSlots,
                  "lists that are not too long have room for two blocks, and do not meet");
    FillLists();
    int before = kStrips * (kSlots - 1) * kStep;
    hits = 0;
    ForBlocks([&](int block, auto count, auto masked) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        // It is too long already. Each block may fill four slots more.
        if (entries(i) > kHeld * kStep) cut[i] = INFINITY;
      }
      constexpr int kAtOnce = kStrips == 1 ? count.value : 1;  // blocks
#pragma unroll
      for (int first = block; first < block + count.value; first += kAtOnce) {
        float score[kAtOnce][kStrips][2][4];
#pragma unroll
        for (int place = 0; place < kAtOnce; ++place) {
          ComputeScores<masked.value>(first + place, score[place]);
        }
#pragma unroll
        for (int place = 0; place < kAtOnce; ++place) {
          ForScores(score[place], [&](float s, int i) {
            if (s > cut[i]) {
              StoreShared(next[i], s);
              next[i] += i % 2 == 0 ? kStep : -kStep;
            }
          });
        }
      }
      int room = 0;
#pragma unroll
      for (int i = 0; i < kRows; i += 2) room += next[i + 1] - next[i];
      if (__any_sync(kWarp, room != before)) hits |= (count.value == 2 ? 3u : 1u) << block;
      before = room;
    });
    int most = 0;  // entries of a row in a thread's list
#pragma unroll
    for (int i = 0; i < kRows; ++i) most = max(most, entries(i) / kStep);
    most = __reduce_max_sync(kWarp, most);
    if (most > kHeld) return false;

#pragma unroll 1
    for (int pass = 0; pass < kMaxPasses; ++pass) {
      float mass[kRows] = {}, slope[kRows] = {};
      WithCurve([&](const auto& weights) {
        constexpr int kAtOnce = 4;
        int from[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) from[i] = lists + end_of_list(i);
#pragma unroll 1
        for (int left = most; left > 0; left -= kAtOnce) {
#pragma unroll
          for (int e = 0; e < kAtOnce * kRows; ++e) {
            const int i = e % kRows, place = e / kRows;
            const float s = LoadShared(from[i] + (i % 2 == 0 ? place : -place) * kStep);
            AddKey(weights, Excess(coefficient, s - maximum[i], threshold[i]), &mass[i], &slope[i]);
          }
#pragma unroll
          for (int i = 0; i < kRows; ++i) from[i] += (i % 2 == 0 ? kAtOnce : -kAtOnce) * kStep;
        }
      });
      if (kFast && pass == 0) {
        float count[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          count[i] = static_cast<float>(entries(i)) / kStep;
        }
        StepTogether(mass, slope, count);
      } else if (!Advance(4 * most, mass, slope)) {
        break;
      }
    }
    return true;
  }

  // The first step over lists, if kFast: to where the mass would be 1 if all `count` keys listed
  // kept a positive weight, the smaller root of count d^2 - 2 slope d + mass = 1; if it has none, a
  // step that leaves the largest score a weight. Few keys lose theirs, so that little is left for
  // Newton, which may start from either side. NaN without a weight, hence the factor own_slope.
  __device__ __forceinline__ void StepTogether(const float (&mass)[kRows],
                                               const float (&slope)[kRows],
                                               const float (&count)[kRows]) {
    const float own_slope = SumRows(slope), excess_mass = SumRows(mass) - 1.0f;
    const float square = fmaf(own_slope, own_slope, -SumRows(count) * excess_mass);
    const float root = SquareRoot(fmaxf(square, 0.0f));
    Move(__fdividef(excess_mass * own_slope, own_slope * (own_slope + root)));
  }

  // Empties the warp's lists.
  __device__ __forceinline__ void FillLists() const {
    __syncwarp();  // The warp may still be reading the lists of the strip before.
    auto* const lists = reinterpret_cast<float4*>(own) + Lane();
#pragma unroll
    for (int i = 0; i < kStrips * Shape::kSlots / 4; ++i) {
      lists[32 * i] = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    }
    __syncwarp();
  }
};

}  // namespace flash_entmax::cuda::forward

#endif  // FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_STRIP_CUH_
