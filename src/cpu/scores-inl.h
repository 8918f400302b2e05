// From products of queries and keys to scores: cap, position bias, bias and masks.

#if defined(FLASH_ENTMAX_SRC_CPU_SCORES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_ENTMAX_SRC_CPU_SCORES_INL_H_
#undef FLASH_ENTMAX_SRC_CPU_SCORES_INL_H_
#else
#define FLASH_ENTMAX_SRC_CPU_SCORES_INL_H_
#endif

#include <algorithm>
#include <limits>

#include "cpu/attention_panel.h"
#include "cpu/tile-inl.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "math/element.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

template <typename T>
constexpr T Infinity() {
  return std::numeric_limits<T>::infinity();
}

// Turns the products of one row and one key block into scores, in place: cap, position bias, bias,
// and −∞ for hidden keys. `row` is the query within the sequence.
template <typename T>
void ModifyScores(const PanelInput<T>& input, int64_t row, int64_t first_key, T* scores) {
  const hn::ScalableTag<T> d;
  const size_t lanes = hn::Lanes(d);
  const ScoreModifiers<T>& modifiers = input.modifiers;
  const auto lowest = hn::Set(d, -Infinity<T>());
  const auto begin = hn::Set(d, static_cast<T>(input.mask.First(row) - first_key));
  const auto end = hn::Set(d, static_cast<T>(input.mask.End(row) - first_key));
  const auto position = hn::Set(d, static_cast<T>(input.mask.Position(row) - first_key));
  HWY_ALIGN T bias[TileWidth<T>()];
  if (modifiers.bias) {
    const int64_t offset =
        row * modifiers.bias_query_stride + first_key * modifiers.bias_key_stride;
    const int64_t keys = std::min<int64_t>(TileWidth<T>(), input.mask.key_length - first_key);
    std::fill_n(bias, TileWidth<T>(), T{0});
    for (int64_t j = 0; j < keys; ++j) {
      bias[j] = static_cast<T>(ReadElement(modifiers.bias, offset + j * modifiers.bias_key_stride));
    }
  }
  for (size_t i = 0; i < TileWidth<T>(); i += lanes) {
    auto s = hn::LoadU(d, scores + i);
    const auto index = hn::Iota(d, static_cast<T>(i));
    if (modifiers.softcap != T{0}) {
      const auto cap = hn::Set(d, modifiers.softcap);
      s = hn::Mul(cap, hn::Tanh(d, hn::Div(s, cap)));
    }
    if (modifiers.slope != T{0}) {
      s = hn::NegMulAdd(hn::Set(d, modifiers.slope), hn::Abs(hn::Sub(position, index)), s);
    }
    if (modifiers.bias) s = hn::Add(s, hn::Load(d, bias + i));
    auto visible = hn::And(hn::Ge(index, begin), hn::Lt(index, end));
    if (input.head.key_bias != nullptr) {
      const auto key_bias = hn::LoadU(d, input.head.key_bias + first_key + i);
      visible = hn::And(visible, hn::Eq(key_bias, hn::Zero(d)));
    }
    hn::StoreU(hn::IfThenElse(visible, s, lowest), d, scores + i);
  }
}

// Whether ModifyScores() changes anything for rows [first, last] and a block.
template <typename T>
bool NeedsModification(const PanelInput<T>& input, int64_t first, int64_t last, int64_t first_key) {
  // First() and End() do not fall from row to row.
  return input.modifiers.any() || input.head.key_bias != nullptr ||
         first_key < input.mask.First(last) ||
         first_key + static_cast<int64_t>(TileWidth<T>()) > input.mask.End(first);
}

// Key blocks [first, end) that any row of [first_row, last_row] sees.
struct BlockRange {
  int64_t first = 0;
  int64_t end = 0;
};

template <typename T>
BlockRange VisibleBlocks(const PanelInput<T>& input, int64_t first_row, int64_t last_row) {
  const auto width = static_cast<int64_t>(TileWidth<T>());
  const int64_t first_key = input.mask.First(first_row);
  const int64_t end_key = input.mask.End(last_row);
  if (end_key <= first_key) return {};
  return {first_key / width, (end_key + width - 1) / width};
}

// The order in which a panel looks at the key blocks of a range: from `start` down, then from
// `start` up.
struct Visit {
  int64_t first = 0;
  int64_t end = 0;
  int64_t start = 0;

  int64_t count() const { return end - first; }
  int64_t Block(int64_t i) const { return i <= start - first ? start - i : first + i; }
  // The smallest range that holds the visited blocks [begin, last], begin ≤ last.
  BlockRange Stretch(int64_t begin, int64_t last) const {
    const int64_t a = Block(begin);
    const int64_t b = Block(last);
    if (a <= start && b > start) return {first, b + 1};
    return {std::min(a, b), std::max(a, b) + 1};
  }
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#endif  // FLASH_ENTMAX_SRC_CPU_SCORES_INL_H_
