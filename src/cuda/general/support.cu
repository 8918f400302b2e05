// The support in compressed rows: for every query the keys whose z lies above the threshold that a
// forward pass found, and their probabilities.
//
// Scores are not kept between the passes; S is made anew on tensor cores, as in forward_tiled.cuh
// and with the same blocks: 64 queries of one head, a warp a strip of 16, tiles of keys that some
// row of the block sees streaming through shared memory. There are two such walks:
//   1. counts   keys above the threshold, one number a row; an exclusive sum over all rows turns
//               the numbers into row offsets;
//   2. entries  the same walk again. In each tile the four threads of a row gather a bit per key
//               that is in the support, so a key's place in its row is the number of entries of
//               earlier tiles plus the number of bits below its own: no sorting and no atomics, and
//               the keys ascend.
// Both walks run the same instructions up to the sign of z - tau, so they agree on every key.
// Memory traffic per block and walk: queries once, keys once, mostly from L2; each entry is written
// once. Tiles without an entry cost their scores and one vote.
#include "general/support.h"

#include <climits>
#include <cub/device/device_scan.cuh>

#include "general/forward_tiled.cuh"
#include "general/shared_limit.h"

namespace flash_entmax::cuda {
namespace {

using forward::kStripRows;
using forward::kWarp;

// Scores of a strip and a tile of keys, less the threshold of their row.
template <int kTiles>
using ExcessTile = float[kTiles][4];

// The thresholds as the caller has them.
struct Thresholds {
  const float* data;
  int64_t batch, head, row;
};

// What becomes of a thread's two rows of a strip, row[0] and row[1]: indices into all rows, -1 for
// a row that does not exist. Of the four threads that share a row each sees its own columns.
//
// First walk: counts the entries of each row.
struct RowCounter {
  struct Target {
    int64_t* counts;
  };

  const Target& target;
  const int64_t (&row)[2];
  int count[2] = {0, 0};

  __device__ __forceinline__ RowCounter(const Target& to, const AlphaCurve&,
                                        const int64_t (&rows)[2])
      : target(to), row(rows) {}

  template <int kTiles>
  __device__ __forceinline__ void Take(const ExcessTile<kTiles>& excess, int) {
#pragma unroll
    for (int e = 0; e < 4 * kTiles; ++e) count[e / 2 % 2] += excess[e / 4][e % 4] > 0.0f ? 1 : 0;
  }

  __device__ __forceinline__ void Finish() const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int sum = count[i];
      sum += __shfl_xor_sync(kWarp, sum, 1);
      sum += __shfl_xor_sync(kWarp, sum, 2);
      if (threadIdx.x % 4 == 0 && row[i] >= 0) target.counts[row[i]] = sum;
    }
  }
};

// Second walk: writes the entries of each row, as many as there is room for.
struct RowWriter {
  struct Target {
    const int64_t* row_offsets;
    int* key_index;
    float* probability;
    int64_t capacity;
  };

  const Target& target;
  AlphaCurve curve;
  int64_t start[2];  // where the row's entries begin
  int room[2];       // entries of the row that may be written
  int count[2] = {0, 0};

  __device__ __forceinline__ RowWriter(const Target& to, const AlphaCurve& alpha_curve,
                                       const int64_t (&rows)[2])
      : target(to), curve(alpha_curve) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      start[i] = 0;
      room[i] = 0;
      if (rows[i] < 0) continue;
      start[i] = target.row_offsets[rows[i]];
      // The offsets come back from the caller: whatever they are, nothing outside the two arrays
      // and nothing of the next row is touched.
      const int64_t end = min(target.row_offsets[rows[i] + 1], target.capacity);
      if (start[i] >= 0 && end > start[i]) {
        room[i] = static_cast<int>(min(end - start[i], static_cast<int64_t>(INT_MAX)));
      }
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void Take(const ExcessTile<kTiles>& excess, int first_key) {
    static_assert(8 * kTiles <= 64);
    // Bit k: key first_key + k is in the support of the row. First this thread's bits, with its
    // columns of each accumulator at their lowest place.
    uint64_t support[2] = {0, 0};
#pragma unroll
    for (int e = 0; e < 4 * kTiles; ++e) {
      const uint64_t bit = uint64_t{1} << (e / 4 * 8 + e % 2);
      if (excess[e / 4][e % 4] > 0.0f) support[e / 2 % 2] |= bit;
    }
    if (!__any_sync(kWarp, (support[0] | support[1]) != 0)) return;
    const int first_column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      support[i] <<= first_column;
      support[i] |= __shfl_xor_sync(kWarp, support[i], 1);
      support[i] |= __shfl_xor_sync(kWarp, support[i], 2);
    }
    WithMode(curve, [&](const auto& weights) {
#pragma unroll
      for (int e = 0; e < 4 * kTiles; ++e) {
        if (!(excess[e / 4][e % 4] > 0.0f)) continue;
        const int i = e / 2 % 2;
        const int column = e / 4 * 8 + e % 2 + first_column;
        const int place = count[i] + __popcll(support[i] & ((uint64_t{1} << column) - 1));
        if (place >= room[i]) continue;
        float p, u;
        weights.Of(excess[e / 4][e % 4], &p, &u);
        target.key_index[start[i] + place] = first_key + column;
        target.probability[start[i] + place] = p;
      }
    });
#pragma unroll
    for (int i = 0; i < 2; ++i) count[i] += __popcll(support[i]);
  }

  __device__ __forceinline__ void Finish() const {}
};

template <class Element, int kHeadDim, class Collector>
__global__ void __launch_bounds__((forward::TiledShape<Element, kHeadDim>::kThreads),
                                  (forward::TiledShape<Element, kHeadDim>::MinBlocks(false)))
    SupportKernel(const __grid_constant__ GeneralForward call,
                  const __grid_constant__ Thresholds thresholds,
                  const __grid_constant__ typename Collector::Target target, const int tiles) {
  using Shape = forward::TiledShape<Element, kHeadDim>;
  using Tile = SharedTile<Element, kHeadDim>;
  using Strip = forward::TiledStrip<Element, kHeadDim, false>;
  const GeneralProblem& problem = call.problem;
  const int head = blockIdx.x / tiles;
  // Under a causal mask the last tiles see the most keys: they start first.
  const int tile = tiles - 1 - static_cast<int>(blockIdx.x % tiles);
  const TilePlace place = PlaceTile<false>(problem, tile, Shape::kRows);
  const SequencePart& part = place.part;
  if (place.first >= part.queries) return;
  const int last = min(place.first + Shape::kRows, part.queries) - 1;

  extern __shared__ __align__(16) unsigned char shared[];
  const Tile query{reinterpret_cast<Element*>(shared)};
  const Tile ring{query.At(Shape::kRows, 0)};
  auto* const marks = reinterpret_cast<uint32_t*>(ring.At(Shape::kSlots * Shape::kTileKeys, 0));

  LoadSharedTile<Element, kHeadDim, Shape::kRows, Shape::kThreads>(
      query, call.query.Row<const Element>(part.batch, head, part.first_query), call.query.row,
      call.query.column, place.first, part.queries, problem.head_dim, call.query.vectors);
  CommitCopies();
  forward::KeyTiles<Element, kHeadDim> keys{
      call,    call.key.Row<const Element>(part.batch, head / problem.group, part.first_key),
      nullptr, part.keys,
      ring,    marks};
  keys.SeeKeys(KeyRange::Of(problem, part, place.first).first,
               KeyRange::Of(problem, part, last).end);
  WaitCopies<0>();
  __syncthreads();

  const int warp = __shfl_sync(kWarp, static_cast<int>(threadIdx.x) / 32, 0);
  const AlphaCurve curve = AlphaCurve::Of(problem, head);
  Strip strip{call, part, curve, head, query, warp * kStripRows, place.first};
  strip.Place(place.first + warp * kStripRows);

  int64_t row[2];
  float threshold[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    row[i] = -1;
    threshold[i] = NAN;
    if (strip.row + 8 * i >= part.queries) continue;
    const int tensor_row = part.first_query + strip.row + 8 * i;
    row[i] =
        (static_cast<int64_t>(part.batch) * problem.heads + head) * problem.queries + tensor_row;
    threshold[i] = thresholds.data[part.batch * thresholds.batch + head * thresholds.head +
                                   tensor_row * thresholds.row];
  }

  Collector collector(target, curve, row);
  keys.Visit([&](int key_tile, const Tile& key) {
    const int first_key = keys.FirstKey(key_tile);
    if (!strip.Sees(first_key)) return;
    ExcessTile<Strip::kTiles> excess;  // z, and -inf for hidden keys, at first
    strip.ComputeScores(key, first_key, excess);
    // A plain subtraction, not one fused with the last product of z, which only one of the two
    // walks may find worth fusing. NaN is not above zero: it is in no support.
    Strip::ForScores(excess, [&](float& z, int i) { z = __fsub_rn(z, threshold[i]); });
    collector.template Take<Strip::kTiles>(excess, first_key);
  });
  collector.Finish();
}

template <class Element, int kHeadDim, class Collector>
cudaError_t Launch(const SupportCall& call, const typename Collector::Target& target,
                   cudaStream_t stream) {
  using Shape = forward::TiledShape<Element, kHeadDim>;
  constexpr auto kernel = SupportKernel<Element, kHeadDim, Collector>;
  GeneralForward scores;
  scores.problem = call.problem;
  scores.query = call.query;
  scores.key = call.key;
  const Thresholds thresholds{call.threshold, call.threshold_stride[0], call.threshold_stride[1],
                              call.threshold_stride[2]};
  const int64_t tiles = call.problem.QueryTiles(Shape::kRows);
  const int64_t blocks = tiles * call.problem.heads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  const cudaError_t error = AllowShared(kernel, Shape::kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, Shape::kBytes, stream>>>(
      scores, thresholds, target, static_cast<int>(tiles));
  return cudaGetLastError();
}

template <class Element, class Collector>
cudaError_t LaunchForSize(const SupportCall& call, const typename Collector::Target& target,
                          cudaStream_t stream) {
  const int size = call.problem.head_dim;
  if (size <= 32) return Launch<Element, 32, Collector>(call, target, stream);
  if (size <= 64) return Launch<Element, 64, Collector>(call, target, stream);
  if (size <= 128) return Launch<Element, 128, Collector>(call, target, stream);
  if (size <= 256) return Launch<Element, 256, Collector>(call, target, stream);
  return cudaErrorInvalidValue;
}

template <class Collector>
cudaError_t LaunchForType(const SupportCall& call, DType dtype,
                          const typename Collector::Target& target, cudaStream_t stream) {
  switch (dtype) {
    case DType::kBFloat16:
      return LaunchForSize<__nv_bfloat16, Collector>(call, target, stream);
    case DType::kFloat16:
      return LaunchForSize<__half, Collector>(call, target, stream);
    case DType::kFloat32:
      return LaunchForSize<float, Collector>(call, target, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

int64_t RowsOf(const GeneralProblem& problem) {
  return static_cast<int64_t>(problem.batch) * problem.heads * problem.queries;
}

}  // namespace

int64_t SupportOffsetsBytes(int64_t rows) {
  // What the exclusive sum takes depends on the device: a fixed part, and some words for every few
  // hundred rows. This is several times as much, and LaunchSupportOffsets checks it.
  constexpr int64_t kFixedBytes = 64 * 1024, kAlignment = 256;
  return kFixedBytes + (rows / 4 + kAlignment - 1) / kAlignment * kAlignment;
}

cudaError_t LaunchSupportOffsets(const SupportCall& call, DType dtype, int64_t* row_offsets,
                                 void* workspace, int64_t workspace_bytes, cudaStream_t stream) {
  const int64_t rows = RowsOf(call.problem);
  const size_t offsets_bytes = static_cast<size_t>(rows + 1) * sizeof(int64_t);
  if (rows == 0 || call.problem.keys == 0) {
    return cudaMemsetAsync(row_offsets, 0, offsets_bytes, stream);
  }
  // In place, over one item more than there are rows: the last sum is the total.
  const auto sum = [&](void* storage, size_t* bytes) {
    return cub::DeviceScan::ExclusiveSum(storage, *bytes, row_offsets, row_offsets, rows + 1,
                                         stream);
  };
  size_t bytes = 0;
  cudaError_t error = sum(nullptr, &bytes);  // only says how much it needs
  if (error != cudaSuccess) return error;
  if (workspace == nullptr || static_cast<int64_t>(bytes) > workspace_bytes) {
    return cudaErrorInvalidValue;
  }
  // Queries of a packed tensor that lie in no sequence have no block: their count is this zero.
  error = cudaMemsetAsync(row_offsets, 0, offsets_bytes, stream);
  if (error != cudaSuccess) return error;
  error = LaunchForType<RowCounter>(call, dtype, {row_offsets}, stream);
  if (error != cudaSuccess) return error;
  return sum(workspace, &bytes);
}

cudaError_t LaunchSupportEntries(const SupportCall& call, DType dtype, const int64_t* row_offsets,
                                 int* key_index, float* probability, int64_t capacity,
                                 cudaStream_t stream) {
  if (RowsOf(call.problem) == 0 || call.problem.keys == 0 || capacity <= 0) return cudaSuccess;
  return LaunchForType<RowWriter>(call, dtype, {row_offsets, key_index, probability, capacity},
                                  stream);
}

}  // namespace flash_entmax::cuda
