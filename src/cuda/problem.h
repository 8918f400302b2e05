// What a GPU attention call works on: plain structs shared by the host plan and the kernels.
//
// Shapes (row = one position of one head):
//   query, output  (batch, heads, queries, head_dim)
//   key, value     (batch, kv_heads, keys, head_dim); query head h reads key head h / (heads /
//   kv_heads)
// Strides count elements, the head dimension is contiguous.
#ifndef FLASH_ENTMAX_CUDA_PROBLEM_H_
#define FLASH_ENTMAX_CUDA_PROBLEM_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace flash_entmax::cuda {

struct Strides {
  int64_t batch;
  int64_t head;
  int64_t row;
};

// A (batch, head, row, head_dim) tensor. `Element` may be const.
template <class Element>
struct Tensor {
  Element* data;
  Strides strides;

  __host__ __device__ Element* Row(int batch, int head, int row) const {
    return data + batch * strides.batch + head * strides.head + row * strides.row;
  }
};

// How p depends on z - tau; two cases have closed forms cheaper than a power.
enum class AlphaMode { kOneAndHalf, kTwo, kGeneral };

struct Shape {
  int batch;
  int heads;
  int kv_heads;
  int group;  // heads / kv_heads
  int queries;
  int keys;
  int padded_queries;  // queries rounded up to a whole number of work items of every kernel
  bool causal;         // bottom-right aligned: the last query sees every key
  float alpha;
  float scale;
  float coefficient;  // (alpha - 1) * scale: z = coefficient * (q . k)

  __host__ __device__ int BatchHeads() const { return batch * heads; }
  __host__ __device__ int KeyHeads() const { return batch * kv_heads; }
  __host__ __device__ int Units() const { return padded_queries / kUnitRows; }

  // Keys that query `row` may attend to: [0, VisibleKeys(row)). Rows past the end see none.
  __host__ __device__ int VisibleKeys(int row) const {
    if (row >= queries) return 0;
    if (!causal) return keys;
    const int limit = row + 1 + keys - queries;
    return limit < 0 ? 0 : (limit < keys ? limit : keys);
  }

  static constexpr int kUnitRows = 128;  // the tile path is chosen per unit of this many queries
};

// Sizes that the kernels and the plan must agree on.
constexpr int kStripRows = 16;      // queries of one warp in the screening kernel
constexpr int kListCapacity = 96;   // entries of a candidate list
constexpr int kMaxSupport = 256;    // support of a row handled by lists
constexpr int kStepKeys = 128;      // keys of one screening step
constexpr int kMaxSteps = 1 << 16;  // that a candidate entry can tell apart
constexpr int kSumKeys = 64;        // keys of one fp32 product of the tile path
constexpr int kKeyNorms = 8;        // prefix norms of the keys of a head, one every head_dim / 8

// One screening thread's hits in one step and one row: of the 32 keys that the thread looks at, bit
// i of the mask stands for key 8 * i + 2 * (lane % 4) of the step, bit 16 + i for the key after it.
struct alignas(8) CandidateEntry {
  uint32_t mask;
  uint32_t step_and_maximum;  // (first key / kStepKeys) << 16 | largest screening score (half)
};

// What screening knows of a row in the end: keys with a screening score at or below `screen` are
// not in the support, and the threshold is at least `threshold` (in z).
struct alignas(8) RowBound {
  float screen;
  float threshold;
};

// A support entry seen from its key, written in any order and sorted by query when read.
struct alignas(16) ColumnEntry {
  int query;  // (head in group) * queries + row
  float probability;
  float score_gradient;
  int unused;
};

// The backward of the list path sorts the entries of a key by query: pairs of a query and a
// position below kMaxWarpColumn in 32 bits. Longer columns are summed in pieces, a block each.
constexpr int kColumnIndexBits = 9;
constexpr int kMaxWarpColumn = 1 << kColumnIndexBits;
constexpr int kPieceEntries = 2048;  // of a long column, on average
constexpr int kMaxPieces = 64;
constexpr int kLongSumEntries = 1024;  // entries to a slot for the sums of a piece

// Entries of a column that one warp sums; none when there are too many queries for the pairs.
__host__ __device__ inline int MaxWarpColumn(const Shape& shape) {
  const int64_t limit = int64_t{1} << (32 - kColumnIndexBits);
  return static_cast<int64_t>(shape.group) * shape.queries <= limit ? kMaxWarpColumn : 0;
}

__host__ __device__ inline int LongColumnPieces(int count) {
  const int pieces = (count + kPieceEntries - 1) / kPieceEntries;
  return pieces < kMaxPieces ? pieces : kMaxPieces;
}

// A piece of a long column: the entries whose queries lie in the `piece`-th of `pieces` ranges.
struct alignas(16) LongColumnTask {
  int column;  // (batch * kv_heads + kv_head) * keys + key
  int piece;
  int pieces;
  int arrived;  // in the task of the first piece: pieces done
};

// What the forward keeps for the backward. Rows are (batch * heads) x padded_queries unless said.
struct SavedState {
  float* threshold;         // tau; +inf past the last query
  float* row_factor;        // query_scale, 1 past the last query; null without one
  int64_t* support_offset;  // into the pool
  int* support_count;       // 0 for rows of the tile path
  int* support_key;         // pool
  float* support_excess;    // pool: z - tau > 0
  int* support_slot;        // pool: position of the entry among those of its key
  int* column_count;        // (batch * kv_heads) x keys: their entries
  void* weighted_value;  // mean of V under u = p^(2 - alpha), only for tile-path units (x head_dim)
  int* unit_flag;        // (batch * heads) x units: 1 = tile path
  int* flagged_units;    // their ids, in no particular order
  int* unit_support;     // (batch * heads) x units: support entries of the unit's rows
  int64_t support_capacity;  // entries the pool holds (support_pool.cuh)
  int64_t shared_first;      // entries before it belong to the units
  int unit_capacity;         // entries of one unit's own part
};

// Counters, zeroed at the start of every forward.
struct Control {
  unsigned long long shared_used;   // entries asked of the pool's shared part
  unsigned long long wide_support;  // entries of units that their own part has no room for
  int closed_warps;                 // warps that have reserved their support
  int next_item;                    // screening work queue
  int flagged_count;
  int next_flagged;       // tile-forward work queue
  int long_column_count;  // tasks of long columns, zeroed by every backward
};

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_PROBLEM_H_
