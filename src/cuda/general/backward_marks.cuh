// Which streamed tiles a block of the backward visits: those that tile_bounds.cuh does not prove
// zero with the thresholds of the forward. Only in kernels with modifiers of the score; plain ones
// visit every tile in sight.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_MARKS_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_MARKS_CUH_

#include "general/backward_tiles.cuh"

namespace flash_entmax::cuda {

// Marks the tiles of kStreamed rows, counted from the first one in sight, of which there is at
// least one. `head`: of the queries. All threads of the block call it; it starts and ends with a
// barrier.
template <bool kOwnKeys, int kOwn, int kStreamed>
__device__ __forceinline__ void MarkStreamed(const GeneralBackward& call, const BlockPlace& place,
                                             int head, float order, StreamedMarks& marks) {
  const GeneralProblem& problem = call.problem;
  const SequencePart& part = place.part;
  const int start = place.streamed.first, end = place.streamed.end;
  const int count = (end - start + kStreamed - 1) / kStreamed;
  const int shift = ShiftOfMarks(count, StreamedMarks::kMarks);
  __syncthreads();  // Nobody looks at marks any more.
  if (threadIdx.x == 0) {
    marks.range.Clear();
    marks.shift = shift;
  }
  __syncthreads();

  const ScoreBound bound = ScoreBound::Of(problem, order, head);
  const bool visit_all = call.visit_all || call.key_norms == nullptr || !bound.Skips();
  const float *norms = nullptr, *sizes = nullptr, *thresholds = nullptr;
  if (!visit_all) {
    norms = call.key_norms + BoundGroups::Of(problem, part, head / problem.group, true);
    const int64_t group = BoundGroups::Of(problem, part, head, false);
    sizes = call.query_sizes + group;
    thresholds = call.lowest_thresholds + group;
  }
  const int own_first = place.first;
  const int own_last = min(place.first + kOwn, kOwnKeys ? part.keys : part.queries) - 1;
  float own_norm = 0.0f, own_lowest = 0.0f;  // of the keys, or size and threshold of the queries
  if (!visit_all) {
    own_norm = LargestOfGroups(kOwnKeys ? norms : sizes, own_first, own_last);
    if (!kOwnKeys) own_lowest = SmallestOfGroups(thresholds, own_first, own_last);
  }
  // From the position of a query to that of a key.
  const int offset = part.keys - part.queries;
  MarkTiles(marks.words, &marks.range, count, shift, [&](int tile) {
    if (visit_all) return true;
    const int first = start + tile * kStreamed, last = min(first + kStreamed, end) - 1;
    float norm = own_norm, size = own_norm, lowest = own_lowest;
    int distance;
    if constexpr (kOwnKeys) {
      size = LargestOfGroups(sizes, first, last);
      lowest = SmallestOfGroups(thresholds, first, last);
      distance = SmallestDistance(first + offset, last + offset, own_first, own_last);
    } else {
      norm = LargestOfGroups(norms, first, last);
      distance = SmallestDistance(own_first + offset, own_last + offset, first, last);
    }
    return !(bound.Largest(size, norm, distance) <= lowest);
  });
}

// The first row of the first marked tile that starts at `row` or after it, a tile's first row;
// `end` if there is none. Plain: `row`.
template <class Variant>
__device__ __forceinline__ int NextStreamed(const StreamedMarks& marks, const RowRange& streamed,
                                            int row) {
  if constexpr (Variant::kPlain) {
    return row;
  } else {
    constexpr int kStreamed = Variant::Shape::kStreamedRows;
    const int last = marks.range.end;
    const int tile = FindMark(marks.words, marks.shift, (row - streamed.first) / kStreamed, last);
    return tile < last ? streamed.first + tile * kStreamed : streamed.end;
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_MARKS_CUH_
