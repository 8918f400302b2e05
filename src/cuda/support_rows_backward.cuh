// Backward of the list path, query side: dP, delta and dQ over each row's support.
//
// A warp takes four rows, eight lanes a row (gather.cuh):
//   dP_j = dO . V_j;  delta = sum u dP / sum u;  dS_j = u_j (dP_j - delta);  dQ = scale sum dS_j
//   K_j.
// Each entry {query, p, dS} is then written to its place among the entries of its key, which the
// forward reserved: this is the whole transposition.
// Rows whose unit went to the tile path after they had reserved places write zeros there.
// Traffic: 12 bytes read, one value row, one key row and 16 bytes written a support entry.
#ifndef FLASH_ENTMAX_CUDA_SUPPORT_ROWS_BACKWARD_CUH_
#define FLASH_ENTMAX_CUDA_SUPPORT_ROWS_BACKWARD_CUH_

#include "gather.cuh"
#include "threshold.cuh"

namespace flash_entmax::cuda {

template <class Element>
struct SupportRowsParams {
  Shape shape;
  Tensor<const Element> key, value, output_gradient;
  Tensor<Element> query_gradient;
  SavedState saved;
  const int* column_offset;  // (batch * kv_heads) x keys: exclusive sums of column_count
  ColumnEntry* column_entries;
  bool all_tiles;  // every unit took the tile path
};

constexpr int kSupportRowsThreads = 128;

template <class Element, int kHeadDim, AlphaMode kAlpha>
__global__ void __launch_bounds__(kSupportRowsThreads)
    SupportRowsBackwardKernel(const __grid_constant__ SupportRowsParams<Element> params) {
  constexpr int kWarps = kSupportRowsThreads / kWarpSize;
  constexpr int kPart = kHeadDim / kLanesPerRow;
  __shared__ int shared_key[kWarps][kRowsPerWarp][kMaxSupport + kListPadding];
  __shared__ float shared_value[kWarps][kRowsPerWarp][kMaxSupport + kListPadding];

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
      params.all_tiles ||
      params.saved.unit_flag[head * shape.Units() + row / Shape::kUnitRows] != kListPath;
  const int count = valid ? params.saved.support_count[padded_row] : 0;
  const int64_t offset = count ? params.saved.support_offset[padded_row] : 0;
  const int batch = head / shape.heads, query_head = head % shape.heads;
  const int kv_head = query_head / shape.group;
  int* const key = shared_key[warp][part];
  float* const value = shared_value[warp][part];

  if (lane == 0) key[0] = 0;
  __syncwarp();
  for (int i = lane; i < count; i += kLanesPerRow) key[i] = params.saved.support_key[offset + i];
  __syncwarp();

  const int longest = __reduce_max_sync(kFullWarp, count);
  float weighted = 0, total = 0;
  {
    float gradient[kPart];
    LoadVector<Element, kPart>(
        params.output_gradient.Row(batch, query_head, valid ? row : 0) + lane * kPart, gradient);
    const RowBase values = RowBase::Of(params.value, batch, kv_head, lane, kPart);
    for (int first = 0; first < longest; first += kLanesPerRow) {
      const int i = first + lane;
      const float excess = i < count ? params.saved.support_excess[offset + i] : 0.0f;
      const float dp = GatherDots<Element, kHeadDim>(values, key, first, count, gradient, lane);
      if (i < count) {
        float p, u;
        rule.Weights(excess, &p, &u);
        weighted = fmaf(u, dp, weighted);
        total += u;
        value[i] = dp;
      }
    }
  }
  const float delta = __fdividef(RowSum(weighted), RowSum(total));

  const size_t column_base = static_cast<size_t>(batch * shape.kv_heads + kv_head) * shape.keys;
  const int query_id = query_head % shape.group * shape.queries + row;
  for (int i = lane; i < count; i += kLanesPerRow) {
    const float excess = params.saved.support_excess[offset + i];
    float p, u;
    rule.Weights(excess, &p, &u);
    float ds = u * (value[i] - delta);
    if (tile_path) p = ds = 0.0f;
    value[i] = ds;
    const int64_t place =
        params.column_offset[column_base + key[i]] + params.saved.support_slot[offset + i];
    params.column_entries[place] = ColumnEntry{query_id, p, ds, 0};
  }
  __syncwarp();

  float sum[kPart] = {};
  GatherAccumulate<Element, kHeadDim>(RowBase::Of(params.key, batch, kv_head, lane, kPart), key,
                                      value, count, sum);
  if (valid && !tile_path) {
    StoreVector<Element, kPart>(sum, shape.scale,
                                params.query_gradient.Row(batch, query_head, row) + lane * kPart);
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_SUPPORT_ROWS_BACKWARD_CUH_
