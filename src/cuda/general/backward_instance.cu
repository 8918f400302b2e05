// The launch of the general backward for one element type and padded head size, given by
// FLASH_ENTMAX_ELEMENT and FLASH_ENTMAX_HEAD_DIM.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "general/backward_columns.cuh"
#include "general/backward_rows.cuh"
#include "general/backward_short_kernel.cuh"
#include "general/launch.h"
#include "general/prepare_bounds.h"
#include "general/shared_limit.h"

namespace flash_entmax::cuda {
namespace {

// How blocks are numbered: one unit after the other, a unit being what shares a key head of a batch
// entry (with packed sequences: of all sequences), so that its tiles stay in the L2 cache. Within a
// unit the key tiles come first, then the query tiles of all heads of the group. Under a causal
// mask the first keys and the last queries have most to do: they start early.
struct BackwardGrid {
  int units;        // batch entries * key heads
  int key_tiles;    // per unit
  int query_tiles;  // per unit and query head
};

// What a block does: the columns of a key head or the rows of a query head.
struct BlockTask {
  bool columns;
  int head;
  int tile;

  static __device__ __forceinline__ BlockTask Of(const GeneralProblem& problem,
                                                 const BackwardGrid& grid, int block) {
    const int unit_blocks = grid.key_tiles + problem.group * grid.query_tiles;
    const int unit = block / unit_blocks;
    const int kv_head = unit % problem.kv_heads, entry = unit / problem.kv_heads;
    const int key_tile = block % unit_blocks, rest = key_tile - grid.key_tiles;
    if (rest < 0) return {true, kv_head, entry * grid.key_tiles + key_tile};
    return {false, kv_head * problem.group + rest % problem.group,
            (entry + 1) * grid.query_tiles - 1 - rest / problem.group};
  }
};

// False, in all threads, if a sum was not finite.
template <class Variant>
__device__ __forceinline__ bool Run(const GeneralBackward& call, const BlockTask& task,
                                    const typename Variant::Shared& shared, float gradient_scale) {
  return task.columns ? BackwardColumns<Variant>(call, task.head, task.tile, shared, gradient_scale)
                      : BackwardRows<Variant>(call, task.head, task.tile, shared, gradient_scale);
}

// A function of its own, so that its registers are none of the kernel's.
template <class Careful>
__device__ __noinline__ void RunAgain(const GeneralBackward& call, const BackwardGrid& grid,
                                      const typename Careful::Shared& shared) {
  const BlockTask task = BlockTask::Of(call.problem, grid, blockIdx.x);
  constexpr bool kHalf = std::is_same_v<typename Careful::Element, __half>;
  float gradient_scale = 1.0f;
  while (true) {
    __syncthreads();
    const bool finite = Run<Careful>(call, task, shared, gradient_scale);
    if (finite || !kHalf || gradient_scale != 1.0f) return;
    gradient_scale = kScaleDown;
  }
}

template <class Variant>
__global__ void __launch_bounds__(Variant::Shape::kThreads, Variant::kBlocksPerMultiprocessor)
    GeneralBackwardKernel(const __grid_constant__ GeneralBackward call,
                          const __grid_constant__ BackwardGrid grid) {
  extern __shared__ __align__(16) char shared_bytes[];
  const typename Variant::Shared shared{reinterpret_cast<typename Variant::Element*>(shared_bytes)};
  const BlockTask task = BlockTask::Of(call.problem, grid, blockIdx.x);
  if (Run<Variant>(call, task, shared, 1.0f)) return;
  RunAgain<typename Variant::Careful>(call, grid, shared);
}

template <class Variant>
cudaError_t Launch(const GeneralBackward& call, const BackwardGrid& grid, int blocks,
                   cudaStream_t stream) {
  constexpr int kBytes = Variant::Shared::kBytes;
  const auto kernel = GeneralBackwardKernel<Variant>;
  const cudaError_t error = AllowShared(kernel, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, Variant::Shape::kThreads, kBytes, stream>>>(call, grid);
  return cudaGetLastError();
}

template <class Element, int kHeadDim, Alpha kMode>
cudaError_t LaunchShort(const GeneralBackward& call, cudaStream_t stream) {
  const ShortBackwardPlan& plan = call.short_rows;
  const auto bytes = static_cast<size_t>(plan.Bytes());
  const auto kernel = ShortBackwardKernel<Element, kHeadDim, kMode>;
  const cudaError_t error = AllowShared(kernel, bytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = static_cast<int64_t>(call.problem.batch) * call.problem.heads;
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  // Large blocks are few on a multiprocessor.
  const int threads = std::max(plan.query_rows, plan.key_rows) > 112 ? kMostShortThreads : 128;
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(call, plan);
  return cudaGetLastError();
}

template <class Element, int kHeadDim, Alpha kMode>
cudaError_t LaunchMode(const GeneralBackward& call, const BackwardGrid& grid, int blocks,
                       cudaStream_t stream) {
  const GeneralProblem& problem = call.problem;
  if constexpr (sizeof(Element) == 2 && kHeadDim == 32) {
    if (call.short_rows.query_rows > 0) {
      return LaunchShort<Element, kHeadDim, kMode>(call, stream);
    }
  }
  // Without a mean of V there is nothing else to run.
  if (call.short_rows.query_rows > 0) return cudaErrorInvalidValue;
  const auto launch = [&]<Extras kExtras>() {
    return Launch<BackwardVariant<Element, kHeadDim, kMode, kExtras, false>>(call, grid, blocks,
                                                                             stream);
  };
  if (problem.softcap > 0.0f || call.alpha_rows || call.slope_rows) {
    return launch.template operator()<Extras::kAll>();
  }
  return problem.slopes || problem.query_scale || call.query_scale_rows || !(problem.scale > 0.0f)
             ? launch.template operator()<Extras::kCommon>()
             : launch.template operator()<Extras::kNone>();
}

}  // namespace

template <class Element, int kHeadDim>
cudaError_t LaunchGeneralBackward(const GeneralBackward& call, int /*multiprocessors*/,
                                  cudaStream_t stream) {
  constexpr int kOwn = BackwardShape<Element, kHeadDim>::kOwnRows;
  const GeneralProblem& problem = call.problem;
  const int64_t entries = problem.cu_query ? 1 : problem.batch;
  if (entries == 0 || problem.heads == 0) return cudaSuccess;
  const int64_t key_tiles = problem.KeyTiles(kOwn) / entries;
  const int64_t query_tiles = problem.QueryTiles(kOwn) / entries;
  const int64_t units = entries * problem.kv_heads;
  const int64_t blocks = units * (key_tiles + problem.group * query_tiles);
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  const BackwardGrid grid{static_cast<int>(units), static_cast<int>(key_tiles),
                          static_cast<int>(query_tiles)};
  const int count = static_cast<int>(blocks);
  if (call.key_norms != nullptr) {
    const PrepareBounds bounds{problem,
                               call.key,
                               call.key_norms,
                               call.query,
                               call.saved.threshold,
                               call.query_sizes,
                               call.lowest_thresholds};
    const cudaError_t error = LaunchPrepareBounds<Element>(bounds, stream);
    if (error != cudaSuccess) return error;
  }
  if (!problem.alpha_per_head && problem.alpha == 1.5f) {
    return LaunchMode<Element, kHeadDim, Alpha::kOneAndHalf>(call, grid, count, stream);
  }
  if (!problem.alpha_per_head && problem.alpha == 2.0f) {
    return LaunchMode<Element, kHeadDim, Alpha::kTwo>(call, grid, count, stream);
  }
  return LaunchMode<Element, kHeadDim, Alpha::kGeneral>(call, grid, count, stream);
}

template cudaError_t LaunchGeneralBackward<FLASH_ENTMAX_ELEMENT, FLASH_ENTMAX_HEAD_DIM>(
    const GeneralBackward&, int, cudaStream_t);

}  // namespace flash_entmax::cuda
