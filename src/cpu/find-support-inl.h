// Supports that the forward pass did not keep, found again.
//
// One product of a panel's queries with all keys it sees, as in the forward pass, but with the
// final thresholds, so that only the support is ever a hit. Scores come out of the same tile as in
// the forward pass, so the same keys are found. Memory traffic: the packed keys once a group of
// rows, from the caches.

#if defined(FLASH_ENTMAX_SRC_CPU_FIND_SUPPORT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_ENTMAX_SRC_CPU_FIND_SUPPORT_INL_H_
#undef FLASH_ENTMAX_SRC_CPU_FIND_SUPPORT_INL_H_
#else
#define FLASH_ENTMAX_SRC_CPU_FIND_SUPPORT_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/backward-inl.h"
#include "cpu/backward_kernels.h"
#include "cpu/compress-inl.h"
#include "cpu/scores-inl.h"
#include "cpu/threshold-inl.h"
#include "cpu/tile-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Appends the scores of one row and one key block that are above the limit.
template <typename T>
void AppendFound(const T* HWY_RESTRICT scores, int32_t first_key, T limit,
                 typename BackwardMemory<T>::Found* found) {
  const hn::ScalableTag<T> d;
  const hn::Rebind<int32_t, decltype(d)> di;
  const size_t lanes = hn::Lanes(d);
  if (found->score.size() < found->count + 2 * TileWidth<T>()) {
    const size_t size = 2 * found->score.size() + 16 * TileWidth<T>();
    found->score.resize(size);
    found->key.resize(size);
  }
  for (size_t i = 0; i < TileWidth<T>(); i += lanes) {
    const auto s = hn::LoadU(d, scores + i);
    const auto above = hn::Gt(s, hn::Set(d, limit));
    const auto key = hn::Iota(di, first_key + static_cast<int32_t>(i));
    found->count += CompressEntries(d, di, s, key, above, found->score.data() + found->count,
                                    found->key.data() + found->count);
  }
}

// Scores at or below it are exact zeros at this level; a little low, because probabilities decide.
template <typename T>
T LowestScore(const Curve& curve, const SavedRow& row, const Level& level) {
  if (curve.m <= 0.0) return -Infinity<T>();
  const double reach = (1.0 - level.shift) / level.slope;
  const double slack =
      (std::abs(row.max) + reach) * 2.0 * static_cast<double>(std::numeric_limits<T>::epsilon());
  return static_cast<T>(row.max - reach - slack);
}

// Turns the scores found into probabilities, in double as the forward pass does, and drops zeros.
template <CurveKind kKind, typename T>
void FoundProbabilities(const SavedRow& row, const Level& level,
                        typename BackwardMemory<T>::Found* found) {
  const DoubleTag d;
  const size_t lanes = hn::Lanes(d);
  size_t kept = 0;
  for (size_t i = 0; i < found->count; i += lanes) {
    const auto distance = hn::Sub(hn::Set(d, row.max), LoadScores(d, &found->score[i]));
    const auto y = hn::MulAdd(distance, hn::Set(d, level.slope), hn::Set(d, level.shift));
    hn::Vec<DoubleTag> p;
    hn::Vec<DoubleTag> u;
    EvaluateCurve<kKind>(d, y, level.exponent, &p, &u);
    HWY_ALIGN double lane[HWY_MAX_BYTES / sizeof(double)];
    hn::Store(hn::Mul(p, hn::Set(d, level.factor)), d, lane);
    const size_t size = std::min(lanes, found->count - i);
    for (size_t j = 0; j < size; ++j) {
      const T value = static_cast<T>(lane[j]);
      if (!(value > T{0})) continue;
      found->score[kept] = value;
      found->key[kept] = found->key[i + j];
      ++kept;
    }
  }
  found->count = kept;
}

// Finds the support of the panel's rows that have one but did not keep it.
template <CurveKind kKind, typename T>
void FindSupport(const BackwardHead<T>& head, int64_t first, int64_t queries,
                 const SavedPanel<T>& saved, BackwardMemory<T>* memory) {
  constexpr size_t kWidth = TileWidth<T>();
  const Curve& curve = head.scores.curve;
  const auto depth = static_cast<size_t>(head.scores.head_size);
  PanelInput<T> input = head.scores;
  input.first_query = first;
  input.queries = queries;
  const int64_t groups = (queries + kTileRows - 1) / kTileRows;
  const auto rows_padded = static_cast<size_t>(groups * kTileRows);
  if (memory->found.size() < rows_padded) memory->found.resize(rows_padded);
  ScaleQueries(head, first, queries, groups * kTileRows, input.head_size, &memory->query);
  HWY_ALIGN T scores[kTileRows * kWidth];
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first_row = group * kTileRows;
    const int64_t rows = std::min<int64_t>(kTileRows, queries - first_row);
    HWY_ALIGN T limit[kTileRows];
    Level level[kTileRows];
    uint32_t wanted = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const SavedRow& row = saved.row[first_row + r];
      memory->found[static_cast<size_t>(first_row + r)].count = 0;
      limit[r] = Infinity<T>();
      if (row.not_a_number() || row.count == 0 || row.begin != SavedRow::kNotKept) continue;
      wanted |= uint32_t{1} << r;
      level[r] = LevelOf(curve, row.level);
      limit[r] = LowestScore<T>(curve, row, level[r]);
    }
    std::fill(limit + rows, limit + kTileRows, Infinity<T>());
    if (wanted == 0) continue;
    const int64_t query = first + first_row;
    const BlockRange blocks = VisibleBlocks(input, query, query + rows - 1);
    for (int64_t block = blocks.first; block < blocks.end; ++block) {
      const auto first_key = block * static_cast<int64_t>(kWidth);
      Tile<T> tile;
      tile.Zero();
      tile.MultiplyAdd(memory->query.data() + first_row * input.head_size, depth,
                       input.head.keys + block * static_cast<int64_t>(kWidth * depth), kWidth,
                       depth);
      uint32_t hits = wanted;
      if (NeedsModification(input, query, query + rows - 1, first_key)) {
        tile.Store(scores, kWidth);
        for (int64_t r = 0; r < rows; ++r) {
          ModifyScores(input, query + r, first_key, scores + r * static_cast<int64_t>(kWidth));
        }
      } else {
        hits &= tile.RowsAbove(limit);
        if (hits != 0) tile.Store(scores, kWidth);
      }
      for (; hits != 0; hits &= hits - 1) {
        const auto r = hwy::Num0BitsBelowLS1Bit_Nonzero32(hits);
        AppendFound<T>(scores + r * kWidth, static_cast<int32_t>(first_key), limit[r],
                       &memory->found[static_cast<size_t>(first_row) + r]);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      if ((wanted >> r & 1) == 0) continue;
      auto& found = memory->found[static_cast<size_t>(first_row + r)];
      FoundProbabilities<kKind, T>(saved.row[first_row + r], level[r], &found);
    }
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#endif  // FLASH_ENTMAX_SRC_CPU_FIND_SUPPORT_INL_H_
