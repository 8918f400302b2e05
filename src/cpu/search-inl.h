// The search for candidates behind a panel's first keys: which keys may be above their row's bound.
//
// The answer needs no exact scores. Every test here is one-sided: a key that it leaves out is at or
// below the bound, whatever order its product is summed in; a key that it lets through is scored
// again (ScoreNewKeys) and compared by TakeScores(). So results do not depend on which test ran.

#if defined(FLASH_ENTMAX_SRC_CPU_SEARCH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_ENTMAX_SRC_CPU_SEARCH_INL_H_
#undef FLASH_ENTMAX_SRC_CPU_SEARCH_INL_H_
#else
#define FLASH_ENTMAX_SRC_CPU_SEARCH_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "cpu/attention_panel.h"
#include "cpu/candidates-inl.h"
#include "cpu/compress-inl.h"
#include "cpu/prefetch.h"
#include "cpu/scores-inl.h"
#include "cpu/screen_int7-inl.h"
#include "cpu/screen_int8.h"
#include "cpu/tile-inl.h"
#include "hwy/highway.h"
#include "math/element.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// A group of query rows during the search.
template <typename T>
struct GroupSearch {
  int64_t first_row = 0;  // Within the sequence.
  int64_t rows = 0;
  const T* query = nullptr;
  CandidateList<T>* lists = nullptr;
  T norm[kTileRows];                       // ‖q‖, rounded up; 0 behind the last row.
  T limit[16];                             // Products at or below it need not be found.
  bool dense = false;                      // Given up: the dense path takes the group.
  const uint8_t* rounded_query = nullptr;  // Null if the group cannot be screened.
  ScreenRows screen_rows;
};

// How far two sums of the same product in any two orders may differ, relative to ‖q‖·‖k‖: twice
// γ_n (Higham 2002, equation 3.5, with Cauchy–Schwarz), generously.
template <typename T>
T OrderSlack(int64_t head_size) {
  return static_cast<T>(1.01) * static_cast<T>(head_size + 8) * std::numeric_limits<T>::epsilon();
}

// The product below which the score of `row` and every key of [first_key, end_key) is at or below
// `bound`: undoes cap and position bias, rounded down.
template <typename T>
T ProductLimit(const PanelInput<T>& input, int64_t row, int64_t first_key, int64_t end_key,
               T bound) {
  constexpr auto kEpsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  const ScoreModifiers<T>& modifiers = input.modifiers;
  double limit = static_cast<double>(bound);
  if (modifiers.slope != T{0}) {
    const int64_t position = input.mask.Position(row);
    const int64_t distance = std::max<int64_t>({0, position - (end_key - 1), first_key - position});
    const double fall = static_cast<double>(modifiers.slope) * static_cast<double>(distance);
    limit += fall - 4.0 * kEpsilon * (fall + std::abs(limit));
  }
  if (modifiers.softcap != T{0}) {
    const auto cap = static_cast<double>(modifiers.softcap);
    // The computed tanh is good to a few units in the last place.
    const double x = limit / cap - 64.0 * kEpsilon;
    if (x >= 1.0) return Infinity<T>();
    if (!(x > -1.0)) return -Infinity<T>();
    limit = cap * std::atanh(x);
    limit -= 64.0 * kEpsilon * std::abs(limit);
  }
  if (limit == static_cast<double>(bound)) return bound;
  return static_cast<T>(limit - kEpsilon * std::abs(limit));
}

template <typename T>
void SetLimits(const PanelInput<T>& input, int64_t first_key, int64_t end_key,
               GroupSearch<T>* group) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    group->limit[r] = r < group->rows ? ProductLimit(input, group->first_row + r, first_key,
                                                     end_key, group->lists[r].bound)
                                      : Infinity<T>();
  }
}

// Of the keys of a block whose bits are set, those that `row` of the group sees.
template <typename T>
HWY_INLINE uint64_t VisibleBits(const PanelInput<T>& input, int64_t row, uint64_t above,
                                int64_t first_key, const GroupSearch<T>& group) {
  const int64_t begin = input.mask.First(group.first_row + row) - first_key;
  const int64_t end = input.mask.End(group.first_row + row) - first_key;
  if (begin >= 64 || end <= 0) return 0;
  if (begin > 0) above &= ~uint64_t{0} << begin;
  if (end < 64) above &= (uint64_t{1} << end) - 1;
  return above;
}

// Appends the keys of a block whose bits are set, as far as `row` of the group sees them.
template <typename T>
HWY_INLINE void AppendKeys(const PanelInput<T>& input, int64_t row, uint64_t above,
                           int64_t first_key, GroupSearch<T>* group) {
  CandidateList<T>* list = &group->lists[row];
  if (list->not_a_number) return;
  above = VisibleBits(input, row, above, first_key, *group);
  MakeRoom(list);
  for (; above != 0; above &= above - 1) {
    const auto j = static_cast<int64_t>(hwy::Num0BitsBelowLS1Bit_Nonzero64(above));
    list->key[list->count++] = static_cast<int32_t>(first_key + j);
  }
}

// Tests one block by products in T.
template <typename T>
void TestBlock(const PanelInput<T>& input, int64_t block, GroupSearch<T>* group) {
  constexpr size_t kWidth = TileWidth<T>();
  const hn::ScalableTag<T> d;
  const auto depth = static_cast<size_t>(input.head_size);
  const int64_t first_key = block * static_cast<int64_t>(kWidth);
  const T key_norm = static_cast<T>(input.table.bounds[block].norm);
  const T slack = OrderSlack<T>(input.head_size);
  HWY_ALIGN T limit[kTileRows];
  bool zero = true;
  for (int r = 0; r < kTileRows; ++r) {
    const T largest = group->norm[r] * key_norm;
    limit[r] = group->limit[r] - slack * largest;
    // With NaN every comparison is a hit: sums near the end of the range overflow in one order and
    // not in another.
    if (!(largest < static_cast<T>(1e36))) limit[r] = std::numeric_limits<T>::quiet_NaN();
    zero = zero && (r >= group->rows || largest <= limit[r]);
  }
  if (zero && !input.modifiers.bias) return;
  Tile<T> tile;
  tile.Zero();
  tile.MultiplyAdd(group->query, static_cast<size_t>(input.query_stride),
                   input.head.keys + block * static_cast<int64_t>(kWidth * depth), kWidth, depth);
  HWY_ALIGN T scores[kTileRows * kWidth];
  uint32_t hits = (uint32_t{1} << group->rows) - 1;
  if (input.modifiers.bias) {
    // A bias may lift any score, so the tile is modified first; the limits are then the bounds.
    tile.Store(scores, kWidth);
    for (int64_t r = 0; r < group->rows; ++r) {
      ModifyScores(input, group->first_row + r, first_key,
                   scores + static_cast<size_t>(r) * kWidth);
      const T bound = group->lists[r].bound;
      const auto reach = static_cast<T>(input.mask.key_length + input.mask.query_length);
      const T size = group->norm[r] * key_norm + std::abs(bound) + input.modifiers.softcap +
                     input.modifiers.slope * reach;
      limit[r] = bound - T{2} * slack * size;
    }
  } else {
    hits &= tile.RowsAbove(limit);
    if (hits == 0) return;
    tile.Store(scores, kWidth);
  }
  for (; hits != 0; hits &= hits - 1) {
    const size_t r = hwy::Num0BitsBelowLS1Bit_Nonzero32(hits);
    const auto vlimit = hn::Set(d, limit[r]);
    uint64_t above = 0;
    for (size_t i = 0; i < kWidth; i += hn::Lanes(d)) {
      uint8_t bits[8] = {};
      hn::StoreMaskBits(d, hn::Not(hn::Le(hn::LoadU(d, scores + r * kWidth + i), vlimit)), bits);
      above |= (uint64_t{bits[0]} | uint64_t{bits[1]} << 8) << i;
    }
    AppendKeys(input, static_cast<int64_t>(r), above, first_key, group);
  }
}

// Hits of screened tiles are tagged with block, group and row.
constexpr uint32_t kRowBits = 4;
constexpr uint32_t kGroupBits = 3;
static_assert(kTileRows <= 1 << kRowBits && kGroupsPerPanel <= 1 << kGroupBits);
static_assert(kTileRows <= static_cast<int>(ScreenHits::kMostRows));
static_assert(kMaxScreenBlocks << (kGroupBits + kRowBits) == int64_t{1} << 32);

// Tests one block of group `index` by products of small integers.
HWY_INLINE void ScreenBlock(const PanelInput<float>& input, int64_t block, int64_t index,
                            const GroupSearch<float>& group, ScreenHits* hits) {
  const auto tag = (static_cast<uint32_t>(block) << (kGroupBits + kRowBits)) +
                   (static_cast<uint32_t>(index) << kRowBits);
  const Screening screening = input.table.screening;
  const KeyBlockBound& bound = input.table.bounds[block];
  const uint8_t* keys =
      input.table.rounded +
      block * ScreenBytes(screening, static_cast<int64_t>(TileWidth<float>()), input.head_size);
  const float slack = OrderSlack<float>(input.head_size);
  if (screening == Screening::kInt8) {
    ScreenTileInt8(group.screen_rows, reinterpret_cast<const int8_t*>(group.rounded_query), bound,
                   keys, static_cast<size_t>(input.head_size), group.limit, slack, tag, hits);
    return;
  }
  ScreenTileInt7Impl(group.screen_rows, group.rounded_query, bound, keys,
                     static_cast<size_t>(input.head_size), group.limit, slack, tag, hits);
}

// Moves the hits of screened tiles to the lists. Those of a row stay in the order of the visit.
HWY_INLINE void TakeHits(const PanelInput<float>& input, bool all_visible,
                         GroupSearch<float>* groups, ScreenHits* hits) {
  FinishHits(hits);
  const hn::ScalableTag<int32_t> d;
  const size_t lanes = hn::Lanes(d);
  const auto first_lanes = hn::Iota(d, 0);
  for (size_t i = 0; i < hits->count; ++i) {
    const uint32_t where = hits->where[i];
    const auto first_key =
        static_cast<int32_t>((where >> (kGroupBits + kRowBits)) * uint32_t{TileWidth<float>()});
    GroupSearch<float>& group = groups[(where >> kRowBits) & ((1u << kGroupBits) - 1)];
    const int64_t r = where & ((1u << kRowBits) - 1);
    CandidateList<float>* list = &group.lists[r];
    uint32_t above = hits->above[i];
    if (!all_visible) {
      above = static_cast<uint32_t>(VisibleBits(input, r, above, first_key, group));
    }
    MakeRoom(list);
    int32_t* HWY_RESTRICT key = list->key.data() + list->count;
    list->count += hwy::PopCount(above);
    // In whole vectors without a loop over the bits, since how many there are cannot be predicted.
    for (size_t j = 0; j < TileWidth<float>(); j += lanes) {
      const uint32_t some = above & ((uint32_t{1} << lanes) - 1);
      const auto keys = hn::Add(first_lanes, hn::Set(d, first_key + static_cast<int32_t>(j)));
      hn::StoreU(CompressBits(d, keys, some), d, key);
      key += hwy::PopCount(some);
      above >>= lanes;
    }
  }
  hits->count = 0;
}

// Sums of neighbouring lanes: those of `a` in the lower half, those of `b` in the upper.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V AddNeighbours(D d, V a, V b) {
#if HWY_TARGET == HWY_SCALAR
  (void)d;  // Lanes have no neighbours; never called.
  return hn::Add(a, b);
#else
  return hn::Add(hn::ConcatEven(d, b, a), hn::ConcatOdd(d, b, a));
#endif
}

// Four products of one query row and a key, in partial sums: a quarter of the lanes each.
template <class D, typename T = hn::TFromD<D>>
HWY_INLINE hn::Vec<D> ProductsOfFour(D d, const T* HWY_RESTRICT query, const T* HWY_RESTRICT k0,
                                     const T* HWY_RESTRICT k1, const T* HWY_RESTRICT k2,
                                     const T* HWY_RESTRICT k3, size_t depth) {
  auto s0 = hn::Zero(d);
  auto s1 = s0;
  auto s2 = s0;
  auto s3 = s0;
  for (size_t e = 0; e < depth; e += hn::Lanes(d)) {
    const auto q = hn::LoadU(d, query + e);
    s0 = hn::MulAdd(q, hn::LoadU(d, k0 + e), s0);
    s1 = hn::MulAdd(q, hn::LoadU(d, k1 + e), s1);
    s2 = hn::MulAdd(q, hn::LoadU(d, k2 + e), s2);
    s3 = hn::MulAdd(q, hn::LoadU(d, k3 + e), s3);
  }
  return AddNeighbours(d, AddNeighbours(d, s0, s1), AddNeighbours(d, s2, s3));
}

// Products of one query row and listed keys, each summed in the one order that candidates have: a
// vector of partial sums over the head, then neighbouring lanes until one is left. A vector of keys
// at a time, so that the sums of lanes cost little more than one key's.
template <typename T>
void ProductsOfKeys(const PanelInput<T>& input, const T* HWY_RESTRICT query,
                    const int32_t* HWY_RESTRICT keys, size_t n, T* HWY_RESTRICT scores) {
  const hn::ScalableTag<T> d;
  constexpr size_t kLanes = hn::MaxLanes(d);
  const auto depth = static_cast<size_t>(input.query_stride);
  const auto row = [&](size_t i) HWY_ATTR {
    return input.table.rows + keys[std::min(i, n - 1)] * input.table.row_stride;
  };
  // Behind n there is room, and nothing of value.
  if constexpr (kLanes <= 2) {
    for (size_t i = 0; i < n; ++i) {
      auto sum = hn::Zero(d);
      for (size_t e = 0; e < depth; e += kLanes) {
        sum = hn::MulAdd(hn::LoadU(d, query + e), hn::LoadU(d, row(i) + e), sum);
      }
      scores[i] = hn::GetLane(hn::SumOfLanes(d, sum));
    }
    return;
  }
  const auto four = [&](size_t i) HWY_ATTR {
    return ProductsOfFour(d, query, row(i), row(i + 1), row(i + 2), row(i + 3), depth);
  };
  const auto eight = [&](size_t i) HWY_ATTR {
    const auto sum = four(i);
    return AddNeighbours(d, sum, i + 4 < n ? four(i + 4) : sum);
  };
  for (size_t i = 0; i < n; i += kLanes) {
    if constexpr (kLanes == 4) {
      hn::StoreU(four(i), d, scores + i);
    } else if constexpr (kLanes == 8) {
      hn::StoreU(eight(i), d, scores + i);
    } else {
      static_assert(kLanes <= 16);
      const auto sum = eight(i);
      hn::StoreU(AddNeighbours(d, sum, i + 8 < n ? eight(i + 8) : sum), d, scores + i);
    }
  }
}

// Cap, position bias, bias and key mask of listed keys.
template <typename T>
void ModifyListed(const PanelInput<T>& input, int64_t row, const int32_t* keys, size_t n,
                  T* scores) {
  const ScoreModifiers<T>& modifiers = input.modifiers;
  if (!modifiers.any() && input.head.key_bias == nullptr) return;
  const int64_t position = input.mask.Position(row);
  for (size_t i = 0; i < n; ++i) {
    const int64_t key = keys[i];
    T s = scores[i];
    if (modifiers.softcap != T{0}) s = modifiers.softcap * std::tanh(s / modifiers.softcap);
    if (modifiers.slope != T{0}) {
      s = std::fma(-modifiers.slope, static_cast<T>(std::abs(position - key)), s);
    }
    if (modifiers.bias) {
      s += static_cast<T>(ReadElement(
          modifiers.bias, row * modifiers.bias_query_stride + key * modifiers.bias_key_stride));
    }
    const bool hidden = input.head.key_bias != nullptr && input.head.key_bias[key] != T{0};
    scores[i] = hidden ? -Infinity<T>() : s;
  }
}

// Asks for the rows of the keys that the search has listed for a row, a few dozen at most.
template <typename T>
HWY_INLINE void PrefetchNewKeys(const PanelInput<T>& input, const CandidateList<T>& list) {
  constexpr size_t kMost = 32;
  const size_t end = std::min(list.count, list.scored + kMost);
  for (size_t i = list.scored; i < end; ++i) {
    PrefetchRow(input.table.rows + list.key[i] * input.table.row_stride, input.head_size);
  }
}

// Scores and takes the keys that the search has listed.
template <CurveKind kKind, typename T>
void ScoreNewKeys(const PanelInput<T>& input, GroupSearch<T>* group) {
  PrefetchNewKeys(input, group->lists[0]);
  for (int64_t r = 0; r < group->rows; ++r) {
    CandidateList<T>* list = &group->lists[r];
    if (r + 1 < group->rows) PrefetchNewKeys(input, group->lists[r + 1]);
    const size_t first = list->scored;
    const size_t n = list->count - first;
    if (n == 0) continue;
    const T* query = group->query + r * input.query_stride;
    const int32_t* keys = list->key.data() + first;
    ProductsOfKeys(input, query, keys, n, list->score.data() + first);
    ModifyListed(input, group->first_row + r, keys, n, list->score.data() + first);
    TakeScores<kKind>(input.curve, list);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#endif  // FLASH_ENTMAX_SRC_CPU_SEARCH_INL_H_
