#include <algorithm>
#include <cmath>
#include <cub/device/device_scan.cuh>
#include <limits>

#include "plan.h"

namespace flash_entmax::cuda {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kListBudget = size_t{3} << 28;  // bytes of candidate lists alive at a time
// Whole work items of every kernel: 128 rows (tile path), 256 or (head size 128) 192 (screening).
constexpr int kRowMultiple = 256;
constexpr int kWideRowMultiple = 384;
constexpr int64_t kMostEntries = std::numeric_limits<int32_t>::max();

// Hands out aligned pieces of a buffer.
class Carver {
 public:
  explicit Carver(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class T>
  T* Take(size_t count) {
    T* piece = reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  size_t bytes() const { return bytes_; }

 private:
  uintptr_t base_;
  size_t bytes_ = 0;
};

int RoundUp(int value, int multiple) {
  return static_cast<int>((int64_t{value} + multiple - 1) / multiple * multiple);
}

// Rows of all heads, padded, can be counted in 32 bits.
bool Countable(int64_t batch, int64_t heads, int64_t rows, int multiple) {
  const int64_t padded = (rows + multiple - 1) / multiple * multiple;
  return batch <= kMostEntries / heads && batch * heads <= kMostEntries / padded;
}

}  // namespace

SavedBuffers Plan::Saved(void* base) const {
  Carver carver(base);
  SavedBuffers saved{};
  const size_t rows = static_cast<size_t>(shape.BatchHeads()) * shape.padded_queries;
  const size_t units = static_cast<size_t>(shape.BatchHeads()) * shape.Units();
  const size_t capacity = save ? static_cast<size_t>(support_capacity) : 0;
  saved.control = carver.Take<Control>(1);
  saved.key_norms = carver.Take<uint32_t>(static_cast<size_t>(shape.KeyHeads()) * kKeyNorms);
  saved.state.unit_flag = carver.Take<int>(units);
  saved.state.column_count =
      carver.Take<int>(save ? static_cast<size_t>(shape.KeyHeads()) * shape.keys : 0);
  saved.state.unit_support = carver.Take<int>(save ? units : 0);
  saved.zeroed_bytes = carver.bytes();
  saved.state.threshold = carver.Take<float>(rows);
  saved.state.row_factor = scaled ? carver.Take<float>(rows) : nullptr;
  saved.state.support_offset = carver.Take<int64_t>(save ? rows : 0);
  saved.state.support_count = carver.Take<int>(rows);
  saved.state.flagged_units = carver.Take<int>(units);
  saved.state.support_key = carver.Take<int>(capacity);
  saved.state.support_excess = carver.Take<float>(capacity);
  saved.state.support_slot = carver.Take<int>(capacity);
  saved.state.weighted_value = carver.Take<uint16_t>(save ? rows * head_dim : 0);
  saved.state.support_capacity = static_cast<int64_t>(capacity);
  // Supports of similar rows differ little: most of the pool belongs to the units.
  saved.state.unit_capacity =
      static_cast<int>(std::min<size_t>(capacity / 4 * 3 / units, size_t{1} << 20));
  saved.state.shared_first = static_cast<int64_t>(units) * saved.state.unit_capacity;
  saved.bytes = carver.bytes();
  return saved;
}

ForwardScratch Plan::Forward(void* base, size_t* bytes) const {
  Carver carver(base);
  ForwardScratch scratch{};
  if (!tiles_only) {
    const size_t strips =
        static_cast<size_t>(heads_per_launch) * (shape.padded_queries / kStripRows);
    scratch.lists = carver.Take<CandidateEntry>(strips * 2 * kListCapacity * 32);
    scratch.list_count = carver.Take<int>(strips * 2 * 32);
    scratch.bound =
        carver.Take<RowBound>(static_cast<size_t>(shape.BatchHeads()) * shape.padded_queries);
    if (!is_fp16) {
      scratch.half_keys =
          carver.Take<__half>(static_cast<size_t>(shape.KeyHeads()) * shape.keys * head_dim);
    }
  }
  *bytes = carver.bytes();
  return scratch;
}

BackwardScratch Plan::Backward(void* base, size_t* bytes) const {
  Carver carver(base);
  BackwardScratch scratch{};
  const size_t columns = static_cast<size_t>(shape.KeyHeads()) * shape.keys;
  const size_t padded = static_cast<size_t>(shape.KeyHeads()) * padded_keys;
  scratch.tile_block_flag = carver.Take<int>(padded / Shape::kUnitRows);
  scratch.column_offset = carver.Take<int>(columns);
  scratch.column_entries = carver.Take<ColumnEntry>(static_cast<size_t>(support_capacity));
  scratch.order = carver.Take<int>(static_cast<size_t>(support_capacity));
  // A long column has more than MaxWarpColumn entries, and at most one piece to so many of them.
  const size_t entries = static_cast<size_t>(support_capacity);
  const int longest = MaxWarpColumn(shape);
  scratch.long_tasks = carver.Take<LongColumnTask>(longest > 0 ? entries / longest
                                                               : columns + entries / kPieceEntries);
  scratch.long_sums = carver.Take<float>(entries / kLongSumEntries * 2 * head_dim);
  scratch.tile_key_gradient = carver.Take<float>(padded * head_dim);
  scratch.tile_value_gradient = carver.Take<float>(padded * head_dim);
  scratch.delta =
      carver.Take<float>(static_cast<size_t>(shape.BatchHeads()) * shape.padded_queries);
  scratch.scan_bytes = ExclusiveSumBytes(static_cast<int64_t>(columns));
  scratch.scan = carver.Take<char>(scratch.scan_bytes);
  *bytes = carver.bytes();
  return scratch;
}

int MakePlan(const FlashEntmaxProblem& problem, Plan* plan) {
  if (problem.batch < 1 || problem.heads < 1 || problem.kv_heads < 1 || problem.queries < 1 ||
      problem.keys < 1 || problem.heads % problem.kv_heads != 0 || problem.support_capacity < 0) {
    return FLASH_ENTMAX_BAD_SHAPE;
  }
  if (problem.head_dim != 32 && problem.head_dim != 64 && problem.head_dim != 128) {
    return FLASH_ENTMAX_BAD_HEAD_DIM;
  }
  if (!(problem.alpha > 1.0f && problem.alpha <= 2.0f)) return FLASH_ENTMAX_BAD_ALPHA;
  if (!(problem.scale > 0.0f && std::isfinite(problem.scale))) return FLASH_ENTMAX_BAD_SCALE;
  if (problem.element != 0 && problem.element != 1) return FLASH_ENTMAX_BAD_ELEMENT;
  const int row_multiple = problem.head_dim == 128 ? kWideRowMultiple : kRowMultiple;
  if (!Countable(problem.batch, problem.heads, problem.queries, row_multiple) ||
      !Countable(problem.batch, problem.kv_heads, problem.keys, Shape::kUnitRows)) {
    return FLASH_ENTMAX_TOO_LARGE;
  }
  Shape& shape = plan->shape;
  shape.batch = problem.batch;
  shape.heads = problem.heads;
  shape.kv_heads = problem.kv_heads;
  shape.group = problem.heads / problem.kv_heads;
  shape.queries = problem.queries;
  shape.keys = problem.keys;
  shape.padded_queries = RoundUp(problem.queries, row_multiple);
  shape.causal = problem.causal != 0;
  shape.alpha = problem.alpha;
  shape.scale = problem.scale;
  shape.coefficient = (problem.alpha - 1.0f) * problem.scale;
  plan->head_dim = problem.head_dim;
  plan->alpha_mode = problem.alpha == 1.5f   ? AlphaMode::kOneAndHalf
                     : problem.alpha == 2.0f ? AlphaMode::kTwo
                                             : AlphaMode::kGeneral;
  plan->padded_keys = RoundUp(problem.keys, Shape::kUnitRows);
  const size_t list_bytes = static_cast<size_t>(shape.padded_queries / kStripRows) * 2 *
                            kListCapacity * 32 * sizeof(CandidateEntry);
  const size_t heads = static_cast<size_t>(shape.BatchHeads());
  const size_t slices = std::min(heads, (heads * list_bytes + kListBudget - 1) / kListBudget);
  plan->heads_per_launch = static_cast<int>((heads + slices - 1) / slices);
  plan->deferred_keys = problem.deferred_keys;
  // Supports of short rows are a large part of them, and lists cost more than a few products.
  constexpr int kShortRow = 512;
  plan->tiles_only = problem.path == FLASH_ENTMAX_PATH_TILES ||
                     (problem.path == FLASH_ENTMAX_PATH_AUTO && problem.keys <= kShortRow) ||
                     (problem.keys - 1) / kStepKeys >= kMaxSteps;
  plan->is_fp16 = problem.element == 1;
  plan->save = problem.save_for_backward != 0;
  plan->scaled = problem.scaled != 0;
  // Positions in the pool are 32-bit numbers in the backward; rows past them take the tile path.
  plan->support_capacity = plan->tiles_only ? 0 : std::min(problem.support_capacity, kMostEntries);
  return FLASH_ENTMAX_OK;
}

size_t ExclusiveSumBytes(int64_t count) {
  size_t bytes = 0;
  cub::DeviceScan::ExclusiveSum(nullptr, bytes, static_cast<const int*>(nullptr),
                                static_cast<int*>(nullptr), count);
  return bytes;
}

cudaError_t ExclusiveSum(void* scratch, size_t bytes, const int* input, int* output, int64_t count,
                         cudaStream_t stream) {
  return cub::DeviceScan::ExclusiveSum(scratch, bytes, input, output, count, stream);
}

}  // namespace flash_entmax::cuda
