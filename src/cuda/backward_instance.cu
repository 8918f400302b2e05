// Backward launch sequence. Compiled like forward_instance.cu.
#include "count_columns.cuh"
#include "launch_support.h"
#include "long_columns_backward.cuh"
#include "support_columns_backward.cuh"
#include "support_rows_backward.cuh"
#include "tile_columns_backward.cuh"
#include "tile_rows_backward.cuh"

namespace flash_entmax::cuda {

template <class Element, int kHeadDim>
int LaunchBackward(const Plan& plan, const DeviceLimits& device,
                   const FlashEntmaxBackwardTensors& tensors, const SavedBuffers& saved,
                   const BackwardScratch& scratch, cudaStream_t stream) {
  const Shape& shape = plan.shape;
  const auto query = AsTensor<const Element>(tensors.query);
  const auto key = AsTensor<const Element>(tensors.key);
  const auto value = AsTensor<const Element>(tensors.value);
  const auto output_gradient = AsTensor<const Element>(tensors.output_gradient);
  const auto query_gradient = AsTensor<Element>(tensors.query_gradient);
  float* const factor_gradient = plan.scaled ? tensors.query_scale_gradient : nullptr;
  const int64_t columns = static_cast<int64_t>(shape.KeyHeads()) * shape.keys;
  using RowsTraits = TileRowsTraits<kHeadDim>;
  using ColumnsTraits = TileColumnsTraits<kHeadDim>;
  const TensorExtent query_extent{kHeadDim, shape.queries, shape.heads, shape.batch};
  const TensorExtent key_extent{kHeadDim, shape.keys, shape.kv_heads, shape.batch};
  CUtensorMap key_map, value_map, query_map, gradient_map;
  constexpr bool kFp16 = kIsFp16<Element>;
  static_assert(RowsTraits::kTileKeys == ColumnsTraits::kBlockKeys);
  if (!MakeTensorMap(tensors.key, kFp16, key_extent, RowsTraits::kTileKeys, &key_map) ||
      !MakeTensorMap(tensors.value, kFp16, key_extent, RowsTraits::kTileKeys, &value_map) ||
      !MakeTensorMap(tensors.query, kFp16, query_extent, ColumnsTraits::kStepQueries, &query_map) ||
      !MakeTensorMap(tensors.output_gradient, kFp16, query_extent, ColumnsTraits::kStepQueries,
                     &gradient_map)) {
    return FLASH_ENTMAX_CUDA_FAILURE;
  }
  const size_t block_flag_bytes = static_cast<size_t>(shape.KeyHeads()) * plan.padded_keys /
                                  ColumnsTraits::kBlockKeys * sizeof(int);
  if (cudaMemsetAsync(&saved.control->long_column_count, 0, sizeof(int), stream) != cudaSuccess ||
      cudaMemsetAsync(scratch.tile_block_flag, 0, block_flag_bytes, stream) != cudaSuccess) {
    return FLASH_ENTMAX_CUDA_FAILURE;
  }
  return ForAlphaMode(plan.alpha_mode, [&](auto alpha) -> int {
    constexpr AlphaMode kAlpha = decltype(alpha)::value;
    const TileRowsParams<Element> tile_rows{
        shape,         query,         output_gradient, query_gradient,  saved.state,
        saved.control, scratch.delta, factor_gradient, plan.tiles_only, key,
        value};
    const TileColumnsParams<Element> tile_columns{shape,
                                                  key,
                                                  value,
                                                  saved.state,
                                                  saved.control,
                                                  scratch.delta,
                                                  scratch.tile_key_gradient,
                                                  scratch.tile_value_gradient,
                                                  scratch.tile_block_flag,
                                                  plan.padded_keys,
                                                  plan.tiles_only,
                                                  query,
                                                  output_gradient};
    if (!Launch(TileRowsBackwardKernel<Element, kHeadDim, kAlpha>, device.multiprocessors,
                RowsTraits::kThreads, sizeof(TileRowsShared<kHeadDim>), stream, key_map, value_map,
                tile_rows) ||
        !Launch(TileColumnsBackwardKernel<Element, kHeadDim, kAlpha>, device.multiprocessors,
                ColumnsTraits::kThreads, sizeof(TileColumnsShared<kHeadDim>), stream, query_map,
                gradient_map, key_map, value_map, tile_columns)) {
      return FLASH_ENTMAX_CUDA_FAILURE;
    }
    // Without lists there is no support to go over, only sums of the tile path to convert.
    if (!plan.tiles_only) {
      const int64_t padded_rows = static_cast<int64_t>(shape.BatchHeads()) * shape.padded_queries;
      const int count_blocks = 4 * device.multiprocessors;
      if (!Launch(ClearColumnsKernel, count_blocks, kCountColumnsThreads, 0, stream, saved.state,
                  saved.control, columns) ||
          !Launch(CountColumnsKernel, count_blocks, kCountColumnsThreads, 0, stream, shape,
                  saved.state, saved.control)) {
        return FLASH_ENTMAX_CUDA_FAILURE;
      }
      if (ExclusiveSum(scratch.scan, scratch.scan_bytes, saved.state.column_count,
                       scratch.column_offset, columns, stream) != cudaSuccess) {
        return FLASH_ENTMAX_CUDA_FAILURE;
      }
      const SupportRowsParams<Element> rows{shape,
                                            query,
                                            key,
                                            value,
                                            output_gradient,
                                            query_gradient,
                                            factor_gradient,
                                            saved.state,
                                            saved.control,
                                            scratch.column_offset,
                                            scratch.column_entries};
      const int64_t row_blocks = padded_rows / (kSupportRowsThreads / kLanesPerRow);
      if (!Launch(SupportRowsBackwardKernel<Element, kHeadDim, kAlpha>, row_blocks,
                  kSupportRowsThreads, 0, stream, rows)) {
        return FLASH_ENTMAX_CUDA_FAILURE;
      }
    }
    const SupportColumnsParams<Element> column_params{shape,
                                                      query,
                                                      output_gradient,
                                                      AsTensor<Element>(tensors.key_gradient),
                                                      AsTensor<Element>(tensors.value_gradient),
                                                      saved.state.column_count,
                                                      scratch.column_offset,
                                                      scratch.column_entries,
                                                      scratch.order,
                                                      scratch.long_tasks,
                                                      scratch.long_sums,
                                                      saved.control,
                                                      scratch.tile_key_gradient,
                                                      scratch.tile_value_gradient,
                                                      scratch.tile_block_flag,
                                                      plan.padded_keys};
    constexpr int kColumnsPerBlock = kSupportColumnsThreads / kWarpSize * kColumnsPerWarp;
    if (!Launch(SupportColumnsBackwardKernel<Element, kHeadDim>, CeilDiv(columns, kColumnsPerBlock),
                kSupportColumnsThreads, 0, stream, column_params)) {
      return FLASH_ENTMAX_CUDA_FAILURE;
    }
    if (!plan.tiles_only &&
        !Launch(LongColumnsBackwardKernel<Element, kHeadDim>, 3 * device.multiprocessors,
                kLongColumnsThreads, 0, stream, column_params)) {
      return FLASH_ENTMAX_CUDA_FAILURE;
    }
    return FLASH_ENTMAX_OK;
  });
}

template int LaunchBackward<FLASH_ENTMAX_ELEMENT, FLASH_ENTMAX_HEAD_DIM>(
    const Plan&, const DeviceLimits&, const FlashEntmaxBackwardTensors&, const SavedBuffers&,
    const BackwardScratch&, cudaStream_t);

}  // namespace flash_entmax::cuda
