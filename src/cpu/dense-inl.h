// The dense path: rows of which so many keys are positive that lists cost more than products.
//
// A few groups of rows keep all their scores (DenseGroupsTogether() of them), solve each row's
// threshold on them, write the probabilities over the scores, and multiply them with the values
// through the register tile. Keys and values are read once for all of them.

#if defined(FLASH_ENTMAX_SRC_CPU_DENSE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_ENTMAX_SRC_CPU_DENSE_INL_H_
#undef FLASH_ENTMAX_SRC_CPU_DENSE_INL_H_
#else
#define FLASH_ENTMAX_SRC_CPU_DENSE_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "cpu/attention_panel.h"
#include "cpu/cache_size.h"
#include "cpu/finish-inl.h"
#include "cpu/opening-inl.h"
#include "cpu/scores-inl.h"
#include "cpu/search-inl.h"
#include "cpu/threshold-inl.h"
#include "cpu/tile-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Keys whose values stay in the first-level cache while the tiles pass over them.
constexpr int64_t kDenseValueStep = 128;
// Whether the row has a threshold; if so its maximum.
template <typename T>
bool FiniteMaximum(const T* HWY_RESTRICT scores, size_t n, T* maximum, bool* not_a_number) {
  const hn::ScalableTag<T> d;
  const auto infinity = hn::Set(d, Infinity<T>());
  auto max = hn::Set(d, -Infinity<T>());
  auto finite = hn::FirstN(d, hn::Lanes(d));
  for (size_t i = 0; i < n; i += hn::Lanes(d)) {
    const auto s = hn::LoadU(d, scores + i);
    finite = hn::And(finite, hn::Lt(s, infinity));
    max = hn::Max(max, s);
  }
  *not_a_number = !hn::AllTrue(d, finite);
  *maximum = hn::GetLane(hn::MaxOfLanes(d, max));
  return !*not_a_number && *maximum > -Infinity<T>();
}

// n is a multiple of a vector.
template <typename T>
bool AllFinite(const T* HWY_RESTRICT x, size_t n) {
  const hn::ScalableTag<T> d;
  const auto infinity = hn::Set(d, Infinity<T>());
  auto finite = hn::FirstN(d, hn::Lanes(d));
  for (size_t i = 0; i < n; i += hn::Lanes(d)) {
    finite = hn::And(finite, hn::Lt(hn::Abs(hn::LoadU(d, x + i)), infinity));
  }
  return hn::AllTrue(d, finite);
}

// Probabilities over the scores, in place; returns how many are positive. If `weights` is not null,
// u goes there and its sum to *sum_u; for levels whose factor is 1.
template <CurveKind kKind, typename T>
int64_t DenseProbabilities(const Solution& solution, double max, size_t n, T* HWY_RESTRICT scores,
                           T* HWY_RESTRICT weights, double* sum_u) {
  const hn::ScalableTag<T> d;
  int64_t count = 0;
  const auto at = VectorLevel<kKind, hn::ScalableTag<T>>::Of(d, solution.level, T{});
  if (at.from_base() && solution.level.factor == 1.0) {
    // t is as good as the scores are, and p has the error of a power in T.
    const auto vmax = hn::Set(d, static_cast<T>(max));
    constexpr size_t kChunk = 1024;  // As in SumPowers().
    for (size_t first = 0; first < n; first += kChunk) {
      const size_t end = std::min(n, first + kChunk);
      auto sum = hn::Zero(d);
      for (size_t i = first; i < end; i += hn::Lanes(d)) {
        hn::Vec<decltype(d)> p;
        hn::Vec<decltype(d)> u;
        at.template Evaluate<true>(d, hn::Sub(vmax, hn::LoadU(d, scores + i)), &p, &u);
        hn::StoreU(p, d, scores + i);
        count += static_cast<int64_t>(hn::CountTrue(d, hn::Gt(p, hn::Zero(d))));
        if (weights == nullptr) continue;
        hn::StoreU(u, d, weights + i);
        sum = hn::Add(sum, u);
      }
      *sum_u += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, sum)));
    }
    return count;
  }
  const DoubleTag dd;
  auto sum = hn::Zero(dd);
  for (size_t i = 0; i < n; i += hn::Lanes(dd)) {
    const auto distance = hn::Sub(hn::Set(dd, max), LoadScores(dd, scores + i));
    hn::Vec<DoubleTag> u;
    auto p = EvaluateLevel<kKind, T>(dd, distance, solution.level, &u);
    if (solution.second.factor > 0.0) {
      hn::Vec<DoubleTag> unused;
      p = hn::Add(p, EvaluateLevel<kKind, T>(dd, distance, solution.second, &unused));
    }
    const auto value = ToScores<T>(p);
    const hn::Rebind<T, DoubleTag> dt;
    hn::StoreU(value, dt, scores + i);
    count += static_cast<int64_t>(hn::CountTrue(dt, hn::Gt(value, hn::Zero(dt))));
    if (weights == nullptr) continue;
    hn::StoreU(ToScores<T>(u), dt, weights + i);
    sum = hn::Add(sum, u);
  }
  *sum_u = hn::GetLane(hn::SumOfLanes(dd, sum));
  return count;
}

template <typename T>
void AppendDenseSupport(const T* probability, size_t n, int64_t first_key, PanelMemory<T>* memory) {
  const size_t before = memory->support_key.size();
  for (size_t j = 0; j < n; ++j) {
    if (!(probability[j] > T{0})) continue;
    memory->support_key.push_back(static_cast<int32_t>(first_key) + static_cast<int32_t>(j));
    memory->support_probability.push_back(ReportedProbability(probability[j]));
  }
  memory->support_size.push_back(static_cast<int64_t>(memory->support_key.size() - before));
}

// output (groups · kTileRows × value_width) = probability (as many rows, `stride` apart) · values
// of [first_key, first_key + keys).
template <typename T>
void MultiplyDense(const T* probability, size_t stride, size_t groups, int64_t keys,
                   const PackedHead<T>& head, int64_t first_key, T* output) {
  const auto width = static_cast<size_t>(head.value_width);
  const auto value_stride = static_cast<size_t>(head.value_stride);
  std::fill_n(output, groups * kTileRows * width, T{0});
  for (int64_t first = 0; first < keys; first += kDenseValueStep) {
    const auto step = static_cast<size_t>(std::min(kDenseValueStep, keys - first));
    const T* values = head.values + (first_key + first) * head.value_stride;
    for (size_t g = 0; g < groups; ++g) {
      const T* left = probability + g * kTileRows * stride + first;
      T* out = output + g * kTileRows * width;
      size_t e = 0;
      for (; e + TileWidth<T>() <= width; e += TileWidth<T>()) {
        Tile<T> tile;
        tile.Load(out + e, width);
        tile.MultiplyAdd(left, stride, values + e, value_stride, step);
        tile.Store(out + e, width);
      }
      // At most one vector, since rows are whole vectors.
      const hn::ScalableTag<T> d;
      for (; e < width; e += hn::Lanes(d)) {
        for (size_t r = 0; r < kTileRows; ++r) {
          auto sum = hn::LoadU(d, out + r * width + e);
          for (size_t j = 0; j < step; ++j) {
            sum = hn::MulAdd(hn::Set(d, left[r * stride + j]),
                             hn::LoadU(d, values + j * value_stride + e), sum);
          }
          hn::StoreU(sum, d, out + r * width + e);
        }
      }
    }
  }
}

// One row of the product again, without the values whose probability is zero: 0·NaN is no part of
// the result.
template <typename T>
void MultiplyCarefully(const T* probability, int64_t keys, const PackedHead<T>& head,
                       int64_t first_key, T* output) {
  std::fill_n(output, head.value_width, T{0});
  for (int64_t j = 0; j < keys; ++j) {
    if (probability[j] == T{0}) continue;
    const T* value = head.values + (first_key + j) * head.value_stride;
    for (int64_t e = 0; e < head.value_width; ++e) output[e] += probability[j] * value[e];
  }
}

// Thresholds and outputs of `rows` rows from the first of `group` on, whose scores of the keys of
// `range` lie in memory->scores. Their lists, where they have begun, give lower bounds. *lambda is
// λ = max + c of the dense row before these, −∞ if there is none; then of the last of these.
template <CurveKind kKind, typename T>
void FinishDense(const PanelInput<T>& input, const GroupSearch<T>& group, int64_t rows,
                 const BlockRange& range, bool want_support, double* lambda,
                 PanelMemory<T>* memory) {
  const auto groups = static_cast<size_t>((rows + kTileRows - 1) / kTileRows);
  const auto padded = static_cast<int64_t>(groups) * kTileRows;
  constexpr auto kWidth = static_cast<int64_t>(TileWidth<T>());
  const int64_t width = input.head.value_width;
  const int64_t panel_row = group.first_row - input.first_query;
  const int64_t first_key = range.first * kWidth;
  const auto n = static_cast<size_t>((range.end - range.first) * kWidth);
  const size_t stride = ScoreStride<T>(range);
  T* scores = memory->scores.data();
  bool nan_row[kGroupsPerPanel * kTileRows] = {};
  // α > 2 has no bound on u.
  const bool keep_means =
      memory->saved != nullptr && kKind != CurveKind::kSoftmax && input.curve.m <= 1.0;
  if (keep_means && memory->weights.size() < groups * kTileRows * stride) {
    memory->weights.resize(groups * kTileRows * stride);
  }
  double sum_u[kGroupsPerPanel * kTileRows] = {};
  const size_t room = n + 2 * hn::MaxLanes(hn::ScalableTag<T>());
  if (memory->candidates.size() < room) memory->candidates.resize(room);
  for (int64_t r = 0; r < rows; ++r) {
    T* row = scores + static_cast<size_t>(r) * stride;
    T* weights = keep_means ? memory->weights.data() + static_cast<size_t>(r) * stride : nullptr;
    const int64_t out_row = panel_row + r;
    T max = T{0};
    if (!FiniteMaximum(row, n, &max, &nan_row[r])) {
      std::fill_n(row, n, T{0});
      if (keep_means) std::fill_n(weights, n, T{0});
      FinishWithoutThreshold(nan_row[r], out_row, want_support, width, memory);
      continue;
    }
    const auto top = static_cast<double>(max);
    const Curve& curve = input.curve;
    // λ = max + c, whatever the maximum was then; rounding of this sum is allowed for.
    const CandidateList<T>& list = group.lists[r];
    double lower = static_cast<double>(list.max) + list.offset - top;
    lower -= 1e-6 * (1.0 + std::abs(lower)) + 1e-15 * std::abs(top);
    lower = lower > 0.0 ? lower : 0.0;
    const Solution solution =
        SolveMany<kKind>(row, n, curve, top, lower, *lambda - top, memory->candidates.data());
    // The guess for the next row: rows of many weights have nearly the same.
    if (curve.m <= 1.0) *lambda = top + solution.level.shift / curve.m;
    memory->threshold[static_cast<size_t>(out_row)] = solution.threshold;
    const int64_t count = DenseProbabilities<kKind>(solution, top, n, row, weights, &sum_u[r]);
    memory->mean_entries += count;
    if (want_support) AppendDenseSupport(row, n, first_key, memory);
    if (memory->saved != nullptr) {
      memory->saved->Add(top, LevelNumber(curve, solution.level), nullptr, nullptr, count);
    }
  }
  for (int64_t r = rows; r < padded; ++r) {
    std::fill_n(scores + static_cast<size_t>(r) * stride, n, T{0});
    if (keep_means) {
      std::fill_n(memory->weights.data() + static_cast<size_t>(r) * stride, n, T{0});
    }
  }
  T* output = memory->output.data() + panel_row * width;
  const int64_t keys =
      std::min(input.mask.key_length - first_key, (range.end - range.first) * kWidth);
  MultiplyDense(scores, stride, groups, keys, input.head, first_key, output);
  if (keep_means) {
    T* means = memory->means.data() + panel_row * width;
    MultiplyDense(memory->weights.data(), stride, groups, keys, input.head, first_key, means);
    for (int64_t r = 0; r < rows; ++r) {
      const T factor = static_cast<T>(sum_u[r] > 0.0 ? 1.0 / sum_u[r] : 0.0);
      for (int64_t e = 0; e < width; ++e) means[r * width + e] *= factor;
    }
    // Sums of huge values may have left the range of T: then none is kept.
    if (AllFinite(means, static_cast<size_t>(rows * width))) memory->mean_rows += rows;
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* out = output + r * width;
    if (std::isnan(memory->threshold[static_cast<size_t>(panel_row + r)])) {
      std::fill_n(out, width, nan_row[r] ? std::numeric_limits<T>::quiet_NaN() : T{0});
    } else if (!AllFinite(out, static_cast<size_t>(width))) {
      MultiplyCarefully(scores + static_cast<size_t>(r) * stride, keys, input.head, first_key, out);
    }
  }
}

// Whole groups from scratch: those of groups[0, count) that go together. Returns how many. Their
// scores begin at the first key of the whole panel: sums are cut at the same keys, so have the same
// bits, however many groups go together.
template <CurveKind kKind, typename T>
int64_t DenseGroups(const PanelInput<T>& input, const GroupSearch<T>* groups, int64_t count,
                    bool want_support, double* lambda, PanelMemory<T>* memory) {
  const int64_t first_row = groups[0].first_row;
  const auto range_of = [&](int64_t rows) {
    return VisibleBlocks<T>(input, input.first_query, first_row + rows - 1);
  };
  int64_t taken = 1;
  int64_t rows = groups[0].rows;
  for (; taken < count && groups[taken].dense; ++taken) {
    const int64_t more = rows + groups[taken].rows;
    const BlockRange range = range_of(more);
    const int64_t keys = (range.end - range.first) * static_cast<int64_t>(TileWidth<T>());
    if (taken + 1 > DenseGroupsTogether(kTileRows * keys * static_cast<int64_t>(sizeof(T)))) break;
    rows = more;
  }
  const BlockRange range = range_of(rows);
  ScoreBlocks(input, first_row, rows, range, memory);
  FinishDense<kKind>(input, groups[0], rows, range, want_support, lambda, memory);
  return taken;
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#endif  // FLASH_ENTMAX_SRC_CPU_DENSE_INL_H_
