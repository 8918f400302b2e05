// The first keys of a group of rows: scores kept, bounds from the maxima of disjoint sets of keys,
// candidates compressed. Rows that are short enough end here.

#if defined(FLASH_ENTMAX_SRC_CPU_OPENING_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_ENTMAX_SRC_CPU_OPENING_INL_H_
#undef FLASH_ENTMAX_SRC_CPU_OPENING_INL_H_
#else
#define FLASH_ENTMAX_SRC_CPU_OPENING_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/attention_panel.h"
#include "cpu/candidates-inl.h"
#include "cpu/scores-inl.h"
#include "cpu/search-inl.h"
#include "cpu/threshold-inl.h"
#include "cpu/tile-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Rows of a tile, up to whole vectors of any instruction set.
constexpr size_t kPaddedRows = 16;

// Newton steps on the maxima of the sets.
constexpr int kOpeningNewtonSteps = 5;

// How far the rounding of sums over the maxima may move their solution, relative to 1 + c. Sums of
// some thirty terms in [0, 1] are good to 1e-5; the general curve has logarithms of float besides.
template <CurveKind kKind, typename T>
constexpr double OpeningError() {
  if (std::is_same_v<T, double>) return 1e-10;
  return kKind == CurveKind::kGeneral ? kFloatPassError : 2e-5;
}

// Lower bounds of the offsets of kTileRows rows from the maxima of their sets of keys (F1: maxima
// of disjoint sets are scores of different keys, so their threshold is a lower bound of the row's),
// all rows side by side in vectors. maxima: [kTileRows][sets].
template <CurveKind kKind, typename T>
void BoundsOfMaxima(const T* HWY_RESTRICT maxima, const Curve& curve, T* HWY_RESTRICT max,
                    double* HWY_RESTRICT offset) {
  constexpr size_t kSets = TileWidth<T>();
  const hn::ScalableTag<T> d;
  HWY_ALIGN T columns[kSets * kPaddedRows];
  for (size_t r = 0; r < kPaddedRows; ++r) {
    for (size_t set = 0; set < kSets; ++set) {
      columns[set * kPaddedRows + r] = r < kTileRows ? maxima[r * kSets + set] : T{0};
    }
  }
  const auto zero = hn::Zero(d);
  const auto one = hn::Set(d, T{1});
  const auto slope = hn::Set(d, static_cast<T>(curve.slope));
  const auto m = hn::Set(d, static_cast<T>(curve.m));
  for (size_t first = 0; first < kTileRows; first += hn::Lanes(d)) {
    auto top = hn::Load(d, columns + first);
    for (size_t set = 1; set < kSets; ++set) {
      top = hn::Max(top, hn::Load(d, columns + set * kPaddedRows + first));
    }
    hn::StoreU(top, d, max + first);
    auto c = zero;
    if (kKind != CurveKind::kSoftmax && curve.m <= 1.0) {
      for (int step = 0; step < kOpeningNewtonSteps; ++step) {
        auto sum_p = zero;
        auto sum_u = zero;
        const auto shift = hn::Mul(m, c);
        for (size_t set = 0; set < kSets; ++set) {
          const auto distance = hn::Sub(top, hn::Load(d, columns + set * kPaddedRows + first));
          hn::Vec<decltype(d)> p;
          hn::Vec<decltype(d)> u;
          EvaluateCurve<kKind>(d, hn::MulAdd(distance, slope, shift), curve.exponent, &p, &u);
          sum_p = hn::Add(sum_p, p);
          sum_u = hn::Add(sum_u, u);
        }
        // NewtonStep() of threshold-inl.h, a row a lane.
        const auto ratio = hn::Div(sum_p, sum_u);
        auto change = zero;
        if constexpr (kKind == CurveKind::kSparsemax) {
          change = hn::Mul(ratio, hn::Sub(one, hn::Div(one, sum_p)));
        } else if constexpr (kKind == CurveKind::kSquare) {
          change = hn::Mul(hn::Add(ratio, ratio), hn::Sub(one, hn::Div(one, hn::Sqrt(sum_p))));
        } else {
          const auto root = hn::Exp(d, hn::Neg(hn::Mul(m, hn::Log(d, sum_p))));
          change = hn::Div(hn::Mul(ratio, hn::Sub(one, root)), m);
        }
        // Never down; and rows without a finite maximum, whose change is NaN, stay.
        c = hn::IfThenElse(hn::Gt(change, zero), hn::Add(c, change), c);
      }
    }
    HWY_ALIGN T lanes[kPaddedRows];
    hn::Store(c, d, lanes);
    for (size_t r = 0; r < hn::Lanes(d); ++r) {
      const auto value = static_cast<double>(lanes[r]);
      offset[first + r] = std::max(0.0, value - OpeningError<kKind, T>() * (1.0 + value));
    }
  }
}

// How many of n scores are above the bound.
template <typename T>
size_t CountAbove(const T* HWY_RESTRICT scores, size_t n, T bound) {
  const hn::ScalableTag<T> d;
  const auto limit = hn::Set(d, bound);
  size_t count = 0;
  for (size_t i = 0; i < n; i += hn::Lanes(d)) {
    count += hn::CountTrue(d, hn::Not(hn::Le(hn::LoadU(d, scores + i), limit)));
  }
  return count;
}

// Appends the scores above the list's bound from the scores of a row and the keys from `first_key`
// on. NaN goes in, to be found by TakeScores().
template <typename T>
void CompressOpening(const T* HWY_RESTRICT scores, size_t n, int64_t first_key,
                     CandidateList<T>* list) {
  const hn::ScalableTag<T> d;
  const hn::Rebind<int32_t, decltype(d)> di;
  const size_t lanes = hn::Lanes(d);
  const auto limit = hn::Set(d, list->bound);
  const auto step = hn::Set(di, static_cast<int32_t>(lanes));
  auto key = hn::Iota(di, static_cast<int32_t>(first_key));
  for (size_t i = 0; i < n; i += TileWidth<T>()) {
    MakeRoom(list);
    T* score_out = list->score.data();
    int32_t* key_out = list->key.data();
    size_t count = list->count;
    // Every vector is written, since which ones hold a hit cannot be predicted.
    for (size_t j = i; j < i + TileWidth<T>(); j += lanes) {
      const auto s = hn::LoadU(d, scores + j);
      count += CompressEntries(d, di, s, key, hn::Not(hn::Le(s, limit)), score_out + count,
                               key_out + count);
      key = hn::Add(key, step);
    }
    list->count = count;
  }
}

// Scores from one row to the next: an odd number of cache lines, so that the rows of a tile lie in
// different sets of the first-level cache.
template <typename T>
size_t ScoreStride(const BlockRange& range) {
  constexpr size_t kLine = 64 / sizeof(T);
  const size_t keys = static_cast<size_t>(range.end - range.first) * TileWidth<T>();
  return ((keys + kLine - 1) / kLine | 1) * kLine;
}

// Scores of `rows` rows from `first_row`, up to whole groups, and the keys of the blocks of
// `range`, in memory->scores: [rows][keys of the range]. Groups share a block while it is in the
// first-level cache.
template <typename T>
void ScoreBlocks(const PanelInput<T>& input, int64_t first_row, int64_t rows,
                 const BlockRange& range, PanelMemory<T>* memory) {
  constexpr size_t kWidth = TileWidth<T>();
  const auto depth = static_cast<size_t>(input.head_size);
  const size_t stride = ScoreStride<T>(range);
  const int64_t groups = (rows + kTileRows - 1) / kTileRows;
  const size_t size = static_cast<size_t>(groups * kTileRows) * stride;
  if (memory->scores.size() < size) memory->scores.resize(size);
  for (int64_t block = range.first; block < range.end; ++block) {
    const int64_t first_key = block * static_cast<int64_t>(kWidth);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = first_row + g * kTileRows;
      const int64_t last = first_row + std::min(rows, (g + 1) * kTileRows) - 1;
      T* HWY_RESTRICT target = memory->scores.data() + static_cast<size_t>(g * kTileRows) * stride +
                               static_cast<size_t>(block - range.first) * kWidth;
      if (first_key >= input.mask.End(last) ||
          first_key + static_cast<int64_t>(kWidth) <= input.mask.First(first)) {
        for (size_t r = 0; r < kTileRows; ++r) {
          std::fill_n(target + r * stride, kWidth, -Infinity<T>());
        }
        continue;
      }
      Tile<T> tile;
      tile.Zero();
      tile.MultiplyAdd(input.query + (first - input.first_query) * input.query_stride,
                       static_cast<size_t>(input.query_stride),
                       input.head.keys + block * static_cast<int64_t>(kWidth * depth), kWidth,
                       depth);
      tile.Store(target, stride);
      if (NeedsModification(input, first, last, first_key)) {
        for (int64_t r = first; r <= last; ++r) {
          ModifyScores(input, r, first_key, target + static_cast<size_t>(r - first) * stride);
        }
      }
    }
  }
}

// Keys of the blocks of `range` that a row sees.
template <typename T>
int64_t VisibleKeys(const PanelInput<T>& input, int64_t row, const BlockRange& range) {
  const auto width = static_cast<int64_t>(TileWidth<T>());
  return std::max<int64_t>(0, std::min(range.end * width, input.mask.End(row)) -
                                  std::max(range.first * width, input.mask.First(row)));
}

// Starts the lists of a group of rows from the blocks of `range`. Sets group->dense instead, and
// leaves the scores in memory->scores, if too many keys are above the rows' first bounds: more than
// one in `dense_share`. Returns how many times as many they are.
template <CurveKind kKind, typename T>
double OpenGroup(const PanelInput<T>& input, const BlockRange& range, int64_t dense_share,
                 GroupSearch<T>* group, PanelMemory<T>* memory) {
  constexpr size_t kWidth = TileWidth<T>();
  const hn::ScalableTag<T> d;
  const size_t lanes = hn::Lanes(d);
  const auto n = static_cast<size_t>(range.end - range.first) * kWidth;
  const size_t stride = ScoreStride<T>(range);
  ScoreBlocks(input, group->first_row, group->rows, range, memory);
  const T* HWY_RESTRICT scores = memory->scores.data();
  HWY_ALIGN T maxima[kTileRows * kWidth];
  for (size_t r = 0; r < kTileRows; ++r) {
    for (size_t j = 0; j < kWidth; j += lanes) {
      auto max = hn::LoadU(d, scores + r * stride + j);
      for (size_t i = kWidth; i < n; i += kWidth) {
        max = hn::Max(max, hn::LoadU(d, scores + r * stride + i + j));
      }
      hn::Store(max, d, maxima + r * kWidth + j);
    }
  }
  HWY_ALIGN T max[kPaddedRows];
  HWY_ALIGN double offset[kPaddedRows];
  BoundsOfMaxima<kKind>(maxima, input.curve, max, offset);
  size_t above = 0;
  int64_t visible = 0;
  for (int64_t r = 0; r < group->rows; ++r) {
    CandidateList<T>* list = &group->lists[r];
    // A maximum that is not finite: everything is taken, and TakeScores() will see.
    if (max[r] > -Infinity<T>() && max[r] < Infinity<T>()) {
      list->max = max[r];
      list->offset = offset[r];
      list->bound = BoundOf(*list, input.curve);
    }
    above += CountAbove(scores + static_cast<size_t>(r) * stride, n, list->bound);
    visible += VisibleKeys(input, group->first_row + r, range);
  }
  const double kept = static_cast<double>(static_cast<int64_t>(above) * dense_share) /
                      static_cast<double>(std::max<int64_t>(visible, 1));
  group->dense = kept > 1.0;
  if (group->dense) return kept;
  for (int64_t r = 0; r < group->rows; ++r) {
    CandidateList<T>* list = &group->lists[r];
    CompressOpening(scores + static_cast<size_t>(r) * stride, n,
                    range.first * static_cast<int64_t>(kWidth), list);
    TakeScores<kKind>(input.curve, list);
  }
  return kept;
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#endif  // FLASH_ENTMAX_SRC_CPU_OPENING_INL_H_
