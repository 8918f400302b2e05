// A warp has a group of 64 rows, a lane two of them. Memory traffic: keys (and queries) once.
#include "general/prepare_bounds.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>

#include "general/tile_bounds.cuh"

namespace flash_entmax::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum of the squares of a row.
template <class Element>
__device__ __forceinline__ float Squares(const Element* row, int64_t column_stride, int columns,
                                         bool vectors) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(Element));
  float sum = 0.0f;
  if (vectors && columns % kVector == 0) {
#pragma unroll 4
    for (int column = 0; column < columns; column += kVector) {
      const uint4 piece = *reinterpret_cast<const uint4*>(row + column);
      const auto* const elements = reinterpret_cast<const Element*>(&piece);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float x = static_cast<float>(elements[i]);
        sum = fmaf(x, x, sum);
      }
    }
  } else {
#pragma unroll 1
    for (int column = 0; column < columns; ++column) {
      const float x = static_cast<float>(row[column * column_stride]);
      sum = fmaf(x, x, sum);
    }
  }
  return sum;
}

__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

template <class Element>
__device__ __forceinline__ void PrepareKeys(const PrepareBounds& call, int head, int tile) {
  const GeneralProblem& problem = call.problem;
  const TilePlace place = PlaceTile<true>(problem, tile, BoundGroups::kRows);
  const SequencePart& part = place.part;
  if (place.first >= part.keys) return;  // nobody reads it
  const Element* const keys = call.key.Row<const Element>(part.batch, head, part.first_key);
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < BoundGroups::kRows; i += 32) {
    const int row = place.first + i + static_cast<int>(threadIdx.x) % 32;
    if (row >= part.keys) continue;
    const float squares =
        Squares(keys + row * call.key.row, call.key.column, problem.head_dim, call.key.vectors);
    largest = fmaxf(largest, NormBound(squares, kKeyNormSlack));
  }
  largest = WarpMax(largest);
  if (threadIdx.x % 32 == 0) {
    call.key_norms[BoundGroups::Of(problem, part, head, true) + place.first / BoundGroups::kRows] =
        largest;
  }
}

template <class Element>
__device__ __forceinline__ void PrepareQueries(const PrepareBounds& call, int head, int tile) {
  const GeneralProblem& problem = call.problem;
  const TilePlace place = PlaceTile<false>(problem, tile, BoundGroups::kRows);
  const SequencePart& part = place.part;
  if (place.first >= part.queries) return;
  const Element* const queries = call.query.Row<const Element>(part.batch, head, part.first_query);
  const float* const threshold =
      call.threshold + (static_cast<int64_t>(part.batch) * problem.heads + head) * problem.queries +
      part.first_query;
  float largest = 0.0f, minus_lowest = -INFINITY;
#pragma unroll
  for (int i = 0; i < BoundGroups::kRows; i += 32) {
    const int row = place.first + i + static_cast<int>(threadIdx.x) % 32;
    const KeyRange seen = KeyRange::Of(problem, part, row);
    if (seen.end <= seen.first) continue;  // no such row, or one that sees no key
    const float squares = Squares(queries + row * call.query.row, call.query.column,
                                  problem.head_dim, call.query.vectors);
    const float factor = AlphaCurve::Of(problem, head).order * FactorOf(problem, part, head, row);
    const float size = fabsf(factor) * NormBound(squares, kQueryNormSlack);
    largest = fmaxf(largest, isnan(size) ? INFINITY : size);
    minus_lowest = fmaxf(minus_lowest, isnan(threshold[row]) ? INFINITY : -threshold[row]);
  }
  largest = WarpMax(largest);
  minus_lowest = WarpMax(minus_lowest);
  if (threadIdx.x % 32 == 0) {
    const int64_t group =
        BoundGroups::Of(problem, part, head, false) + place.first / BoundGroups::kRows;
    call.query_sizes[group] = largest;
    call.lowest_thresholds[group] = -minus_lowest;
  }
}

template <class Element>
__global__ void __launch_bounds__(kThreads, 4)
    PrepareBoundsKernel(const __grid_constant__ PrepareBounds call, const int key_tiles,
                        const int query_tiles) {
  const GeneralProblem& problem = call.problem;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int64_t key_units = static_cast<int64_t>(problem.kv_heads) * key_tiles;
  if (warp < key_units) {
    PrepareKeys<Element>(call, static_cast<int>(warp / key_tiles),
                         static_cast<int>(warp % key_tiles));
  } else if (warp - key_units < static_cast<int64_t>(problem.heads) * query_tiles) {
    PrepareQueries<Element>(call, static_cast<int>((warp - key_units) / query_tiles),
                            static_cast<int>((warp - key_units) % query_tiles));
  }
}

}  // namespace

template <class Element>
cudaError_t LaunchPrepareBounds(const PrepareBounds& call, cudaStream_t stream) {
  const GeneralProblem& problem = call.problem;
  const int64_t key_tiles = BoundGroups::PerHead(problem, true);
  const int64_t query_tiles =
      call.query_sizes != nullptr ? BoundGroups::PerHead(problem, false) : 0;
  const int64_t warps = problem.kv_heads * key_tiles + problem.heads * query_tiles;
  const int64_t blocks = (warps * 32 + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX || key_tiles > INT_MAX || query_tiles > INT_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  PrepareBoundsKernel<Element><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      call, static_cast<int>(key_tiles), static_cast<int>(query_tiles));
  return cudaGetLastError();
}

template cudaError_t LaunchPrepareBounds<__nv_bfloat16>(const PrepareBounds&, cudaStream_t);
template cudaError_t LaunchPrepareBounds<__half>(const PrepareBounds&, cudaStream_t);
template cudaError_t LaunchPrepareBounds<float>(const PrepareBounds&, cudaStream_t);

}  // namespace flash_entmax::cuda
