// Forward for rows of 129 to 512 keys, 16-bit elements and heads of up to 64 columns.
//
// A block has all keys and values that its queries see in shared memory; a warp owns a strip of 16
// or 32 queries at a time, alone. Scores are never kept: they are made anew on tensor cores, by the
// same products and so with the same bits, in three sweeps over the strip's keys:
//   1. maxima   of the row and, in registers, of 32 disjoint groups of its keys (16 in narrow
//               windows). The threshold of the group maxima is a lower bound of the row's own,
//               close to it (Newton from the left, four lanes a row);
//   2. list     each thread writes the scores above the bound, the only ones that can have a
//               positive probability, to a list of its own in shared memory. From these comes the
//               exact threshold: if kFast the root as if all of them kept a positive weight, most
//               do, then Newton. Where a list is too long, every step sweeps over the scores;
//   3. output   O = P.V over the blocks of 16 keys in which something was listed, and with a
//               backward to come the mean of V under u = p^(2 - alpha), from the same scores and
//               values.
// Blocks of keys that every row of the strip sees have loops of their own, two blocks a step and
// without a mask: what is left of them are little more than the products, one comparison or weight
// a score, and loads. Nothing passes between warps but the number of the next strip, so there are
// two barriers a block: keys arrived, values arrived. Strips are dealt from the one with the most
// keys down, the first of each warp by its number, then to whichever warp is free.
// Memory traffic: each query is read once, straight into operands of the products, and each output
// row written once, straight from their results; keys and values are read once a block, which has a
// whole head where the grid is large enough.
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
  const int strips = (end_row - place.first + Shape::kQueries - 1) / Shape::kQueries;
  // With a causal mask the last rows have the most keys.
  const auto row_of = [&](int index) {
    return place.first + (strips - 1 - index) * Shape::kQueries;
  };
  auto* const next_strip = reinterpret_cast<int*>(
      reinterpret_cast<unsigned char*>(value.data + plan.key_rows * kHeadDim) +
      plan.warps * Shape::kWarpBytes);
  if (threadIdx.x == 0) *next_strip = plan.warps;
  const int base = KeyRange::Of(problem, part, place.first).first;
  const int seen = max(KeyRange::Of(problem, part, end_row - 1).end - base, 0);
  const int key_rows = min((seen + 31) / 32 * 32, plan.key_rows);
  const int kv_head = head / problem.group;
  const int first_key = part.first_key + base;
  int index = warp;
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
  __syncthreads();  // Keys are there.
#pragma unroll 1
  for (bool first = true; first || index < strips; first = false) {
    const bool needed = index < strips;
    if (needed) {
      strip.Place(row_of(index), base, key, value);
      strip.StartFromGroups();
    }
    if (first) {
      // Not later: until here the strips of a block take about the same time.
      WaitCopies<0>();
      __syncthreads();  // Values are there.
    }
    if (needed) {
      strip.Solve();
      strip.StoreResults();
    }
    if (lane == 0) index = atomicAdd(next_strip, 1);
    index = __shfl_sync(kWarp, index, 0);
  }
}

}  // namespace flash_entmax::cuda::forward

#endif  // FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_CUH_
