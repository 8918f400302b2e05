// Forward launch sequence. Compiled once for each element type and head size:
//   -DFLASH_ENTMAX_ELEMENT=__nv_bfloat16|__half -DFLASH_ENTMAX_HEAD_DIM=32|64|128
#include "finish_forward.cuh"
#include "launch_support.h"
#include "prepare_keys.cuh"
#include "row_results.h"
#include "screen_forward.cuh"
#include "tile_forward.cuh"

namespace flash_entmax::cuda {

template <class Element, int kHeadDim>
int LaunchForward(const Plan& plan, const DeviceLimits& device,
                  const FlashEntmaxForwardTensors& tensors, const SavedBuffers& saved,
                  const ForwardScratch& scratch, cudaStream_t stream) {
  const Shape& shape = plan.shape;
  const auto query = AsTensor<const Element>(tensors.query);
  const auto key = AsTensor<const Element>(tensors.key);
  const auto value = AsTensor<const Element>(tensors.value);
  const auto output = AsTensor<Element>(tensors.output);
  const TensorExtent extent{kHeadDim, shape.keys, shape.kv_heads, shape.batch};
  constexpr int kTileKeys = TileForwardTraits<kHeadDim, false>::kTileKeys;
  CUtensorMap screen_map, key_map, value_map;
  if (!MakeTensorMap(tensors.key, kIsFp16<Element>, extent, kTileKeys, &key_map) ||
      !MakeTensorMap(tensors.value, kIsFp16<Element>, extent, kTileKeys, &value_map)) {
    return FLASH_ENTMAX_CUDA_FAILURE;
  }
  if (!plan.tiles_only) {
    FlashEntmaxTensor screened = tensors.key;
    if (scratch.half_keys) {
      const int64_t head_stride = static_cast<int64_t>(shape.keys) * kHeadDim;
      screened = {scratch.half_keys, {head_stride * shape.kv_heads, head_stride, kHeadDim}};
    }
    if (!MakeTensorMap(screened, true, extent, ScreenTraits<kHeadDim>::kTileKeys, &screen_map)) {
      return FLASH_ENTMAX_CUDA_FAILURE;
    }
  }
  const FlashEntmaxTensor& factors = tensors.query_scale;
  if (plan.scaled && CopyRowFactors(static_cast<const float*>(factors.data), factors.stride,
                                    shape.batch, shape.heads, shape.queries, shape.padded_queries,
                                    saved.state.row_factor, stream) != cudaSuccess) {
    return FLASH_ENTMAX_CUDA_FAILURE;
  }
  if (cudaMemsetAsync(saved.control, 0, saved.zeroed_bytes, stream) != cudaSuccess) {
    return FLASH_ENTMAX_CUDA_FAILURE;
  }
  return ForAlphaMode(plan.alpha_mode, [&](auto alpha) -> int {
    constexpr AlphaMode kAlpha = decltype(alpha)::value;
    if (!plan.tiles_only) {
      const int key_blocks = static_cast<int>(CeilDiv(shape.keys, kPrepareKeysRows));
      if (!Launch(PrepareKeysKernel<Element, kHeadDim>,
                  static_cast<int64_t>(key_blocks) * shape.KeyHeads(), kPrepareKeysThreads, 0,
                  stream, shape, key, key_blocks, saved.key_norms, scratch.half_keys)) {
        return FLASH_ENTMAX_CUDA_FAILURE;
      }
      for (int first = 0; first < shape.BatchHeads(); first += plan.heads_per_launch) {
        const int heads = std::min(plan.heads_per_launch, shape.BatchHeads() - first);
        if (first > 0 &&
            cudaMemsetAsync(&saved.control->next_item, 0, sizeof(int), stream) != cudaSuccess) {
          return FLASH_ENTMAX_CUDA_FAILURE;
        }
        const ScreenParams<Element> screen{shape,
                                           query,
                                           saved.key_norms,
                                           scratch.lists,
                                           scratch.list_count,
                                           scratch.bound,
                                           saved.state,
                                           saved.control,
                                           first,
                                           heads,
                                           plan.deferred_keys};
        if (!Launch(ScreenForwardKernel<Element, kHeadDim, kAlpha>, device.multiprocessors,
                    ScreenTraits<kHeadDim>::kThreads, sizeof(ScreenShared<kHeadDim>), stream,
                    screen_map, screen)) {
          return FLASH_ENTMAX_CUDA_FAILURE;
        }
        const auto row_bytes = [](const auto& tensor) {
          return static_cast<uint32_t>(tensor.strides.row * sizeof(Element));
        };
        const FinishParams<Element> finish{
            shape,
            query,
            key,
            value,
            output,
            row_bytes(query),
            row_bytes(key),
            row_bytes(value),
            cutlass::FastDivmod(shape.heads),
            cutlass::FastDivmod(shape.group),
            cutlass::FastDivmod(shape.padded_queries / kQueriesPerWarp),
            scratch.lists,
            scratch.list_count,
            scratch.bound,
            saved.state,
            saved.control,
            first,
            plan.save};
        const int64_t blocks =
            static_cast<int64_t>(heads) * shape.padded_queries / kFinishBlockRows;
        if (!Launch(FinishForwardKernel<Element, kHeadDim, kAlpha>, blocks, kFinishThreads,
                    sizeof(FinishShared), stream, finish)) {
          return FLASH_ENTMAX_CUDA_FAILURE;
        }
      }
    }
    const TileForwardParams<Element> tile{shape,           query,       output,
                                          scratch.bound,   saved.state, saved.control,
                                          plan.tiles_only, key,         value};
    const auto launch_tiles = [&](auto save) {
      constexpr bool kSave = decltype(save)::value;
      return Launch(TileForwardKernel<Element, kHeadDim, kAlpha, kSave>, device.multiprocessors,
                    TileForwardTraits<kHeadDim, kSave>::kThreads,
                    sizeof(TileForwardShared<kHeadDim, kSave>), stream, key_map, value_map, tile);
    };
    const bool launched =
        plan.save ? launch_tiles(std::true_type()) : launch_tiles(std::false_type());
    return launched ? FLASH_ENTMAX_OK : FLASH_ENTMAX_CUDA_FAILURE;
  });
}

template int LaunchForward<FLASH_ENTMAX_ELEMENT, FLASH_ENTMAX_HEAD_DIM>(
    const Plan&, const DeviceLimits&, const FlashEntmaxForwardTensors&, const SavedBuffers&,
    const ForwardScratch&, cudaStream_t);

}  // namespace flash_entmax::cuda
