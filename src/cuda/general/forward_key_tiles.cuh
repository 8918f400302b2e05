// The tiles of keys that pass before a block of the tiled forward, and which of them still matter.
// forward_tiled.cuh has the algorithm.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_FORWARD_KEY_TILES_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_FORWARD_KEY_TILES_CUH_

#include "general/forward_common.cuh"
#include "general/tile_bounds.cuh"

namespace flash_entmax::cuda::forward {

template <class Element, int kHeadDim>
struct TiledShape {
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(Element));
  static constexpr int kTileKeys = kRowBytes <= 256 ? 64 : kRowBytes <= 512 ? 32 : 16;
  static constexpr int kWarps = kRowBytes <= 512 ? 4 : 2;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = kStripRows * kWarps;
  // Blocks a multiprocessor that registers should allow.
  static constexpr int MinBlocks(bool fast) {
    return kRowBytes <= 64 ? 4 : kRowBytes <= 128 || (kRowBytes <= 256 && fast) ? 3 : 2;
  }
  static constexpr int kSlots = 3;
  static constexpr int kMarks = 4096;  // bits that say which tiles still matter
  // After the tiles and the marks: sizes and bounds of the strips, and a MarkedRange.
  static constexpr int kStripBytes = 2 * kWarps * static_cast<int>(sizeof(float));
  static constexpr int kBytes = SharedTile<Element, kHeadDim>::Bytes(kRows + kSlots * kTileKeys) +
                                2 * kMarks / 8 + kStripBytes +
                                static_cast<int>(sizeof(MarkedRange));
  static_assert(kBytes <= 99 * 1024);  // what every device has
};

// The tiles of keys that a block sees and that may hold a positive probability, and the ring
// through which they pass. All threads of the block make the same calls.
template <class Element, int kHeadDim>
struct KeyTiles {
  using Shape = TiledShape<Element, kHeadDim>;
  using Tile = SharedTile<Element, kHeadDim>;
  static constexpr int kTileKeys = Shape::kTileKeys;
  static constexpr int kWords = Shape::kMarks / 32;

  const GeneralForward& call;
  const Element* key;  // first row of the sequence
  const Element* value;
  int keys;         // rows of the sequence
  Tile ring;        // kSlots tiles
  uint32_t* marks;  // two sets: which tiles the present pass visits, which ones the next
  int first;        // first tile; the others are counted from it
  int count;
  int shift;               // a mark stands for 2^shift tiles
  int begin = 0, end = 0;  // tiles outside are not visited, whatever their marks say

  int set = 0;  // of marks that this pass reads
  // What is copied next.
  bool with_values = false, is_value = false;
  int next = 0;
  int copied = 0, taken = 0;  // slots of the ring

  __device__ __forceinline__ void SeeKeys(int first_key, int end_key) {
    first = first_key / kTileKeys;
    count = end_key > first_key ? (end_key + kTileKeys - 1) / kTileKeys - first : 0;
    begin = 0;
    end = count;
    shift = ShiftOfMarks(count, Shape::kMarks);
    for (int i = threadIdx.x; i < kWords; i += Shape::kThreads) marks[i] = ~0u;
  }

  __device__ __forceinline__ int FirstKey(int tile) const { return (first + tile) * kTileKeys; }

  // The first tile from `tile` on that this pass visits; `end` if there is none.
  __device__ __forceinline__ int Find(int tile) const {
    return FindMark(marks + set * kWords, shift, tile, end);
  }

  // The tiles around the diagonal of rows at positions [first_position, last_position], which are
  // likely to hold the largest scores of a head with a slope; at least one.
  __device__ __forceinline__ MarkedRange NearDiagonal(int first_position, int last_position) const {
    constexpr int kMore = 64 / kTileKeys;  // on either side
    const int nearest = Clamp(first_position, 0, keys - 1) / kTileKeys - kMore - first;
    const int farthest = Clamp(last_position, 0, keys - 1) / kTileKeys + kMore - first;
    const int near_begin = Clamp(nearest, 0, count - 1);
    return {near_begin, Clamp(farthest + 1, near_begin + 1, count)};
  }

  // Takes the marks off the tiles that are zero in every row of the block. `size`, `lowest`:
  // largest |factor| |q| of the strip's rows and their lowest bound of a threshold, the same in all
  // lanes; positions as above. `norms`: of the groups of the sequence's keys. Returns the range
  // that is left. Only if count > 0.
  __device__ __forceinline__ MarkedRange MarkPossible(const ScoreBound& bound, float size,
                                                      float lowest, int first_position,
                                                      int last_position, const float* norms) {
    auto* const strips = reinterpret_cast<float*>(marks + 2 * kWords);
    auto* const range = reinterpret_cast<MarkedRange*>(strips + 2 * Shape::kWarps);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (threadIdx.x % 32 == 0) {
      strips[warp] = size;
      strips[Shape::kWarps + warp] = lowest;
    }
    if (threadIdx.x == 0) range->Clear();
    __syncthreads();  // The pass before has read its marks, too.
#pragma unroll
    for (int i = 0; i < Shape::kWarps; ++i) {
      size = fmaxf(size, strips[i]);
      lowest = fminf(lowest, strips[Shape::kWarps + i]);
    }
    return MarkTiles(marks + set * kWords, range, count, shift, [&](int tile) {
      const int first_key = FirstKey(tile), last_key = min(first_key + kTileKeys, keys) - 1;
      const float norm = LargestOfGroups(norms, first_key, last_key);
      const int distance = SmallestDistance(first_position, last_position, first_key, last_key);
      return call.visit_all || !(bound.Largest(size, norm, distance) <= lowest);
    });
  }

  // Passes after this one visit the tiles that were kept in this one.
  __device__ __forceinline__ void StartMarking() {
    for (int i = threadIdx.x; i < kWords; i += Shape::kThreads) marks[(set ^ 1) * kWords + i] = 0;
  }
  __device__ __forceinline__ void Keep(int tile) {
    const int mark = tile >> shift;
    atomicOr(&marks[(set ^ 1) * kWords + mark / 32], 1u << (mark % 32));
  }
  __device__ __forceinline__ void FinishMarking() { set ^= 1; }

  __device__ __forceinline__ void CopyNext() {
    if (next < end) {
      const GeneralProblem& problem = call.problem;
      const StridedTensor& tensor = is_value ? call.value : call.key;
      LoadSharedTile<Element, kHeadDim, kTileKeys, Shape::kThreads>(
          Tile{ring.At(copied * kTileKeys, 0)}, is_value ? value : key, tensor.row, tensor.column,
          FirstKey(next), keys, is_value ? problem.value_dim : problem.head_dim, tensor.vectors);
      is_value = with_values && !is_value;
      if (!is_value) next = Find(next + 1);
    }
    CommitCopies();
    copied = copied == Shape::kSlots - 1 ? 0 : copied + 1;
  }

  // The next tile has arrived. The slot of the tile before it, which all warps are done with now,
  // is filled again.
  __device__ __forceinline__ Tile Take() {
    WaitCopies<Shape::kSlots - 2>();
    __syncthreads();
    CopyNext();
    const Tile tile{ring.At(taken * kTileKeys, 0)};
    taken = taken == Shape::kSlots - 1 ? 0 : taken + 1;
    return tile;
  }

  // One pass: look_keys(tile, keys), and with values look_values(values) after it.
  template <class LookKeys, class LookValues>
  __device__ __forceinline__ void Visit(LookKeys look_keys, bool values, LookValues look_values) {
    with_values = values;
    is_value = false;
    next = Find(begin);
    for (int i = 0; i < Shape::kSlots - 1; ++i) CopyNext();
#pragma unroll 1
    for (int tile = Find(begin); tile < end; tile = Find(tile + 1)) {
      look_keys(tile, Take());
      if (values) look_values(Take());
    }
    // Copies that were started for nothing are empty, so the ring may go on where it is; but it
    // must be the same slot for both ends.
    copied = taken;
  }
  template <class LookKeys>
  __device__ __forceinline__ void Visit(LookKeys look_keys) {
    Visit(look_keys, false, [](const Tile&) {});
  }
};

}  // namespace flash_entmax::cuda::forward

#endif  // FLASH_ENTMAX_CUDA_GENERAL_FORWARD_KEY_TILES_CUH_
