// The results of one strip of the short forward kernel: output rows and rows of the weighted mean.
// forward_short.cuh has the algorithm and the kernel.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_PRODUCT_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_PRODUCT_CUH_

#include "general/forward_short_strip.cuh"

namespace flash_entmax::cuda::forward {

template <class Element, int kHeadDim, int kSplit, bool kFast, int kHeldBlocks>
struct ShortProduct : ShortStrip<Element, kHeadDim, kSplit, kFast, kHeldBlocks> {
  using Strip = ShortStrip<Element, kHeadDim, kSplit, kFast, kHeldBlocks>;
  using M = Mma<Element>;
  using Shape = ShortShape<Element, kHeadDim, kSplit, kHeldBlocks>;
  using Tile = SharedTile<Element, kHeadDim>;
  using Strip::call;
  using Strip::coefficient;
  using Strip::curve;
  using Strip::end_row;
  using Strip::first_row;
  using Strip::ForBlocks;
  using Strip::head;
  using Strip::part;
  using Strip::score;
  using Strip::Sync;
  using Strip::team;
  using Strip::threshold;
  using Strip::warp;
  static constexpr int kTiles = Shape::kColumns / 8;  // accumulators of a warp's sums

  // The warp's part of the sums of weight * V over columns [first_column, first_column + kColumns);
  // weights are p, or u for the weighted mean. `slope`: sum of u. Plain: Values::kAll.
  template <bool kMean, bool kPlain>
  __device__ __forceinline__ void AddValues(Values values, const Tile& value, int key_row,
                                            int first_column, float (&sums)[kTiles][4],
                                            float (&slope)[2]) {
    if (kPlain) values = Values::kAll;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) sums[i / 4][i % 4] = 0.0f;
    slope[0] = slope[1] = 0.0f;
    ForBlocks([&](int block, int first) {
      float weight[2][4];
      const auto weigh = [&](const auto& weights) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int i = e / 2 % 2;
          const float excess = Excess(coefficient, score[block][e / 4][e % 4], threshold[i]);
          float p = excess * excess, u = excess;
          if constexpr (!kFast) weights.Of(excess, &p, &u);
          if constexpr (kMean) slope[i] += u;
          weight[e / 4][e % 4] = M::kWeightScale * (kMean ? u : p);
        }
      };
      if constexpr (kFast) {
        weigh(Weights<Alpha::kOneAndHalf>{});
      } else {
        WithMode(curve, weigh);
      }
      SelectWeights(values, weight);
      AddWeightedValues<Element>(weight[0], weight[1], value, key_row + first, first_column, values,
                                 sums);
    });
  }

  template <bool kMean>
  __device__ __forceinline__ void ComputeSums(const Tile& value, int key_row, int first_column,
                                              float (&sums)[kTiles][4], float (&slope)[2]) {
    AddValues<kMean, true>(Values::kAll, value, key_row, first_column, sums, slope);
    InfiniteSums<4 * kTiles> infinite;
    bool redo = __any_sync(kWarp, InfiniteSums<4 * kTiles>::AnyNotFinite(sums));
    Values values = infinite.Next(Values::kAll, redo, sums);
#pragma unroll 1
    while (values != Values::kAll) {
      AddValues<kMean, false>(values, value, key_row, first_column, sums, slope);
      values = infinite.Next(values, redo, sums);
    }
  }

  // Output rows, or rows of the weighted mean.
  template <bool kMean>
  __device__ __forceinline__ void StoreProduct(const Tile& value, int key_row) {
    const int lane = threadIdx.x % 32;
    const ResultRows<Element> result = ResultRows<Element>::Of(call, kMean, part.batch, head);
    const int columns = call.problem.value_dim;
#pragma unroll 1
    for (int first_column = 0; first_column < kHeadDim; first_column += Shape::kColumns) {
      if (first_column >= columns) break;
      float sums[kTiles][4], slope[2];
      ComputeSums<kMean>(value, key_row, first_column, sums, slope);
      // The team may still be storing what it summed before; not at the first product of a split
      // row, which comes after the barriers of the threshold.
      if (kSplit == 1 || kMean || first_column > 0) Sync();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int strip_row = lane / 4 + 8 * i;
        if constexpr (kMean) {
          const float total = QuadSum(slope[i]);
          if (lane % 4 == 0) team.slope[warp][strip_row] = total;
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          *reinterpret_cast<float2*>(&team.sums[warp][strip_row][8 * tile + 2 * (lane % 4)]) =
              make_float2(sums[tile][2 * i], sums[tile][2 * i + 1]);
        }
      }
      Sync();
      constexpr int kPieces = Shape::kColumns / 4;
#pragma unroll 2
      for (int first = 0; first < kStripRows * kPieces; first += 32 * kSplit) {
        const int piece = first + warp * 32 + lane;
        const int strip_row = piece / kPieces, column = piece % kPieces * 4;
        const int own_row = first_row + strip_row;
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        float total = 0.0f;
#pragma unroll
        for (int other = 0; other < kSplit; ++other) {
          const float4 y = *reinterpret_cast<float4*>(&team.sums[other][strip_row][column]);
          x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
          if constexpr (kMean) total += team.slope[other][strip_row];
        }
        float factor = 1.0f / M::kWeightScale;
        if (kMean) factor = total > 0.0f ? __fdividef(factor, total) : 0.0f;
        factor += team.invalid[strip_row];
#pragma unroll
        for (float& y : x) y *= factor;
        if (own_row < end_row) {
          StoreColumns<4>(result.data + (part.first_query + own_row) * result.row_stride,
                          result.column_stride, first_column + column, columns, result.vectors, x);
        }
      }
      __syncwarp();
    }
  }
};

}  // namespace flash_entmax::cuda::forward

#endif  // FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_PRODUCT_CUH_
