// One panel of query rows of CPU attention, compiled for every instruction set.

#ifndef FLASH_ENTMAX_SRC_CPU_ATTENTION_PANEL_H_
#define FLASH_ENTMAX_SRC_CPU_ATTENTION_PANEL_H_

#include <cstdint>
#include <vector>

#include "cpu/aligned_array.h"
#include "cpu/curve.h"
#include "cpu/saved_support.h"
#include "cpu/screening.h"
#include "flash_entmax/tensor.h"
#include "math/visible_keys.h"

namespace flash_entmax::cpu {

// Sizes that depend on the instruction set: keys come in blocks of `keys_per_block`, query rows in
// groups of `rows_per_group`, and values in rows of a multiple of `value_multiple`.
struct PanelShape {
  int rows_per_group = 0;
  int keys_per_block = 0;
  int value_multiple = 0;
};

template <typename T>
PanelShape GetPanelShape();

// Groups of rows in a panel. They share a key block while it is in the first-level cache, and the
// rows of keys that pass for several of them while these are in the second-level cache. More would
// leave too few panels to short sequences.
inline constexpr int kGroupsPerPanel = 8;
// Key blocks whose scores the softmax path makes before it exponentiates them.
inline constexpr int kBlocksPerSoftmaxStep = 4;

// Keys and values of one KV head of one sequence, in the engine's layout.
template <typename T>
struct PackedHead {
  // Blocks of keys_per_block keys, each as [head_size][keys_per_block]; zeros behind the last key.
  const T* keys = nullptr;
  // Rows of value_width elements, value_stride apart: zeros behind value_size, and for softmax rows
  // of zeros up to a whole step.
  const T* values = nullptr;
  int64_t value_stride = 0;
  int64_t value_width = 0;  // value_size rounded up to PanelShape::value_multiple.
  // False if any value is infinite or NaN: then 0·value must not be computed.
  bool values_finite = true;
  // 0 for keys that may be seen, −∞ for hidden ones, up to a whole block; null if there is no key
  // mask.
  const T* key_bias = nullptr;
};

// What turns products into scores besides the mask.
template <typename T>
struct ScoreModifiers {
  T softcap = T{0};
  T slope = T{0};
  // Additive bias of this head: element (query, key) of the sequence; empty if there is none.
  TensorView bias;
  int64_t bias_query_stride = 0;
  int64_t bias_key_stride = 0;

  bool any() const { return softcap != T{0} || slope != T{0} || static_cast<bool>(bias); }
};

// The keys of one KV head once more, as the candidate path looks at single keys and proves others
// zero.
template <typename T>
struct KeyTable {
  const T* rows = nullptr;  // Key after key, row_stride elements apart, zeros behind head_size.
  int64_t row_stride = 0;
  const KeyBlockBound* bounds = nullptr;  // One a block.
  float largest_norm = 0.0f;              // Over all blocks.
  Screening screening = Screening::kNone;
  const uint8_t* rounded = nullptr;  // Block after block, see RoundKeysInt8() and …Int7().
};

template <typename T>
struct PanelInput {
  PackedHead<T> head;
  KeyTable<T> table;  // Not for α = 1.
  int64_t head_size = 0;
  PositionMask mask;
  ScoreModifiers<T> modifiers;
  Curve curve;
  int64_t first_query = 0;  // Of the panel, within its sequence.
  int64_t queries = 0;
  // Query rows times scale, [rows up to a whole group][query_stride]; zeros behind the last row and
  // behind head_size.
  const T* query = nullptr;
  int64_t query_stride = 0;
};

// The candidates of one row: keys that no bound has excluded yet.
template <typename T>
struct CandidateList {
  AlignedVector<T> score;
  AlignedVector<int32_t> key;
  size_t count = 0;
  size_t refine_at = 0;  // Number of candidates at which the bound is raised next.
  T bound = T{0};        // Scores at or below it are exact zeros.
  T max = T{0};
  double offset = 0.0;  // c of curve.h, relative to `max`; a lower bound until the end.
  size_t scored = 0;    // Of `count` keys, those that have a score already.
  bool not_a_number = false;
};

// Buffers of one thread.
template <typename T>
struct PanelMemory {
  ScreenHits hits;  // The most aligned first.
  AlignedVector<T> query;
  std::vector<uint8_t> rounded_query;
  AlignedVector<T> scores;
  AlignedVector<T> probability[2];  // Of a row and the one before.
  std::vector<CandidateList<T>> lists;
  AlignedVector<T> output;  // [rows][value_width]
  std::vector<double> threshold;
  // Support of the last panel, row after row; filled if wanted.
  std::vector<int64_t> support_size;
  std::vector<int32_t> support_key;
  std::vector<float> support_probability;
  // Takes every row of the panel for the backward pass; null if it is not to be kept.
  SavedPanelWriter<T>* saved = nullptr;
  // With `saved`, of the dense rows of the panel (α ≤ 2, not 1): the mean of the values under
  // u = p^(2−α), [rows][value_width], how many rows have one, and the sizes of their supports.
  AlignedVector<T> means;
  int64_t mean_rows = 0;
  int64_t mean_entries = 0;
  AlignedVector<T> weights;     // u of dense rows, beside their scores.
  AlignedVector<T> candidates;  // Scores of a dense row that are not zero yet.
};

// Runs a panel; leaves output, threshold and, if `want_support`, the support in `memory`.
// May throw std::bad_alloc when a list has to grow.
template <typename T>
void RunPanel(const PanelInput<T>& input, bool want_support, PanelMemory<T>* memory);

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_ATTENTION_PANEL_H_
