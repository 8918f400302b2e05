// Forward for rows of 129 to 512 keys, 16-bit elements and heads of up to 64 columns.
//
// A block has all keys and values that its queries see in shared memory; a warp owns 32 queries at
// a time, alone. Scores are never kept: they are made anew on tensor cores, by the same products
// and so with the same bits, in three sweeps over the warp's keys:
//   1. maxima   of the row and, in registers, of 32 disjoint groups of its keys. The threshold of
//               the group maxima is a lower bound of the row's own, close to it (Newton from the
//               left, four lanes a row);
//   2. list     each thread writes the scores above the bound, the only ones that can have a
//               positive probability, to a list of its own, and then holds them in registers for
//               Newton to the exact threshold. Where a list is too long, every step sweeps over the
//               scores instead;
//   3. output   O = P.V over the blocks of 16 keys in which something was listed, and with a
//               backward to come the mean of V under u = p^(2 - alpha), from the same scores and
//               values.
// Nothing passes between warps, so there are two barriers a block: keys arrived, values arrived.
// 32 queries instead of 16 halve what is read from shared memory, which would limit the kernel.
// Memory traffic: each query is read once, each output row written once; keys and values are read
// once a block, which has a whole head where the grid is large enough.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_CUH_

#include "general/forward_short_sweeps_product.cuh"

namespace flash_entmax::cuda::forward {

template <class Element, int kHeadDim, bool kFast>
__global__ void __launch_bounds__((SweepShape<kHeadDim>::kMaxThreads),
                                  (SweepShape<kHeadDim>::kMinBlocks))
    SweepForwardKernel(const __grid_constant__ GeneralForward call,
                       const __grid_constant__ SweepPlan plan) {
  using Shape = SweepShape<kHeadDim>;
  using Tile = SwizzledTile<Element, kHeadDim>;
  const GeneralProblem& problem = call.problem;
  const int head = blockIdx.x / plan.tiles;
  // The last queries first: with a causal mask they have the most keys.
  const int tile = plan.tiles - 1 - static_cast<int>(blockIdx.x % plan.tiles);
  const TilePlace place = PlaceTile<false>(problem, tile, plan.BlockRows());
  const SequencePart& part = place.part;
  const int end_row = min(place.first + plan.BlockRows(), part.queries);
  if (place.first >= end_row) return;

  extern __shared__ __align__(128) unsigned char swizzled[];
  const Tile key{reinterpret_cast<Element*>(swizzled)};
  const Tile value{key.data + plan.key_rows * kHeadDim};
  const int warp = __shfl_sync(kWarp, static_cast<int>(threadIdx.x) / 32, 0);
  auto* const own = reinterpret_cast<float*>(
      reinterpret_cast<unsigned char*>(value.data + plan.key_rows * kHeadDim) +
      warp * Shape::kWarpBytes);

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto load_queries = [&](int first) {
    LoadRows(ComputeHere(lane), 32, Tile{reinterpret_cast<Element*>(own)}, 0,
             call.query.Row<const Element>(part.batch, head, part.first_query), call.query, first,
             int{Shape::kQueries}, part.queries, problem.head_dim);
  };
  const int base = KeyRange::Of(problem, part, place.first).first;
  const int seen = max(KeyRange::Of(problem, part, end_row - 1).end - base, 0);
  const int key_rows = min((seen + 31) / 32 * 32, plan.key_rows);
  const int kv_head = head / problem.group;
  const int first_key = part.first_key + base;
  load_queries(place.first + warp * Shape::kQueries);
  LoadRows(threadIdx.x, blockDim.x, key, 0,
           call.key.Row<const Element>(part.batch, kv_head, first_key), call.key, 0, key_rows,
           part.keys - base, problem.head_dim);
  CommitCopies();
  LoadRows(threadIdx.x, blockDim.x, value, 0,
           call.value.Row<const Element>(part.batch, kv_head, first_key), call.value, 0, key_rows,
           part.keys - base, problem.value_dim);
  CommitCopies();

  const AlphaCurve curve = AlphaCurve::Of(problem, head);
  const float coefficient = kFast ? curve.order * problem.scale : 1.0f;
  SweepProduct<Element, kHeadDim, kFast> strip{
      {call, part, curve, head, own, coefficient, 1.0f / coefficient}};
  strip.end_row = end_row;
  WaitCopies<1>();
  __syncthreads();  // Queries and keys are there.
#pragma unroll 1
  for (int turn = 0; turn < plan.turns; ++turn) {
    // Back and forth: in a causal block every warp has the same number of keys in all.
    const int index = turn * plan.warps + (turn % 2 == 0 ? warp : plan.warps - 1 - warp);
    const int first_row = place.first + index * Shape::kQueries;
    const bool needed = first_row < end_row;
    if (turn > 0 && needed) {
      __syncwarp();  // The warp may still be reading its output rows.
      load_queries(first_row);
      CommitCopies();
      WaitCopies<0>();
      __syncwarp();
    }
    if (needed) {
      strip.Place(first_row, base, key, value);
      strip.Solve();
    }
    if (turn == 0) {
      WaitCopies<0>();
      __syncthreads();  // Values are there.
    }
    if (needed) strip.StoreResults();
  }
}

}  // namespace flash_entmax::cuda::forward

#endif  // FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_CUH_
