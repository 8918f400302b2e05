// Forward launches of the general engine. Compiled once for each element type and padded head size:
//   -DFLASH_ENTMAX_ELEMENT=__nv_bfloat16|__half|float -DFLASH_ENTMAX_HEAD_DIM=32|64|128|256
#include <algorithm>
#include <climits>

#include "general/forward_short.cuh"
#include "general/forward_short_sweeps.cuh"
#include "general/forward_tiled.cuh"
#include "general/prepare_bounds.h"
#include "general/shared_limit.h"

namespace flash_entmax::cuda {
namespace forward {
namespace {

// Shared memory of the current device, in bytes.
struct SharedLimits {
  int block = 0;
  int multiprocessor = 0;
};

cudaError_t ReadSharedLimits(SharedLimits* limits) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limits->block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limits->multiprocessor,
                                   cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  }
  return error;
}

// Launches `blocks` blocks with dynamic shared memory.
template <class... Parameters, class... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  const cudaError_t error = AllowShared(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  // As much shared memory a multiprocessor as there is: the plans count on several blocks.
  const cudaError_t preferred = cudaFuncSetAttribute(
      kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (preferred != cudaSuccess) return preferred;
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

// Keys from the first to the last one that some of `rows` neighbouring queries sees, at most.
int64_t SpanOfRows(const GeneralProblem& problem, int64_t rows) {
  const int64_t right = problem.causal ? 0 : problem.window_right;
  return std::min<int64_t>(problem.longest_key, rows + problem.window_left + right);
}

// Keys that the blocks of 16 of one strip cover; blocks start at multiples of 16 from the first key
// of the tile.
int64_t KeysOfStrip(const GeneralProblem& problem) {
  return SpanOfRows(problem, 2 * kStripRows - 1);
}

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// z is a positive multiple of the dot product, and alpha = 1.5.
bool IsFast(const GeneralProblem& problem) {
  return problem.alpha == 1.5f && !problem.alpha_per_head && problem.scale > 0.0f &&
         !problem.query_scale && !problem.slopes && !(problem.softcap > 0.0f);
}

// A plan for the short kernel; without teams if its tiles do not fit in shared memory.
template <class Shape>
ShortPlan PlanShort(const GeneralProblem& problem, int split, int max_threads,
                    const SharedLimits& limits, int multiprocessors) {
  const int64_t strips = RoundUp(std::max(problem.longest_query, 1), kStripRows) / kStripRows;
  const int most_teams = max_threads / (32 * split);
  const auto with = [&](int teams, int stages) {
    ShortPlan plan;
    plan.teams = teams;
    plan.stages = stages;
    plan.stage_rows = teams * Shape::kTurns * kStripRows;
    plan.key_rows = static_cast<int>(RoundUp(SpanOfRows(problem, plan.BlockRows()), kStripRows));
    return plan;
  };
  const auto fits = [&](const ShortPlan& plan, int blocks) {
    // A block takes 1 KB more than it asks for.
    const auto bytes = static_cast<int64_t>(Shape::Bytes(plan));
    return bytes <= limits.block && (bytes + 1024) * blocks <= limits.multiprocessor;
  };
  const auto stages_of = [&](int teams) {
    const int64_t stage_rows = static_cast<int64_t>(teams) * Shape::kTurns * kStripRows;
    const int64_t all = (strips * kStripRows + stage_rows - 1) / stage_rows;
    // A block of many queries reads keys once for all of them, but the device needs enough blocks.
    int64_t stages = std::min<int64_t>(all, std::max<int64_t>(1, 512 / stage_rows));
    const int64_t heads = static_cast<int64_t>(problem.sequences) * problem.heads;
    while (stages > 1 && heads * ((all + stages - 1) / stages) < 8 * multiprocessors) {
      stages = (stages + 1) / 2;
    }
    return static_cast<int>(stages);
  };
  // Two blocks a multiprocessor hide each other's start and end; one large block is second best.
  const auto half = static_cast<int>(
      std::min<int64_t>((strips + Shape::kTurns - 1) / Shape::kTurns, split == 1 ? 4 : 8 / split));
  for (int stages : {stages_of(half), 1}) {
    for (int teams = half; teams > 0; teams /= 2) {
      const ShortPlan plan = with(teams, stages);
      if (fits(plan, 2)) return plan;
      const auto most = static_cast<int>(std::min<int64_t>(strips, most_teams));
      for (int more = std::min(2 * teams, most); more >= teams; --more) {
        const ShortPlan large = with(more, stages);
        if (fits(large, 1)) return large;
      }
    }
  }
  return {};
}

// Runs the short kernel if it can; otherwise *launched stays false.
template <class Element, int kHeadDim, int kSplit, bool kFast, int kHeldBlocks = 8>
cudaError_t TryShort(const GeneralForward& call, const SharedLimits& limits, int multiprocessors,
                     cudaStream_t stream, bool* launched) {
  using Shape = ShortShape<Element, kHeadDim, kSplit, kHeldBlocks>;
  // Where not even the fewest keys that come here would fit, the kernel is not compiled.
  constexpr int kFewestKeys = kSplit == 1 ? 0 : Shape::kCapacity / 2;
  constexpr size_t kMostShared = 227 * 1024;
  if constexpr (Shape::Bytes({1, 1, 16 * Shape::kTurns, kFewestKeys, 0}) > kMostShared) {
    return cudaSuccess;
  } else {
    ShortPlan plan =
        PlanShort<Shape>(call.problem, kSplit, Shape::MaxThreads(kFast), limits, multiprocessors);
    if (plan.teams == 0) return cudaSuccess;
    const int64_t tiles = call.problem.QueryTiles(plan.BlockRows());
    if (tiles > INT_MAX) return cudaErrorInvalidConfiguration;
    plan.tiles = static_cast<int>(tiles);
    *launched = true;
    return Launch(ShortForwardKernel<Element, kHeadDim, kSplit, kFast, kHeldBlocks>,
                  tiles * call.problem.heads, 32 * kSplit * plan.teams, Shape::Bytes(plan), stream,
                  call, plan);
  }
}

// A plan for the sweeping kernel; without warps if its tiles do not fit in shared memory.
template <class Shape>
SweepPlan PlanSweep(const GeneralProblem& problem, const SharedLimits& limits,
                    int multiprocessors) {
  const int64_t strips =
      RoundUp(std::max(problem.longest_query, 1), Shape::kQueries) / Shape::kQueries;
  const auto with = [&](int64_t warps, int turns) {
    SweepPlan plan;
    plan.strip_rows = Shape::kQueries;
    plan.warps = static_cast<int>(warps);
    plan.turns = turns;
    plan.key_rows = static_cast<int>(RoundUp(SpanOfRows(problem, plan.BlockRows()), 32));
    return plan;
  };
  const auto fits = [&](const SweepPlan& plan, int blocks) {
    // A block takes 1 KB more than it asks for.
    const auto bytes = static_cast<int64_t>(Shape::Bytes(plan));
    return bytes <= limits.block && (bytes + 1024) * blocks <= limits.multiprocessor;
  };
  // Two strips a warp or more, so that long ones and short ones even out, and few blocks, each of
  // which reads the keys. A small grid needs blocks more than that.
  constexpr int kMostWarps = Shape::kMaxThreads / 32, kMostTurns = 3;
  const int64_t heads = static_cast<int64_t>(problem.sequences) * problem.heads;
  int64_t warps = std::min<int64_t>(kMostWarps, (strips + 1) / 2);
  int turns = static_cast<int>(std::min<int64_t>(kMostTurns, (strips + warps - 1) / warps));
  const auto is_small = [&] {
    return heads * ((strips + warps * turns - 1) / (warps * turns)) < 2 * multiprocessors;
  };
  if (is_small()) {
    turns = 1;
    warps = std::min<int64_t>(kMostWarps, strips);
    while (warps > 2 && is_small()) warps = (warps + 1) / 2;
  }
  // Two blocks a multiprocessor hide each other's start and end.
  for (int blocks : {2, 1}) {
    for (int64_t fewer = warps; fewer >= (blocks == 2 ? (warps + 1) / 2 : 1); --fewer) {
      const SweepPlan plan = with(fewer, turns);
      if (fits(plan, blocks)) return plan;
    }
  }
  return {};
}

// Runs the sweeping kernel if it can; otherwise *launched stays false.
template <class Element, int kHeadDim, bool kFast>
cudaError_t TrySweep(const GeneralForward& call, const SharedLimits& limits, int multiprocessors,
                     cudaStream_t stream, bool* launched) {
  using Shape = SweepShape<kHeadDim>;
  // Blocks of a strip start at a multiple of 32 keys from the first one of the tile.
  if (SpanOfRows(call.problem, Shape::kQueries + 31) > 16 * Shape::kMostBlocks) return cudaSuccess;
  SweepPlan plan = PlanSweep<Shape>(call.problem, limits, multiprocessors);
  if (plan.warps == 0) return cudaSuccess;
  const int64_t tiles = call.problem.QueryTiles(plan.BlockRows());
  if (tiles > INT_MAX) return cudaErrorInvalidConfiguration;
  plan.tiles = static_cast<int>(tiles);
  *launched = true;
  return Launch(SweepForwardKernel<Element, kHeadDim, kFast>, tiles * call.problem.heads,
                32 * plan.warps, Shape::Bytes(plan), stream, call, plan);
}

template <class Element, int kHeadDim, bool kFast>
cudaError_t LaunchForward(const GeneralForward& call, int multiprocessors, cudaStream_t stream) {
  SharedLimits limits;
  cudaError_t error = ReadSharedLimits(&limits);
  if (error != cudaSuccess) return error;
  const int64_t keys = KeysOfStrip(call.problem);
  bool launched = false;
  const auto try_short = [&]<int kSplit>() {
    return TryShort<Element, kHeadDim, kSplit, kFast>(call, limits, multiprocessors, stream,
                                                      &launched);
  };
  if (sizeof(Element) == 2 && kHeadDim == 32 && keys <= 96) {
    // Fewer scores to hold, so more warps a multiprocessor. The most common short rows only.
    if constexpr (sizeof(Element) == 2 && kHeadDim == 32) {
      error = TryShort<Element, kHeadDim, 1, kFast, 6>(call, limits, multiprocessors, stream,
                                                       &launched);
    }
  } else if (keys <= 128) {
    error = try_short.template operator()<1>();
  } else if constexpr (sizeof(Element) == 2 && kHeadDim <= 64) {
    error = TrySweep<Element, kHeadDim, kFast>(call, limits, multiprocessors, stream, &launched);
  } else if (keys <= 256) {
    error = try_short.template operator()<2>();
  } else if (keys <= 512) {
    error = try_short.template operator()<4>();
  }
  if (launched || error != cudaSuccess) return error;
  using Shape = TiledShape<Element, kHeadDim>;
  const int64_t tiles = call.problem.QueryTiles(Shape::kRows);
  if (tiles > INT_MAX) return cudaErrorInvalidConfiguration;
  if (call.key_norms != nullptr) {
    PrepareBounds norms;
    norms.problem = call.problem;
    norms.key = call.key;
    norms.key_norms = call.key_norms;
    error = LaunchPrepareBounds<Element>(norms, stream);
    if (error != cudaSuccess) return error;
  }
  return Launch(TiledForwardKernel<Element, kHeadDim, kFast>, tiles * call.problem.heads,
                Shape::kThreads, Shape::kBytes, stream, call, static_cast<int>(tiles));
}

}  // namespace
}  // namespace forward

template <class Element, int kHeadDim>
cudaError_t LaunchGeneralForward(const GeneralForward& call, int multiprocessors,
                                 cudaStream_t stream) {
  return forward::IsFast(call.problem)
             ? forward::LaunchForward<Element, kHeadDim, true>(call, multiprocessors, stream)
             : forward::LaunchForward<Element, kHeadDim, false>(call, multiprocessors, stream);
}

template cudaError_t LaunchGeneralForward<FLASH_ENTMAX_ELEMENT, FLASH_ENTMAX_HEAD_DIM>(
    const GeneralForward&, int, cudaStream_t);

}  // namespace flash_entmax::cuda
