// Forward for rows whose keys fit in registers: at most 512 keys in sight of a row.
//
// A block owns up to a few hundred queries of one head and works through them in stages of a few
// strips of 16. Per strip:
//   1. S = Q.K^T on tensor cores, kept in registers in fp32 to the end. One warp has up to 128
//      keys (a form for up to 96 lets more warps live on a multiprocessor); longer rows are split
//      over 2 or 4 warps that take blocks of 16 keys in turn, so that a causal row keeps all of
//      them equally busy. Blocks that no row of the strip sees are left out;
//   2. the threshold, by Newton from the left on the registers. Split rows start from the
//      threshold of the maxima of 16 or 32 disjoint groups of keys, which is a lower bound close to
//      the row's own. One pass over the scores lists the few that are above it in shared memory,
//      and a few lanes a row then solve the lists without another barrier of the team. Where a list
//      gets too long, every step runs over all scores and the warps exchange their sums instead;
//   3. O = P.V, and with a backward to come the mean of V under u = p^(2 - alpha): the weights are
//      made from the registers once per 32 or 64 columns. The warps' parts are added in a fixed
//      order in shared memory, from where rows are stored in wide pieces.
// Memory traffic: each query, key and value is read once a block and each output written once; a
// block has the whole head where the grid is large enough. Copies are asynchronous: V arrives while
// S is made, the next stage's queries and the keys only they see while the present one is worked
// on.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_CUH_

#include "general/forward_short_product.cuh"

namespace flash_entmax::cuda::forward {

template <class Element, int kHeadDim, int kSplit, bool kFast, int kHeldBlocks>
__global__ void __launch_bounds__(
    (ShortShape<Element, kHeadDim, kSplit, kHeldBlocks>::MaxThreads(kFast)), 1)
    ShortForwardKernel(const __grid_constant__ GeneralForward call,
                       const __grid_constant__ ShortPlan plan) {
  using Shape = ShortShape<Element, kHeadDim, kSplit, kHeldBlocks>;
  using Tile = SharedTile<Element, kHeadDim>;
  const GeneralProblem& problem = call.problem;
  const int head = blockIdx.x / plan.tiles;
  // The last queries first: with a causal mask they have the most keys.
  const int tile = plan.tiles - 1 - static_cast<int>(blockIdx.x % plan.tiles);
  const TilePlace place = PlaceTile<false>(problem, tile, plan.BlockRows());
  const SequencePart& part = place.part;
  const int end_row = min(place.first + plan.BlockRows(), part.queries);
  if (place.first >= end_row) return;

  extern __shared__ __align__(16) unsigned char shared[];
  const Tile key{reinterpret_cast<Element*>(shared)};
  const Tile value{key.At(plan.key_rows, 0)};
  const Tile query{value.At(plan.key_rows, 0)};
  const int query_rows = (plan.stages > 1 ? 2 : 1) * plan.stage_rows;
  auto* const teams = reinterpret_cast<typename Shape::Team*>(query.At(query_rows, 0));

  const int base = KeyRange::Of(problem, part, place.first).first;
  const int kv_head = head / problem.group;
  const int first_key = part.first_key + base;

  // Rows of the key tile that the queries of the first `stages` stages see.
  const auto keys_seen = [&](int stages) {
    const int last = min(place.first + stages * plan.stage_rows, end_row) - 1;
    const int end = KeyRange::Of(problem, part, last).end - base;
    return stages == 0 ? 0 : min((max(end, 0) + 15) / 16 * 16, plan.key_rows);
  };
  // Starts the copies for a stage: its queries and the keys that the stages before do not see, then
  // the values of these. Two groups of copies, also if there is nothing to do.
  const auto load = [&](int stage) {
    const int first_row = place.first + stage * plan.stage_rows;
    const bool needed = first_row < end_row;
    const int first = keys_seen(stage), count = keys_seen(stage + 1) - first;
    if (needed) {
      LoadRows(threadIdx.x, blockDim.x, query, stage % 2 * plan.stage_rows,
               call.query.Row<const Element>(part.batch, head, part.first_query), call.query,
               first_row, plan.stage_rows, part.queries, problem.head_dim);
      LoadRows(threadIdx.x, blockDim.x, key, first,
               call.key.Row<const Element>(part.batch, kv_head, first_key), call.key, first, count,
               part.keys - base, problem.head_dim);
    }
    CommitCopies();
    if (needed) {
      LoadRows(threadIdx.x, blockDim.x, value, first,
               call.value.Row<const Element>(part.batch, kv_head, first_key), call.value, first,
               count, part.keys - base, problem.value_dim);
    }
    CommitCopies();
  };
  const int block_warp = __shfl_sync(kWarp, static_cast<int>(threadIdx.x) / 32, 0);
  const int team_index = block_warp / kSplit;
  const AlphaCurve curve = AlphaCurve::Of(problem, head);
  ShortProduct<Element, kHeadDim, kSplit, kFast, kHeldBlocks> strip{
      {call, part, teams[team_index], curve, head, team_index, block_warp % kSplit}};
  strip.end_row = end_row;
  strip.coefficient = kFast ? curve.order * problem.scale : 1.0f;
  strip.inverse_coefficient = kFast ? 1.0f / strip.coefficient : 1.0f;

#pragma unroll 1
  for (int stage = -1; stage < plan.stages; ++stage) {
    const int stage_row = place.first + stage * plan.stage_rows;
    if (stage_row >= end_row) break;
    if (stage >= 0) {
      WaitCopies<1>();
      __syncthreads();  // This stage's queries and keys are there; the stage before is done with.
    }
    load(stage + 1);
    __syncwarp();
    if (stage < 0) continue;
#pragma unroll 1
    for (int turn = 0; turn < Shape::kTurns; ++turn) {
      // Back and forth: in a causal stage every team has the same number of keys in all.
      const int index =
          turn * plan.teams + (turn % 2 == 0 ? team_index : plan.teams - 1 - team_index);
      strip.Place(stage_row + index * kStripRows, base);
      strip.ComputeScores(query, stage % 2 * plan.stage_rows + index * kStripRows, key,
                          strip.first_key - base);
      if constexpr (kFast) {
        strip.Solve(Weights<Alpha::kOneAndHalf>{});
      } else {
        WithMode(curve, [&](const auto& weights) { strip.Solve(weights); });
      }
      strip.FinishThreshold();
      if (turn == 0) {
        WaitCopies<2>();
        __syncthreads();  // This stage's values are there.
      }
      strip.template StoreProduct<false>(value, strip.first_key - base);
      if (call.saved.weighted_value) {
        strip.template StoreProduct<true>(value, strip.first_key - base);
      }
    }
  }
}

}  // namespace flash_entmax::cuda::forward

#endif  // FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_CUH_
