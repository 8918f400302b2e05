// What the forward pass of attention keeps for the backward pass, and where in the caller's buffer.
//
// One record a row (its threshold and the size of its support), and for every panel of query rows a
// pool of entries (key and probability) that its rows share, so that one wide row need not cost its
// neighbours theirs. Rows that find no room are marked, and found again from their threshold. The
// pool of a panel that is dense anyway may instead hold the mean of the values under the weights
// u = p^(2−α), from which δ of the backward pass is one product with the output's gradient.
//
//     header | SavedRow × rows | pools, in the order of rows: probabilities, then keys
//
// Rows are (batch, head, query) in row-major order; a packed sequence's rows stand where they stand
// in the query tensor.

#ifndef FLASH_ENTMAX_SRC_CPU_SAVED_SUPPORT_H_
#define FLASH_ENTMAX_SRC_CPU_SAVED_SUPPORT_H_

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "attention_resolved.h"
#include "cpu/curve.h"

namespace flash_entmax::cpu {

// What identifies a row's probabilities among all scores: with distances max − s, the level of its
// curve. In doubles whatever the type, so that probabilities made again equal those of the forward.
struct SavedRow {
  static constexpr int32_t kNotKept = -1;

  double max = 0.0;
  double level = 0.0;        // LevelNumber(); NaN if the row's output is NaN
  int32_t count = 0;         // Keys in the support; 0 if the row sees no key.
  int32_t begin = kNotKept;  // First entry in the panel's pool.
  int32_t has_mean = 0;      // In the first row of a panel: 1 if the pool holds means instead.
  int32_t unused = 0;

  bool not_a_number() const { return std::isnan(level); }
};
static_assert(sizeof(SavedRow) == 32);

// The one number that tells a solved level of a curve from the others, and the level from it.
inline double LevelNumber(const Curve& curve, const Level& level) {
  return curve.m > 1.0 ? level.slope : level.shift;
}
inline Level LevelOf(const Curve& curve, double number) {
  if (curve.m > 1.0) {
    return {0.0, number, curve.exponent, std::pow(number / curve.slope, -1.0 / curve.m)};
  }
  return {number, curve.slope, curve.exponent, 1.0};
}

// Whether a panel's supports are so large that five products over all keys cost less than rows
// gathered one by one.
inline bool IsDenseSupport(int64_t entries, int64_t visible) { return 8 * entries >= visible; }

// Sizes and offsets. The same for forward and backward if the problem, the options and the
// instruction set are.
struct SavedLayout {
  static constexpr uint64_t kMagic = 0x46456e746d617832;
  static constexpr int64_t kHeaderBytes = 64;
  // Pools begin at multiples of this, so that they are aligned for every type.
  static constexpr int64_t kPoolMultiple = 16;
  // Entries a row, where the caller does not say. Normal scores of standard deviation 1 have 25 to
  // 40 keys in the support of α = 1.5 at 8 to 128 thousand keys.
  static constexpr int64_t kEntriesPerRow = 64;

  int64_t rows = 0;
  int64_t entries = 0;
  int64_t value_size = 0;
  int64_t rows_per_panel = 0;
  int64_t element_bytes = 0;
  uint64_t fingerprint = 0;  // Of the sequences, masks and α.

  // T is the type that attention is computed in: float or double.
  template <typename T>
  static SavedLayout Make(const ResolvedAttention& resolved, int64_t rows_per_panel,
                          int64_t support_capacity) {
    SavedLayout layout;
    layout.rows = resolved.batch * resolved.heads * resolved.query_length;
    layout.value_size = resolved.value_size;
    layout.rows_per_panel = rows_per_panel;
    layout.element_bytes = sizeof(T);
    layout.fingerprint = FingerprintOf(resolved);
    if (support_capacity >= 0) {
      layout.entries = support_capacity;
    } else {
      // Enough for the means as well.
      const int64_t mean = (resolved.value_size * layout.element_bytes + layout.entry_bytes() - 1) /
                           layout.entry_bytes();
      const int64_t wanted = std::max(std::min(kEntriesPerRow, resolved.key_length), mean);
      layout.entries = layout.rows * ((wanted + kPoolMultiple - 1) / kPoolMultiple * kPoolMultiple);
    }
    return layout;
  }

  int64_t entry_bytes() const { return element_bytes + static_cast<int64_t>(sizeof(int32_t)); }
  int64_t row_bytes() const { return static_cast<int64_t>(sizeof(SavedRow)); }
  int64_t bytes() const { return kHeaderBytes + rows * row_bytes() + entries * entry_bytes(); }

  // First entry of the pools of the rows from `row` on.
  int64_t PoolBegin(int64_t row) const {
    if (rows == 0) return 0;
    const int64_t share = entries / rows * row + std::min(row, entries % rows);
    return share / kPoolMultiple * kPoolMultiple;
  }

  SavedRow* Rows(void* data) const {
    return reinterpret_cast<SavedRow*>(static_cast<char*>(data) + kHeaderBytes);
  }
  char* Pool(void* data, int64_t first_row) const {
    return static_cast<char*>(data) + kHeaderBytes + rows * row_bytes() +
           PoolBegin(first_row) * entry_bytes();
  }

  // FNV-1a, 64 bits at a time: entries of other sequences would be keys that do not exist.
  static uint64_t FingerprintOf(const ResolvedAttention& resolved) {
    uint64_t hash = 0xcbf29ce484222325;
    const auto add = [&hash](uint64_t word) { hash = (hash ^ word) * 0x100000001b3; };
    for (const Sequence& sequence : resolved.sequences) {
      add(static_cast<uint64_t>(sequence.mask.query_length));
      add(static_cast<uint64_t>(sequence.mask.key_length));
      add(sequence.mask.causal ? 1 : 0);
      add(static_cast<uint64_t>(sequence.mask.window_left));
      add(static_cast<uint64_t>(sequence.mask.window_right));
    }
    for (const double alpha : resolved.alpha) add(std::bit_cast<uint64_t>(alpha));
    return hash;
  }

  // The header says which layout the buffer has.
  void WriteHeader(void* data) const {
    auto* header = static_cast<uint64_t*>(data);
    header[0] = kMagic;
    header[1] = static_cast<uint64_t>(rows);
    header[2] = static_cast<uint64_t>(entries);
    header[3] = static_cast<uint64_t>(value_size);
    header[4] = static_cast<uint64_t>(rows_per_panel);
    header[5] = static_cast<uint64_t>(element_bytes);
    header[6] = fingerprint;
  }
  // True if the buffer was written for this layout; takes the size of its panels.
  bool ReadHeader(const void* data) {
    const auto* header = static_cast<const uint64_t*>(data);
    rows_per_panel = static_cast<int64_t>(header[4]);
    return header[0] == kMagic && header[1] == static_cast<uint64_t>(rows) &&
           header[2] == static_cast<uint64_t>(entries) &&
           header[3] == static_cast<uint64_t>(value_size) && rows_per_panel > 0 &&
           header[5] == static_cast<uint64_t>(element_bytes) && header[6] == fingerprint;
  }
};

// Writes one panel: rows [first_row, first_row + rows) of one head and sequence. Panels may be
// written by different threads at the same time.
template <typename T>
class SavedPanelWriter {
 public:
  SavedPanelWriter(const SavedLayout& layout, void* data, int64_t first_row, int64_t rows)
      : rows_(layout.Rows(data) + first_row),
        row_count_(rows),
        capacity_(layout.PoolBegin(first_row + rows) - layout.PoolBegin(first_row)),
        bytes_(capacity_ * layout.entry_bytes()),
        value_size_(layout.value_size),
        probability_(reinterpret_cast<T*>(layout.Pool(data, first_row))),
        key_(reinterpret_cast<int32_t*>(probability_ + capacity_)) {}

  // The rows in ascending order, each by one of the next three. Entries in any order; if `key` is
  // null the row is not kept.
  void Add(double max, double level, const int32_t* key, const T* probability, int64_t count) {
    SavedRow& row = rows_[added_++] = {max, level, static_cast<int32_t>(count)};
    if (key == nullptr || count > capacity_ - used_) return;
    if (used_ > std::numeric_limits<int32_t>::max()) return;
    row.begin = static_cast<int32_t>(used_);
    std::copy_n(probability, count, probability_ + used_);
    std::copy_n(key, count, key_ + used_);
    used_ += count;
  }
  // A row that sees no key.
  void AddEmpty() { rows_[added_++] = {0.0, 0.0, 0, 0}; }
  // A row whose output is NaN.
  void AddNotANumber() {
    constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
    rows_[added_++] = {kNaN, kNaN, 0};
  }

  // After the rows: Σ u·value / Σ u of each, [rows][value_size], `stride` apart. Replaces the lists
  // of the whole panel, so only for panels of dense rows (for α = 1 it is the output). False, and
  // nothing done, if there is no room.
  bool StoreMeans(const T* mean, int64_t stride) {
    if (row_count_ * value_size_ * static_cast<int64_t>(sizeof(T)) > bytes_) return false;
    for (int64_t r = 0; r < row_count_; ++r) {
      std::copy_n(mean + r * stride, value_size_, probability_ + r * value_size_);
      if (rows_[r].count > 0) rows_[r].begin = SavedRow::kNotKept;
    }
    rows_[0].has_mean = 1;
    return true;
  }

 private:
  SavedRow* rows_;
  int64_t row_count_;
  int64_t capacity_;
  int64_t bytes_;
  int64_t value_size_;
  T* probability_;
  int32_t* key_;
  int64_t added_ = 0;
  int64_t used_ = 0;
};

// Reads one panel.
template <typename T>
struct SavedPanel {
  const SavedRow* row = nullptr;
  const T* probability = nullptr;  // Entry `begin` of a row is its first.
  const int32_t* key = nullptr;
  const T* mean = nullptr;  // [rows][value_size], or null.

  SavedPanel() = default;
  SavedPanel(const SavedLayout& layout, void* data, int64_t first_row, int64_t rows)
      : row(layout.Rows(data) + first_row),
        probability(reinterpret_cast<const T*>(layout.Pool(data, first_row))),
        key(reinterpret_cast<const int32_t*>(probability + layout.PoolBegin(first_row + rows) -
                                             layout.PoolBegin(first_row))),
        mean(row->has_mean != 0 ? probability : nullptr) {}
};

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_SAVED_SUPPORT_H_
