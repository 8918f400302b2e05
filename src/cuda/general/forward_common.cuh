// What the two forward kernels share: sums over a row, the test for a settled threshold, the rule
// for values that are not finite, loads and stores of rows.
//
// A warp owns a strip of 16 queries. In an accumulator each thread has two of its rows, lane / 4
// and lane / 4 + 8, and the four threads of a quad have a row together.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_FORWARD_COMMON_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_FORWARD_COMMON_CUH_

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "general/launch.h"
#include "general/mma.cuh"
#include "general/ptx.cuh"
#include "general/score.cuh"

namespace flash_entmax::cuda::forward {

constexpr unsigned kWarp = 0xffffffffu;
constexpr int kStripRows = 16;
// Newton settles in 3 to 6 steps; alpha near 1 or 2 may take some more.
constexpr int kMaxPasses = 50;

__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(kWarp, x, 1);
  return x + __shfl_xor_sync(kWarp, x, 2);
}

__device__ __forceinline__ float QuadMax(float x) {
  x = MaxKeepNan(x, __shfl_xor_sync(kWarp, x, 1));
  return MaxKeepNan(x, __shfl_xor_sync(kWarp, x, 2));
}

// The excess z - tau = coefficient * d - t. Scores are kept relative to the row's largest one, d =
// score - maximum, and so is the threshold, t in [-1, 0]: nothing is lost where |z| is large.
// (Where it is small, the sweeping kernel's output takes d = score and t = tau.) The excess never
// passes 1, and the saturation turns NaN into 0: rows that have no distribution (no key, or a score
// that is NaN or infinite) have a maximum or a threshold that is not a number, weigh nothing, and
// are told apart when they are stored.
__device__ __forceinline__ float Excess(float coefficient, float d, float t) {
  return __saturatef(fmaf(coefficient, d, -t));
}

// Adds one key to a row's mass S = sum p and slope U = sum u.
template <Alpha kMode>
__device__ __forceinline__ void AddKey(const Weights<kMode>& weights, float excess, float* mass,
                                       float* slope) {
  if constexpr (kMode == Alpha::kOneAndHalf) {
    *mass = fmaf(excess, excess, *mass);
    *slope += excess;
  } else {
    float p, u;
    weights.Of(excess, &p, &u);
    *mass += p;
    *slope += u;
  }
}

// Whether a row is settled after the step `delta` from a threshold with this mass and slope, with
// `keys` keys in sight. Newton on N = S^m leaves an error of N'' / (2 |N'|) delta^2 =
// (1 - m) / m * (S Q - U^2) / (2 S U) * delta^2, with Q = sum w^(1/m - 2). For alpha <= 1.5 no term
// of Q is above 1, so Q <= keys; then an error below 1e-6 m is certain before delta itself is small
// (the second bounds keep to where that expansion holds). For larger alpha Q has no bound and only
// a small step settles. False if delta is not a number.
template <Alpha kMode>
__device__ __forceinline__ bool IsUnsettled(const Weights<kMode>& weights, float mass, float slope,
                                            float delta, int keys) {
  bool unsettled = fabsf(delta) > 2e-7f;
  const float count = static_cast<float>(keys);
  if constexpr (kMode == Alpha::kOneAndHalf) {
    const float excess_mass = mass - 1.0f;  // about 2 U delta
    const float bound = fminf(4e-6f * slope * slope * slope, 1e-3f * count);
    unsettled = unsettled && count * excess_mass * excess_mass > bound;
  } else if constexpr (kMode == Alpha::kGeneral) {
    if (weights.order < 0.5f) {
      const float order2 = weights.order * weights.order;
      const float bound = order2 * fminf(2e-6f * slope, 1e-2f * count);
      unsettled = unsettled && count * delta * delta > bound;
    }
  }
  return unsettled;
}

// A product with values that are not finite. A probability of zero hides what its value is, so
// 0 * NaN must be left out. If a plain product comes out with anything that is not finite, it is
// redone in three parts: the finite values alone, and for the others the number of positive
// probabilities that meet +inf (or NaN) and -inf (or NaN). Those say what the true sum is.
enum class Values { kAll, kPositiveInfinite, kNegativeInfinite, kFinite };

// 0xffff for each half of a pair that is at most the largest finite number; not for NaN.
template <class Element>
__device__ __forceinline__ uint32_t AtMostFinite(uint32_t pair) {
  if constexpr (std::is_same_v<Element, __half>) {
    const __half2_raw x{static_cast<uint16_t>(pair), static_cast<uint16_t>(pair >> 16)};
    const __half2_raw largest{0x7bff, 0x7bff};
    return __hle2_mask(x, largest);
  } else {
    const __nv_bfloat162_raw x{static_cast<uint16_t>(pair), static_cast<uint16_t>(pair >> 16)};
    const __nv_bfloat162_raw largest{0x7f7f, 0x7f7f};
    return __hle2_mask(x, largest);
  }
}

// Values as this part of the product takes them.
template <class Element>
__device__ __forceinline__ void SelectValues(Values values, typename Mma<Element>::B* b) {
  const bool finite_only = values == Values::kFinite;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (std::is_same_v<Element, float>) {
      const float x = __uint_as_float(b->high[i]);
      const float y = finite_only ? fabsf(x) : values == Values::kPositiveInfinite ? x : -x;
      const bool at_most_finite = y <= FLT_MAX;
      if (!finite_only || !at_most_finite) b->low[i] = 0;
      if (!finite_only) b->high[i] = at_most_finite ? 0 : __float_as_uint(1.0f);
      if (finite_only && !at_most_finite) b->high[i] = 0;
    } else {
      constexpr uint32_t kSigns = 0x80008000u;
      const uint32_t x = b->x[i];
      const uint32_t y = finite_only                           ? x & ~kSigns
                         : values == Values::kPositiveInfinite ? x
                                                               : x ^ kSigns;
      const uint32_t mask = AtMostFinite<Element>(y);
      b->x[i] = finite_only ? x & mask : Mma<Element>::Pack(1.0f, 1.0f) & ~mask;
    }
  }
}

// In the parts that count, every positive weight becomes 1.
template <int kTiles>
__device__ __forceinline__ void SelectWeights(Values values, float (&weights)[kTiles][4]) {
  if (values == Values::kAll || values == Values::kFinite) return;
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    float& weight = weights[i / 4][i % 4];
    weight = weight > 0.0f ? 1.0f : 0.0f;
  }
}

// Which of kCount sums of a thread met a value that is not finite.
template <int kCount>
struct InfiniteSums {
  static constexpr int kWords = (kCount + 31) / 32;
  uint32_t positive[kWords], negative[kWords];

  // Looks at the sums of a finished part and returns the next part; kAll when all are done. `any`:
  // whether the plain product has to be redone; the same for all threads that work together.
  __device__ __forceinline__ Values Next(Values done, bool any, float (&sums)[kCount / 4][4]) {
    switch (done) {
      case Values::kAll:
        return any ? Values::kPositiveInfinite : Values::kAll;
      case Values::kPositiveInfinite:
        Mark(sums, positive);
        return Values::kNegativeInfinite;
      case Values::kNegativeInfinite:
        Mark(sums, negative);
        return Values::kFinite;
      default:
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          float& sum = sums[i / 4][i % 4];
          if (positive[i / 32] >> (i % 32) & 1) sum += INFINITY;
          if (negative[i / 32] >> (i % 32) & 1) sum -= INFINITY;  // inf - inf: NaN
        }
        return Values::kAll;
    }
  }

  static __device__ __forceinline__ void Mark(const float (&sums)[kCount / 4][4],
                                              uint32_t (&bits)[kWords]) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) bits[word] = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (sums[i / 4][i % 4] > 0.0f) bits[i / 32] |= 1u << (i % 32);
    }
  }

  static __device__ __forceinline__ bool AnyNotFinite(const float (&sums)[kCount / 4][4]) {
    float zero = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) zero = fmaf(sums[i / 4][i % 4], 0.0f, zero);
    return !(zero == 0.0f);
  }
};

// sums += A . (rows of `value` from `row` on), where A holds the weights of 16 keys, in two
// accumulators.
template <class Element, int kColumns, int kTiles>
__device__ __forceinline__ void AddWeightedValues(const float (&left)[4], const float (&right)[4],
                                                  const SharedTile<Element, kColumns>& value,
                                                  int row, int first_column, Values values,
                                                  float (&sums)[kTiles][4]) {
  using M = Mma<Element>;
  const auto add = [&](const typename M::A& a, int first_row) {
#pragma unroll
    for (int tile = 0; tile < kTiles; tile += 2) {
      typename M::B low, high;
      M::LoadSumB2(value, first_row, first_column + tile * 8, &low, &high);
      if (values != Values::kAll) {
        SelectValues<Element>(values, &low);
        SelectValues<Element>(values, &high);
      }
      M::Multiply(a, low, sums[tile]);
      M::Multiply(a, high, sums[tile + 1]);
    }
  };
  if constexpr (M::kDepth == 16) {
    add(M::FromAccumulators(left, right), row);
  } else {
    add(M::FromAccumulators(left), row);
    add(M::FromAccumulators(right), row + 8);
  }
}

// Copies rows [first, first + count) of one head to rows [tile_row, ...) of a tile, by `threads`
// threads, a multiple of a row's pieces, of which this one is number `thread`; otherwise as
// LoadSharedTile.
template <template <class, int> class Tile, class Element, int kColumns>
__device__ __forceinline__ void LoadRows(unsigned thread, unsigned threads,
                                         const Tile<Element, kColumns>& tile, int tile_row,
                                         const Element* head, const StridedTensor& tensor,
                                         int first, int count, int row_count, int columns) {
  constexpr unsigned kVector = 16 / sizeof(Element);
  if (tensor.vectors && columns % static_cast<int>(kVector) == 0) {
    // A thread copies the same columns of several rows.
    constexpr unsigned kVectors = kColumns / kVector;
    const unsigned column = thread % kVectors * kVector, rows = threads / kVectors;
    const int end = static_cast<int>(column) < columns ? row_count - first : 0;  // of what is there
    const Element* source = head + first * tensor.row + column;
    const int64_t step = rows * tensor.row;
    source += thread / kVectors * tensor.row;
    for (int row = thread / kVectors; row < count; row += rows, source += step) {
      const bool valid = row < end;
      // The address must be valid even where nothing is read.
      CopyAsync16(tile.At(tile_row + row, column), valid ? source : head, valid);
    }
  } else {
    for (int i = thread; i < count * kColumns; i += threads) {
      const int row = i / kColumns, column = i % kColumns;
      const bool valid = first + row < row_count && column < columns;
      *tile.At(tile_row + row, column) =
          valid ? head[(first + row) * tensor.row + column * tensor.column] : Element(0.0f);
    }
  }
}

// Stores kCount (2 or 4) neighbouring columns of a row. `aligned`: the row starts at a multiple of
// kCount elements and its columns are contiguous.
template <int kCount, class Element>
__device__ __forceinline__ void StoreColumns(Element* row, int64_t column_stride, int column,
                                             int columns, bool aligned, const float (&x)[kCount]) {
  if (aligned && column + kCount <= columns) {
    if constexpr (std::is_same_v<Element, float>) {
      if constexpr (kCount == 4) {
        *reinterpret_cast<float4*>(row + column) = make_float4(x[0], x[1], x[2], x[3]);
      } else {
        *reinterpret_cast<float2*>(row + column) = make_float2(x[0], x[1]);
      }
    } else if constexpr (kCount == 4) {
      *reinterpret_cast<uint2*>(row + column) =
          make_uint2(Mma<Element>::Pack(x[0], x[1]), Mma<Element>::Pack(x[2], x[3]));
    } else {
      *reinterpret_cast<uint32_t*>(row + column) = Mma<Element>::Pack(x[0], x[1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (column + i < columns) row[(column + i) * column_stride] = Element(x[i]);
    }
  }
}

// Rows of one of the two results of a head: the output, or the weighted mean of V. `row` counts in
// the tensor.
template <class Element>
struct ResultRows {
  Element* data;
  int64_t row_stride, column_stride;
  bool vectors;

  static __device__ __forceinline__ ResultRows Of(const GeneralForward& call, bool weighted_mean,
                                                  int batch, int head) {
    if (!weighted_mean) {
      return {call.output.Row<Element>(batch, head, 0), call.output.row, call.output.column,
              call.output.vectors};
    }
    const GeneralProblem& problem = call.problem;
    const int64_t first_row =
        (static_cast<int64_t>(batch) * problem.heads + head) * problem.queries;
    return {static_cast<Element*>(call.saved.weighted_value) + first_row * problem.value_dim,
            problem.value_dim, 1, problem.value_dim % 4 == 0};
  }
};

// tau of a row, in units of z, to the backward and to the caller.
__device__ __forceinline__ void StoreThreshold(const GeneralForward& call, int batch, int head,
                                               int64_t row, float threshold) {
  const GeneralProblem& problem = call.problem;
  const int64_t head_index = static_cast<int64_t>(batch) * problem.heads + head;
  if (call.saved.threshold) call.saved.threshold[head_index * problem.queries + row] = threshold;
  if (call.user_threshold) {
    call.user_threshold[batch * call.user_threshold_stride[0] +
                        head * call.user_threshold_stride[1] +
                        row * call.user_threshold_stride[2]] = threshold;
  }
}

}  // namespace flash_entmax::cuda::forward

#endif  // FLASH_ENTMAX_CUDA_GENERAL_FORWARD_COMMON_CUH_
