// One panel of query rows of exact α-entmax attention on a CPU.
//
// α > 1, one pass over the keys (algorithm: DESIGN.md, "One dense product"). A panel is a few
// groups of query rows; a group is as tall as the register tile. For every block of keys (packed,
// one tile wide) and every group:
//   1. scores of the tile: one register-blocked product;
//   2. while they are in registers, one comparison with each row's bound. In the common case no
//      score is above it, and the tile is forgotten;
//   3. else the tile is stored to the first-level cache and only its rows with a hit are looked at:
//      their scores above the bound are compressed into the row's candidate list.
// A row's bound is a threshold of keys seen so far, so it never exceeds the final one and only
// rises (facts F1 and F2): whatever it excludes is an exact zero. It is raised whenever a list has
// grown by half: a few Newton steps on the list, which is then pruned.
// At the end the threshold is solved on each list in double, and the output is accumulated over the
// support alone.
//
// Keys are visited from the newest to the oldest: in causal rows the newest are the likeliest to
// hold the maximum, and order is free.
//
// Memory traffic: the packed keys once per panel from the second- or third-level cache (4 bytes a
// key element per 48 rows with AVX-512), the values of the support, nothing of size n².
//
// α = 1 runs as flash softmax: softmax-inl.h.

#include "cpu/attention_panel.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attention_panel.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h, which includes this file once for every instruction set.
#include "cpu/candidates-inl.h"
#include "cpu/scores-inl.h"
#include "cpu/softmax-inl.h"
#include "cpu/threshold-inl.h"
#include "cpu/tile-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

// out = Σ probability·values[key] over the list.
template <typename T>
void AccumulateValues(const CandidateList<T>& list, const T* probability, const PackedHead<T>& head,
                      T* HWY_RESTRICT out) {
  constexpr size_t kChunk = 4;
  const hn::ScalableTag<T> d;
  const size_t lanes = hn::Lanes(d);
  const auto padded = static_cast<size_t>(head.value_width);
  size_t e = 0;
  for (; e + kChunk * lanes <= padded; e += kChunk * lanes) {
    auto a0 = hn::Zero(d);
    auto a1 = a0;
    auto a2 = a0;
    auto a3 = a0;
    for (size_t i = 0; i < list.count; ++i) {
      const T* HWY_RESTRICT v = head.values + list.key[i] * head.value_stride + e;
      const auto p = hn::Set(d, probability[i]);
      a0 = hn::MulAdd(p, hn::LoadU(d, v), a0);
      a1 = hn::MulAdd(p, hn::LoadU(d, v + lanes), a1);
      a2 = hn::MulAdd(p, hn::LoadU(d, v + 2 * lanes), a2);
      a3 = hn::MulAdd(p, hn::LoadU(d, v + 3 * lanes), a3);
    }
    hn::StoreU(a0, d, out + e);
    hn::StoreU(a1, d, out + e + lanes);
    hn::StoreU(a2, d, out + e + 2 * lanes);
    hn::StoreU(a3, d, out + e + 3 * lanes);
  }
  for (; e < padded; e += lanes) {
    auto sum = hn::Zero(d);
    for (size_t i = 0; i < list.count; ++i) {
      const T* HWY_RESTRICT v = head.values + list.key[i] * head.value_stride + e;
      sum = hn::MulAdd(hn::Set(d, probability[i]), hn::LoadU(d, v), sum);
    }
    hn::StoreU(sum, d, out + e);
  }
}

template <CurveKind kKind>
HWY_INLINE hn::Vec<DoubleTag> EvaluateLevel(DoubleTag d, hn::Vec<DoubleTag> distance,
                                            const Level& level) {
  const auto y = hn::MulAdd(distance, hn::Set(d, level.slope), hn::Set(d, level.shift));
  hn::Vec<DoubleTag> p;
  hn::Vec<DoubleTag> u;
  EvaluateCurve<kKind>(d, y, level.exponent, &p, &u);
  return hn::Mul(p, hn::Set(d, level.factor));
}

// Probabilities of the list, in T; drops the candidates that turn out to be zero.
template <CurveKind kKind, typename T>
void Probabilities(const Solution& solution, CandidateList<T>* list, T* probability) {
  const DoubleTag d;
  const size_t lanes = hn::Lanes(d);
  size_t kept = 0;
  for (size_t i = 0; i < list->count; i += lanes) {
    const auto distance =
        hn::Sub(hn::Set(d, static_cast<double>(list->max)), LoadScores(d, &list->score[i]));
    auto p = EvaluateLevel<kKind>(d, distance, solution.level);
    if (solution.second.factor > 0.0) {
      p = hn::Add(p, EvaluateLevel<kKind>(d, distance, solution.second));
    }
    HWY_ALIGN double p_lane[HWY_MAX_BYTES / sizeof(double)];
    hn::Store(p, d, p_lane);
    const size_t size = std::min(lanes, list->count - i);
    for (size_t j = 0; j < size; ++j) {
      const T value = static_cast<T>(p_lane[j]);
      if (!(value > T{0})) continue;
      probability[kept] = value;
      list->score[kept] = list->score[i + j];
      list->key[kept] = list->key[i + j];
      ++kept;
    }
  }
  list->count = kept;
}

template <typename T>
void AppendSupport(const CandidateList<T>& list, const T* probability, PanelMemory<T>* memory) {
  const size_t first = memory->support_key.size();
  memory->support_size.push_back(static_cast<int64_t>(list.count));
  // Lists run from new key blocks to old ones; the support is reported in ascending order.
  std::vector<size_t> order(list.count);
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return list.key[a] < list.key[b]; });
  memory->support_key.resize(first + list.count);
  memory->support_probability.resize(first + list.count);
  for (size_t i = 0; i < list.count; ++i) {
    memory->support_key[first + i] = list.key[order[i]];
    memory->support_probability[first + i] = static_cast<float>(probability[order[i]]);
  }
}

// Exact threshold, probabilities and output of one row from its candidates.
template <CurveKind kKind, typename T>
void FinishRow(const PanelInput<T>& input, int64_t row, bool want_support, CandidateList<T>* list,
               PanelMemory<T>* memory) {
  T* out = memory->output.data() + row * input.head.value_width;
  double& threshold = memory->threshold[static_cast<size_t>(row)];
  threshold = std::numeric_limits<double>::quiet_NaN();
  if (list->not_a_number || list->count == 0) {
    std::fill_n(out, input.head.value_width,
                list->not_a_number ? std::numeric_limits<T>::quiet_NaN() : T{0});
    if (want_support) memory->support_size.push_back(0);
    return;
  }
  WriteListEnd(list);
  const Curve& curve = input.curve;
  const double max = static_cast<double>(list->max);
  const Solution solution =
      SolveCurve<kKind>(list->score.data(), list->count, curve, max, list->offset);
  threshold = solution.threshold;
  if (memory->scores.size() < list->count) memory->scores.resize(list->count);
  Probabilities<kKind>(solution, list, memory->scores.data());
  AccumulateValues(*list, memory->scores.data(), input.head, out);
  if (want_support) AppendSupport(*list, memory->scores.data(), memory);
}

template <CurveKind kKind, typename T>
void CandidatePanel(const PanelInput<T>& input, bool want_support, PanelMemory<T>* memory) {
  constexpr size_t kWidth = TileWidth<T>();
  const auto depth = static_cast<size_t>(input.head_size);
  const int64_t groups = (input.queries + kTileRows - 1) / kTileRows;
  const auto rows_padded = static_cast<size_t>(groups * kTileRows);
  if (memory->lists.size() < rows_padded) memory->lists.resize(rows_padded);
  for (size_t row = 0; row < rows_padded; ++row) ResetList(&memory->lists[row]);
  HWY_ALIGN T scores[kTileRows * kWidth];
  HWY_ALIGN T bounds[kGroupsPerPanel * kTileRows];  // Of the lists, side by side for the tile.
  std::fill_n(bounds, kGroupsPerPanel * kTileRows, -Infinity<T>());
  const BlockRange panel =
      VisibleBlocks(input, input.first_query, input.first_query + input.queries - 1);
  for (int64_t block = panel.end - 1; block >= panel.first; --block) {
    const T* keys = input.head.keys + block * static_cast<int64_t>(kWidth * depth);
    const auto first_key = block * static_cast<int64_t>(kWidth);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first_row = input.first_query + group * kTileRows;
      const int64_t rows = std::min<int64_t>(kTileRows, input.queries - group * kTileRows);
      const int64_t last_row = first_row + rows - 1;
      if (first_key >= input.mask.End(last_row) ||
          first_key + static_cast<int64_t>(kWidth) <= input.mask.First(first_row)) {
        continue;
      }
      CandidateList<T>* lists = memory->lists.data() + group * kTileRows;
      Tile<T> tile;
      tile.Zero();
      tile.MultiplyAdd(input.query + group * kTileRows * input.head_size, depth, keys, kWidth,
                       depth);
      uint32_t hits = 0;
      if (NeedsModification(input, first_row, last_row, first_key)) {
        tile.Store(scores, kWidth);
        for (int64_t r = 0; r < rows; ++r)
          ModifyScores(input, first_row + r, first_key, scores + r * kWidth);
        hits = (uint32_t{1} << rows) - 1;
      } else {
        hits = tile.RowsAbove(bounds + group * kTileRows) & ((uint32_t{1} << rows) - 1);
        if (hits != 0) tile.Store(scores, kWidth);
      }
      for (; hits != 0; hits &= hits - 1) {
        const int r = static_cast<int>(hwy::Num0BitsBelowLS1Bit_Nonzero32(hits));
        AppendHits<kKind>(scores + static_cast<size_t>(r) * kWidth, static_cast<int32_t>(first_key),
                          input.curve, &lists[r]);
        bounds[group * kTileRows + r] = lists[r].bound;
      }
    }
  }
  for (int64_t row = 0; row < input.queries; ++row) {
    FinishRow<kKind>(input, row, want_support, &memory->lists[static_cast<size_t>(row)], memory);
  }
}

template <typename T>
void RunPanelImpl(const PanelInput<T>& input, bool want_support, PanelMemory<T>* memory) {
  const int64_t rows = (input.queries + kTileRows - 1) / kTileRows * kTileRows;
  memory->output.resize(static_cast<size_t>(rows * input.head.value_width));
  memory->threshold.resize(static_cast<size_t>(rows));
  memory->support_size.clear();
  memory->support_key.clear();
  memory->support_probability.clear();
  switch (input.curve.kind) {
    case CurveKind::kSoftmax:
      // The support of softmax is every key, so reporting it needs the lists.
      if (!want_support) return SoftmaxPanel(input, memory);
      return CandidatePanel<CurveKind::kSoftmax>(input, want_support, memory);
    case CurveKind::kSquare:
      return CandidatePanel<CurveKind::kSquare>(input, want_support, memory);
    case CurveKind::kSparsemax:
      return CandidatePanel<CurveKind::kSparsemax>(input, want_support, memory);
    case CurveKind::kGeneral:
      return CandidatePanel<CurveKind::kGeneral>(input, want_support, memory);
  }
}

template <typename T>
PanelShape PanelShapeImpl() {
  return {kTileRows, static_cast<int>(TileWidth<T>()), static_cast<int>(TileWidth<T>())};
}

// Highway's tables hold plain functions.
void RunPanelFloat(const PanelInput<float>& input, bool want_support, PanelMemory<float>* memory) {
  RunPanelImpl(input, want_support, memory);
}
void RunPanelDouble(const PanelInput<double>& input, bool want_support,
                    PanelMemory<double>* memory) {
  RunPanelImpl(input, want_support, memory);
}
PanelShape PanelShapeFloat() { return PanelShapeImpl<float>(); }
PanelShape PanelShapeDouble() { return PanelShapeImpl<double>(); }

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_entmax::cpu {

HWY_EXPORT(RunPanelFloat);
HWY_EXPORT(RunPanelDouble);
HWY_EXPORT(PanelShapeFloat);
HWY_EXPORT(PanelShapeDouble);

template <>
PanelShape GetPanelShape<float>() {
  return HWY_DYNAMIC_DISPATCH(PanelShapeFloat)();
}
template <>
PanelShape GetPanelShape<double>() {
  return HWY_DYNAMIC_DISPATCH(PanelShapeDouble)();
}
template <>
void RunPanel<float>(const PanelInput<float>& input, bool want_support,
                     PanelMemory<float>* memory) {
  HWY_DYNAMIC_DISPATCH(RunPanelFloat)(input, want_support, memory);
}
template <>
void RunPanel<double>(const PanelInput<double>& input, bool want_support,
                      PanelMemory<double>* memory) {
  HWY_DYNAMIC_DISPATCH(RunPanelDouble)(input, want_support, memory);
}

}  // namespace flash_entmax::cpu
#endif  // HWY_ONCE
