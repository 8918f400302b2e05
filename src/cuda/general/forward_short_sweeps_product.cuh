// The third sweep of the short forward kernel: output rows, rows of the weighted mean of V, stores.
// forward_short_sweeps.cuh has the algorithm and the kernel.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_PRODUCT_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_PRODUCT_CUH_

#include "general/forward_short_sweeps_strip.cuh"

namespace flash_entmax::cuda::forward {

template <class Element, int kHeadDim, bool kFast>
struct SweepProduct : SweepStrip<Element, kHeadDim, kFast> {
  using Strip = SweepStrip<Element, kHeadDim, kFast>;
  using M = Mma<Element>;
  using Shape = SweepShape<kHeadDim>;
  using Tile = SwizzledTile<Element, kHeadDim>;
  using Strip::call;
  using Strip::coefficient;
  using Strip::curve;
  using Strip::end_row;
  using Strip::first_row;
  using Strip::head;
  using Strip::hits;
  using Strip::LaneHere;
  using Strip::maximum;
  using Strip::part;
  using Strip::Row;
  using Strip::tau;
  using Strip::threshold;
  using Strip::value_address;
  static constexpr int kRows = Strip::kRows;
  static constexpr int kTiles = kHeadDim / 8;  // accumulators of the output of 16 queries
  static constexpr int kSums = Shape::kStrips * kTiles;
  // Strips of 16 queries whose two results have room in registers.
  static constexpr int kTogether = kHeadDim == 32 && kFast ? Shape::kStrips : 1;

  // With thresholds up to this size, weights from tau itself are as good as those from differences
  // to the row's largest score: its rounding moves them by less than 4e-6.
  static constexpr float kMostTau = 64.0f;

  // Output rows, thresholds, and with a backward to come rows of the weighted mean.
  __device__ __forceinline__ void StoreResults() {
    bool large = false;
#pragma unroll
    for (int i = 0; i < kRows; ++i) large |= fabsf(tau[i]) > kMostTau;
    large = __any_sync(kWarp, large);
    if (call.saved.weighted_value != nullptr && !large) {
      bool finite = StoreBoth<0>();
      if constexpr (kTogether < Shape::kStrips) finite = StoreBoth<1>() && finite;
      if (finite) return;
    }
    // One result after the other: for values that are not finite, large thresholds, or if only one
    // is wanted.
    StoreProduct<false>(large);
    if (call.saved.weighted_value != nullptr) StoreProduct<true>(large);
  }

  // Calls body(block, masked) for the blocks of `hits`, see ForBlocks. Two strips have no registers
  // for two blocks in flight.
  template <bool kSplit = true, class Body>
  __device__ __forceinline__ void ForHits(Body body) const {
    this->template ForBlocks<kSplit>([&](int block, auto count, auto masked) {
      if ((hits >> block & 1u) == 0) return;  // Two blocks of a step were marked together.
#pragma unroll(Shape::kStrips == 1 ? 2 : 1)
      for (int place = 0; place < count.value; ++place) body(block + place, masked);
    });
  }

  // Both results of kTogether strips from number kFirst on. False, in all lanes, if a sum is not
  // finite; then what was stored is to be replaced.
  template <int kFirst>
  __device__ __forceinline__ bool StoreBoth() {
    float output[kTogether * kTiles][4], mean[kTogether * kTiles][4], slope[2 * kTogether] = {};
#pragma unroll
    for (int i = 0; i < 4 * kTogether * kTiles; ++i) {
      output[i / 4][i % 4] = 0.0f;
      mean[i / 4][i % 4] = 0.0f;
    }
    ForHits([&](int block, auto masked) {
      float score[kTogether][2][4];
      this->template ComputeScores<masked.value, kFirst>(block, score);
      typename M::A p[kTogether], u[kTogether];
#pragma unroll
      for (int strip = 0; strip < kTogether; ++strip) {
        float other[2][4];
        this->WithCurve([&](const auto& weights) {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const int own_i = 2 * strip + e / 2 % 2, i = 2 * kFirst + own_i;
            float& s = score[strip][e / 4][e % 4];
            const float excess = Excess(coefficient, s, tau[i]);
            float own_p = excess * excess, own_u = excess;
            if constexpr (!kFast) weights.Of(excess, &own_p, &own_u);
            slope[own_i] += own_u;
            s = M::kWeightScale * own_p;
            other[e / 4][e % 4] = M::kWeightScale * own_u;
          }
        });
        p[strip] = M::FromAccumulators(score[strip][0], score[strip][1]);
        u[strip] = M::FromAccumulators(other[0], other[1]);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        uint32_t x[4];
        LoadMatrices<true>((value_address ^ (tile * 16)) + block * 16 * Tile::kRowBytes, x);
#pragma unroll
        for (int strip = 0; strip < kTogether; ++strip) {
          const int sum = strip * kTiles + tile;
          M::Multiply(p[strip], {x[0], x[1]}, output[sum]);
          M::Multiply(p[strip], {x[2], x[3]}, output[sum + 1]);
          M::Multiply(u[strip], {x[0], x[1]}, mean[sum]);
          M::Multiply(u[strip], {x[2], x[3]}, mean[sum + 1]);
        }
      }
    });
    using Sums = InfiniteSums<4 * kTogether * kTiles>;
    const bool finite = !__any_sync(kWarp, Sums::AnyNotFinite(output) || Sums::AnyNotFinite(mean));
    if (!finite) return false;
    Store<false, kFirst>(output, slope);
    Store<true, kFirst>(mean, slope);
    return true;
  }

  // One result, over the blocks that matter: sums of weight * V; weights are p, or u for the
  // weighted mean. `slope`: sum of u. Plain: Values::kAll, and no threshold above kMostTau.
  template <bool kMean, bool kPlain>
  __device__ __forceinline__ void AddValues(Values values, float (&sums)[kSums][4],
                                            float (&slope)[kRows]) {
    if (kPlain) values = Values::kAll;
#pragma unroll
    for (int i = 0; i < 4 * kSums; ++i) sums[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) slope[i] = 0.0f;
    ForHits<kPlain>([&](int block, auto masked) {
      float weight[Shape::kStrips][2][4];
      this->template ComputeScores<masked.value>(block, weight);
      this->WithCurve([&](const auto& weights) {
        Strip::ForScores(weight, [&](float& s, int i) {
          const float excess = kPlain ? Excess(coefficient, s, tau[i])
                                      : Excess(coefficient, s - maximum[i], threshold[i]);
          float p = excess * excess, u = excess;
          if constexpr (!kFast) weights.Of(excess, &p, &u);
          if constexpr (kMean) slope[i] += u;
          s = M::kWeightScale * (kMean ? u : p);
        });
      });
      typename M::A a[Shape::kStrips];
#pragma unroll
      for (int strip = 0; strip < Shape::kStrips; ++strip) {
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
        for (int strip = 0; strip < Shape::kStrips; ++strip) {
          M::Multiply(a[strip], low, sums[strip * kTiles + tile]);
          M::Multiply(a[strip], high, sums[strip * kTiles + tile + 1]);
        }
      }
    });
  }

  // Output rows and thresholds, or rows of the weighted mean. `large`: some threshold is.
  template <bool kMean>
  __device__ __forceinline__ void StoreProduct(bool large) {
    float sums[kSums][4], slope[kRows];
    InfiniteSums<4 * kSums> infinite;
    bool plain = !large, redo = false;
    Values values = Values::kAll;
#pragma unroll 1
    do {
      if (plain) {
        AddValues<kMean, true>(values, sums, slope);
      } else {
        AddValues<kMean, false>(values, sums, slope);
      }
      plain = false;
      if (values == Values::kAll) {
        redo = __any_sync(kWarp, InfiniteSums<4 * kSums>::AnyNotFinite(sums));
      }
      values = infinite.Next(values, redo, sums);
    } while (values != Values::kAll);
    Store<kMean, 0>(sums, slope);
  }

  // Stores one result of some strips from number kFirst on: every thread the pairs of columns that
  // it has.
  template <bool kMean, int kFirst, int kCount>
  __device__ __forceinline__ void Store(const float (&sums)[kCount][4],
                                        const float (&slope)[2 * kCount / kTiles]) const {
    const int lane = LaneHere();
    const auto result = ResultRows<Element>::Of(call, kMean, part.batch, head);
    const int columns = call.problem.value_dim;
    const bool whole = result.vectors && columns == kHeadDim;
    float total[2 * kCount / kTiles];
#pragma unroll
    for (int own_i = 0; own_i < 2 * kCount / kTiles; ++own_i) {
      total[own_i] = kMean ? QuadSum(slope[own_i]) : 1.0f;
    }
#pragma unroll
    for (int own_i = 0; own_i < 2 * kCount / kTiles; ++own_i) {
      const int i = 2 * kFirst + own_i;
      float scale = 1.0f / M::kWeightScale;
      if constexpr (kMean) scale = total[own_i] > 0.0f ? __fdividef(scale, total[own_i]) : 0.0f;
      if (Row(i) >= end_row) continue;
      const KeyRange range = KeyRange::Of(call.problem, part, Row(i));
      const bool empty = range.end <= range.first;
      if (!empty && isnan(tau[i])) scale = NAN;
      const int64_t row = part.first_query + Row(i);
      if (!kMean && lane % 4 == 0) {
        StoreThreshold(call, part.batch, head, row, empty ? NAN : tau[i]);
      }
      Element* const destination = result.data + row * result.row_stride;
      const auto for_pairs = [&](auto store) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const float* const sum = &sums[own_i / 2 * kTiles + tile][i % 2 * 2];
          const float pair[2] = {sum[0] * scale, sum[1] * scale};
          store(8 * tile + lane % 4 * 2, pair);
        }
      };
      if (whole) {
        for_pairs([&](int column, const float(&pair)[2]) {
          *reinterpret_cast<uint32_t*>(destination + column) = M::Pack(pair[0], pair[1]);
        });
      } else {
        for_pairs([&](int column, const float(&pair)[2]) {
          StoreColumns(destination, result.column_stride, column, columns, result.vectors, pair);
        });
      }
    }
  }
};

}  // namespace flash_entmax::cuda::forward

#endif  // FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_PRODUCT_CUH_
