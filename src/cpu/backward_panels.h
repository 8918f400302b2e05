// Work of attention's backward pass, listed: panels of query rows, and pairs of row and key parts.

#ifndef FLASH_ENTMAX_SRC_CPU_BACKWARD_PANELS_H_
#define FLASH_ENTMAX_SRC_CPU_BACKWARD_PANELS_H_

#include <cstdint>
#include <limits>
#include <vector>

#include "attention_resolved.h"
#include "cpu/saved_support.h"

namespace flash_entmax::cpu {

// Query rows of one head that the forward pass took together.
struct BackwardPanel {
  int64_t sequence = 0;
  int64_t head = 0;
  int64_t group = 0;  // GroupOf()
  int64_t first_query = 0;
  int64_t queries = 0;
  int64_t row = 0;      // Of the first query, among all rows.
  int64_t entries = 0;  // Of its supports.
  int64_t visible = 0;  // Keys that its rows see.
  bool all_kept = true;
  bool dense = false;
};

// A (sequence, KV head) with the query heads that share it.
inline int64_t GroupOf(const ResolvedAttention& resolved, int64_t sequence, int64_t head) {
  return sequence * resolved.kv_heads + head / (resolved.heads / resolved.kv_heads);
}

// The first row of a head of a sequence, among all rows.
inline int64_t FirstRowOf(const ResolvedAttention& resolved, const Sequence& sequence,
                          int64_t head) {
  return (sequence.batch * resolved.heads + head) * resolved.query_length + sequence.first_query;
}

// Keys [first, end) of a sequence.
struct KeyRange {
  int64_t first = std::numeric_limits<int64_t>::max();
  int64_t end = 0;
};

// All panels, in the order of (sequence, head, query).
std::vector<BackwardPanel> ListBackwardPanels(const ResolvedAttention& resolved,
                                              const SavedLayout& layout, void* saved);

// Rows of a head and keys that the dense way takes together.
struct DensePair {
  int64_t sequence, head, first_row, end_row, first_key, end_key;
};

// The phases of the dense way. No two pairs of a phase share rows or keys, and together they cover
// every (dense row, key that it sees). `dense` has a 1 for every dense row.
std::vector<std::vector<DensePair>> ListDensePhases(const ResolvedAttention& resolved,
                                                    const std::vector<uint8_t>& dense);

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_BACKWARD_PANELS_H_
