// Backward of the list path, query side: dP, delta and dQ over each row's support.
//
// A warp takes four rows, eight lanes a row (gather.cuh), and goes over their supports twice, eight
// entries of a row at a time:
//   1. dP_j = dO . V_j, kept in shared memory; delta = sum u dP / sum u;
//   2. dS_j = u_j (dP_j - delta); the entry {query, p, dS} is written to its place among the
//      entries of its key, which the forward reserved: this is the whole transposition;
//      dQ = scale sum dS_j K_j.
// With a factor f a row (query_scale) the entries hold f dS, dQ is f times the above, and f's
// gradient is q . scale sum dS_j K_j.
// Rows whose unit went to the tile path after they had reserved places write zeros there, unless
// the places were given out again (count_columns.cuh).
// Traffic a support entry: 20 bytes read, one value row, one key row (mostly from L2) and 16 bytes
// written.
#ifndef FLASH_ENTMAX_CUDA_SUPPORT_ROWS_BACKWARD_CUH_
#define FLASH_ENTMAX_CUDA_SUPPORT_ROWS_BACKWARD_CUH_

#include "gather.cuh"
#include "launch_order.cuh"
#include "support_pool.cuh"
#include "threshold.cuh"

namespace flash_entmax::cuda {

template <class Element>
struct SupportRowsParams {
  Shape shape;
  Tensor<const Element> query, key, value, output_gradient;
  Tensor<Element> query_gradient;
  float* factor_gradient;  // (batch * heads) x queries, or null
  SavedState saved;
  const Control* control;
  const int* column_offset;  // (batch * kv_heads) x keys: exclusive sums of column_count
  ColumnEntry* column_entries;
};

constexpr int kSupportRowsThreads = 128;

// Rows of `base` named by the `key` of a row's first `count` lanes; the last of them again past it.
template <int kPart>
__device__ __forceinline__ void LoadRowsOfLanes(const RowBase& base, int key, int count,
                                                Chunk<kPart> (&chunk)[kLanesPerRow]) {
  const int last = max(count - 1, 0);
#pragma unroll
  for (int i = 0; i < kLanesPerRow; ++i) {
    chunk[i].Load(base.Row(__shfl_sync(kFullWarp, key, min(i, last), kLanesPerRow)));
  }
}

template <class Element, int kHeadDim, AlphaMode kAlpha>
__global__ void __launch_bounds__(kSupportRowsThreads, kHeadDim <= 64 ? 7 : 4)
    SupportRowsBackwardKernel(const __grid_constant__ SupportRowsParams<Element> params) {
  WaitForEarlierKernels();
  constexpr int kWarps = kSupportRowsThreads / kWarpSize;
  constexpr int kPart = kHeadDim / kLanesPerRow;
  __shared__ float shared_products[kWarps][kRowsPerWarp][kMaxSupport + kListPadding];

  const Shape& shape = params.shape;
  const AlphaRule<kAlpha> rule(shape.alpha);
  const int warp = threadIdx.x / kWarpSize, warp_lane = threadIdx.x % kWarpSize;
  const int part = warp_lane / kLanesPerRow, lane = warp_lane % kLanesPerRow;
  const int64_t padded_row =
      (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kRowsPerWarp + part;
  const int head = static_cast<int>(padded_row / shape.padded_queries);
  const int row = static_cast<int>(padded_row % shape.padded_queries);
  const bool valid = row < shape.queries;
  const bool tile_path =
      params.saved.unit_flag[head * shape.Units() + row / Shape::kUnitRows] != kListPath;
  const bool has_places = !tile_path || !PoolOverflowed(params.saved, params.control);
  const int count = valid && has_places ? params.saved.support_count[padded_row] : 0;
  const int64_t offset = count ? params.saved.support_offset[padded_row] : 0;
  const int* const keys = params.saved.support_key + offset;
  const float* const excesses = params.saved.support_excess + offset;
  const int* const slots = params.saved.support_slot + offset;
  float* const products = shared_products[warp][part];
  const int batch = head / shape.heads, query_head = head % shape.heads;
  const int kv_head = query_head / shape.group;
  const int longest = __reduce_max_sync(kFullWarp, count);

  float weighted = 0, total = 0;
  {
    float gradient[kPart];
    LoadVector<Element, kPart>(
        params.output_gradient.Row(batch, query_head, valid ? row : 0) + lane * kPart, gradient);
    const RowBase values = RowBase::Of(params.value, batch, kv_head, lane, kPart);
#pragma unroll 1
    for (int first = 0; first < longest; first += kLanesPerRow) {
      const int i = first + lane;
      const bool live = i < count;
      const int key = live ? __ldg(keys + i) : 0;
      const float excess = live ? __ldg(excesses + i) : 0.0f;
      Chunk<kPart> chunk[kLanesPerRow];
      LoadRowsOfLanes<kPart>(values, key, count - first, chunk);
      float sum[kLanesPerRow];
#pragma unroll
      for (int x = 0; x < kLanesPerRow; ++x) sum[x] = Dot<Element, kPart>(chunk[x], gradient);
      const float dp = TransposeReduce(sum, lane);
      if (live) {
        float p, u;
        rule.Weights(excess, &p, &u);
        weighted = fmaf(u, dp, weighted);
        total += u;
        products[i] = dp;
      }
    }
  }
  const float delta = __fdividef(RowSum(weighted), RowSum(total));

  // Every lane reads the products that it wrote itself.
  const int64_t column_base = static_cast<int64_t>(batch * shape.kv_heads + kv_head) * shape.keys;
  const int query_id = query_head % shape.group * shape.queries + row;
  const RowBase key_rows = RowBase::Of(params.key, batch, kv_head, lane, kPart);
  const float factor = params.saved.row_factor ? __ldg(params.saved.row_factor + padded_row) : 1.0f;
  float query_gradient[kPart] = {};
#pragma unroll 1
  for (int first = 0; first < longest; first += kLanesPerRow) {
    const int i = first + lane;
    const bool live = i < count;
    const int key = live ? __ldg(keys + i) : 0;
    Chunk<kPart> chunk[kLanesPerRow];
    LoadRowsOfLanes<kPart>(key_rows, key, count - first, chunk);
    float ds = 0.0f;
    if (live) {
      float p, u;
      rule.Weights(__ldg(excesses + i), &p, &u);
      ds = u * (products[i] - delta);
      if (tile_path) p = ds = 0.0f;
      const int64_t place =
          static_cast<int64_t>(__ldg(params.column_offset + column_base + key)) + __ldg(slots + i);
      params.column_entries[place] = ColumnEntry{query_id, p, ds * factor, 0};
    }
#pragma unroll
    for (int x = 0; x < kLanesPerRow; ++x) {
      const float weight = __shfl_sync(kFullWarp, ds, x, kLanesPerRow);
      if (first + x < count) Accumulate<Element, kPart>(weight, chunk[x], query_gradient);
    }
  }
  if (valid && !tile_path) {
    StoreVector<Element, kPart>(query_gradient, shape.scale * factor,
                                params.query_gradient.Row(batch, query_head, row) + lane * kPart);
  }
  if (params.factor_gradient) {
    float query[kPart], product = 0.0f;
    LoadVector<Element, kPart>(params.query.Row(batch, query_head, valid ? row : 0) + lane * kPart,
                               query);
#pragma unroll
    for (int i = 0; i < kPart; ++i) product = fmaf(query[i], query_gradient[i], product);
    product = RowSum(product);
    if (valid && !tile_path && lane == 0) {
      params.factor_gradient[static_cast<int64_t>(head) * shape.queries + row] =
          shape.scale * product;
    }
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_SUPPORT_ROWS_BACKWARD_CUH_
