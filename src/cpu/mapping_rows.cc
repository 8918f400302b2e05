#include "cpu/mapping_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/mapping_rows.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h, which includes this file once for every instruction set.
#include "cpu/compress-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/threshold-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

// Groups whose maxima bound the threshold: four vectors of running maxima.
constexpr size_t kMaximaVectors = 4;

template <typename T>
struct RowMaxima {
  T max;
  bool has_nan;
  size_t groups;  // Entries of `group` that may be above −∞, a multiple of the vector length.
  HWY_ALIGN T group[kMaximaVectors * HWY_MAX_BYTES / sizeof(T)];
};

template <typename T>
void FindMaxima(const T* HWY_RESTRICT scores, size_t n, RowMaxima<T>* result) {
  const hn::ScalableTag<T> d;
  const size_t lanes = hn::Lanes(d);
  const auto lowest = hn::Set(d, -std::numeric_limits<T>::infinity());
  auto m0 = lowest;
  auto m1 = lowest;
  auto m2 = lowest;
  auto m3 = lowest;
  auto ordered = hn::FirstN(d, lanes);
  size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    const auto a = hn::LoadU(d, scores + i);
    const auto b = hn::LoadU(d, scores + i + lanes);
    const auto c = hn::LoadU(d, scores + i + 2 * lanes);
    const auto e = hn::LoadU(d, scores + i + 3 * lanes);
    // Not Ne(x, x), which is false for NaN on some machines.
    const auto ab = hn::And(hn::Eq(a, a), hn::Eq(b, b));
    ordered = hn::And(ordered, hn::And(ab, hn::And(hn::Eq(c, c), hn::Eq(e, e))));
    m0 = hn::Max(m0, a);
    m1 = hn::Max(m1, b);
    m2 = hn::Max(m2, c);
    m3 = hn::Max(m3, e);
  }
  ForEachVector(d, scores + i, n - i, [&](auto v, size_t, size_t) HWY_ATTR {
    ordered = hn::And(ordered, hn::Eq(v, v));
    // Rotating keeps the groups disjoint and about equal.
    const auto rotated = hn::Max(m0, v);
    m0 = m1;
    m1 = m2;
    m2 = m3;
    m3 = rotated;
  });
  hn::Store(m0, d, result->group);
  hn::Store(m1, d, result->group + lanes);
  hn::Store(m2, d, result->group + 2 * lanes);
  hn::Store(m3, d, result->group + 3 * lanes);
  result->groups = 4 * lanes;
  result->max = hn::GetLane(hn::MaxOfLanes(d, hn::Max(hn::Max(m0, m1), hn::Max(m2, m3))));
  result->has_nan = !hn::AllTrue(d, ordered);
}

// The scratch's list, with the room that CompressAbove() needs for a row of n.
template <typename T>
std::vector<T>& ListFor(size_t n, RowScratch<T>* scratch) {
  const size_t room = n + 3 * size_t{HWY_MAX_BYTES} / sizeof(T);
  if (scratch->candidates.size() < room) scratch->candidates.resize(room);
  return scratch->candidates;
}

// Copies the scores above `bound` to `out`, in order, followed by two vectors of −∞; returns how
// many. `out` has room for n and three vectors.
template <typename T>
size_t CompressAbove(const T* HWY_RESTRICT scores, size_t n, T bound, T* HWY_RESTRICT out) {
  const hn::ScalableTag<T> d;
  const auto limit = hn::Set(d, bound);
  size_t count = 0;
  ForEachVector(d, scores, n, [&](auto v, size_t, size_t) HWY_ATTR {
    const auto above = hn::Gt(v, limit);
    hn::StoreU(CompressLanes(d, v, above), d, out + count);
    count += hn::CountTrue(d, above);
  });
  const auto lowest = hn::Set(d, -std::numeric_limits<T>::infinity());
  hn::StoreU(lowest, d, out + count);
  hn::StoreU(lowest, d, out + count + hn::Lanes(d));
  return count;
}

// Writes p of every score. Returns how many are positive.
template <CurveKind kKind, typename T>
int64_t WriteLevel(const T* scores, size_t n, const Level& level, double max, T* out) {
  const hn::ScalableTag<T> d;
  const auto set = [d](double x) HWY_ATTR { return hn::Set(d, static_cast<T>(x)); };
  const auto vmax = set(max);
  const auto slope = set(level.slope);
  const auto shift = set(level.shift);
  // 1 − shift is small where the support is large: rounded once here, not twice below.
  const auto top = set(1.0 - level.shift);
  const auto factor = set(level.factor);
  const auto zero = hn::Zero(d);
  int64_t support = 0;
  ForEachVector(d, scores, n, [&](auto v, size_t i, size_t count) HWY_ATTR {
    const auto distance = hn::Sub(vmax, v);
    hn::Vec<decltype(d)> p;
    if constexpr (kKind == CurveKind::kSquare) {
      const auto t = hn::Max(hn::NegMulAdd(distance, slope, top), zero);
      p = hn::Mul(t, t);
    } else if constexpr (kKind == CurveKind::kSparsemax) {
      p = hn::Max(hn::NegMulAdd(distance, slope, top), zero);
    } else {
      const auto y = hn::MulAdd(distance, slope, shift);
      p = zero;
      if (!hn::AllFalse(d, hn::Lt(y, set(1.0)))) {
        hn::Vec<decltype(d)> u;
        EvaluateCurve<kKind>(d, y, level.exponent, &p, &u);
        p = hn::Mul(p, factor);
      }
    }
    support += static_cast<int64_t>(hn::CountTrue(d, hn::Gt(p, zero)));
    if (count == hn::Lanes(d)) {
      hn::StoreU(p, d, out + i);
    } else {
      StoreTail(d, p, out + i, count);
    }
  });
  return support;
}

// The same for exponents below 1, where p next to the threshold is so steep that float would show:
// computed in double.
template <typename T>
int64_t WriteSteepLevels(const T* scores, size_t n, const Level& first, const Level& second,
                         double max, T* out) {
  const auto evaluate = [](const Level& level, double distance) {
    const double t = 1.0 - (level.shift + level.slope * distance);
    return t > 0.0 && level.factor > 0.0 ? level.factor * std::pow(t, level.exponent) : 0.0;
  };
  int64_t support = 0;
  for (size_t i = 0; i < n; ++i) {
    const double distance = max - static_cast<double>(scores[i]);
    out[i] = static_cast<T>(evaluate(first, distance) + evaluate(second, distance));
    support += out[i] > T{0};
  }
  return support;
}

// Softmax, with the exponentials kept in the output between the two passes.
template <typename T>
RowResult Softmax(const T* scores, size_t n, T max, T* out) {
  const hn::ScalableTag<T> d;
  const auto vmax = hn::Set(d, max);
  const auto zero = hn::Zero(d);
  auto sum = zero;
  double total = 0.0;
  size_t since_flush = 0;
  const auto flush = [&]() HWY_ATTR {
    HWY_ALIGN T parts[HWY_MAX_BYTES / sizeof(T)];
    hn::Store(sum, d, parts);
    for (size_t i = 0; i < hn::Lanes(d); ++i) total += static_cast<double>(parts[i]);
    sum = zero;
    since_flush = 0;
  };
  ForEachVector(d, scores, n, [&](auto v, size_t i, size_t count) HWY_ATTR {
    const auto e = hn::Exp(d, hn::Sub(v, vmax));
    sum = hn::Add(sum, e);
    if (++since_flush == 64) flush();  // Bounds the rounding of long sums.
    if (count == hn::Lanes(d)) {
      hn::StoreU(e, d, out + i);
    } else {
      StoreTail(d, e, out + i, count);
    }
  });
  flush();
  const auto scale = hn::Set(d, static_cast<T>(1.0 / total));
  int64_t support = 0;
  ForEachVector(d, out, n, [&](auto e, size_t i, size_t count) HWY_ATTR {
    const auto p = hn::Mul(e, scale);
    support += static_cast<int64_t>(hn::CountTrue(d, hn::Gt(p, zero)));
    if (count == hn::Lanes(d)) {
      hn::StoreU(p, d, out + i);
    } else {
      StoreTail(d, p, out + i, count);
    }
  });
  return {static_cast<double>(max) + std::log(total), support};
}

// Entmax with α ≠ 1, and normmax. With kNormmax `kKind` is the curve of the threshold.
template <CurveKind kKind, typename T>
RowResult SolveRow(const T* scores, size_t n, const RowMaxima<T>& maxima, const RowMapping& mapping,
                   const Curve& curve, T* out, RowScratch<T>* scratch) {
  const double max = static_cast<double>(maxima.max);
  double lower = 0.0;
  T bound = -std::numeric_limits<T>::infinity();
  if (curve.m > 0.0) {
    if (curve.m <= 1.0) {
      // A lower bound of the threshold of the group maxima is one of the row's.
      lower = RaiseLowerBound<kKind>(maxima.group, maxima.groups, curve, max, 0.0, 2);
    }
    // Rounded down, so that no key of the support is lost to the rounding of this comparison.
    const double reach = curve.Reach(lower);
    const double slack =
        (std::abs(max) + reach) * 2.0 * static_cast<double>(std::numeric_limits<T>::epsilon());
    bound = static_cast<T>(max - reach - slack);
  }
  std::vector<T>& list = ListFor(n, scratch);
  const size_t count = CompressAbove(scores, n, bound, list.data());
  const Solution solution = SolveCurve<kKind>(list.data(), count, curve, max, lower);
  Level level = solution.level;
  RowResult result{solution.threshold, 0};
  if (mapping.kind == MappingKind::kNormmax) {
    level.exponent = 1.0 / (mapping.alpha - 1.0);
    level.factor = 1.0 / SumCurve<CurveKind::kGeneral, double>(list.data(), count, level, max).p;
  }
  if (level.exponent > 0.0 && level.exponent < 1.0) {
    result.support_size = WriteSteepLevels(scores, n, level, solution.second, max, out);
  } else if (mapping.kind == MappingKind::kNormmax) {
    result.support_size = WriteLevel<CurveKind::kGeneral>(scores, n, level, max, out);
  } else {
    result.support_size = WriteLevel<kKind>(scores, n, level, max, out);
  }
  return result;
}

// Σ clamp(level − δ, 0, 1) over the list, δ = max − s, and the number of entries strictly between.
template <typename T>
void SumClamped(const T* list, size_t n, double max, double level, double* sum, double* active) {
  const DoubleTag d;
  const auto zero = hn::Zero(d);
  const auto one = hn::Set(d, 1.0);
  auto total = zero;
  auto count = zero;
  for (size_t i = 0; i < n; i += hn::Lanes(d)) {
    const auto distance = hn::Sub(hn::Set(d, max), LoadScores(d, list + i));
    const auto x = hn::Sub(hn::Set(d, level), distance);
    total = hn::Add(total, hn::Min(hn::Max(x, zero), one));
    count = hn::Add(count, hn::IfThenElseZero(hn::And(hn::Gt(x, zero), hn::Lt(x, one)), one));
  }
  *sum = hn::GetLane(hn::SumOfLanes(d, total));
  *active = hn::GetLane(hn::SumOfLanes(d, count));
}

// Probabilities clamp(s − τ, 0, 1) that sum to the budget, solved for level = max − τ, so that
// large scores cost no digits. The sum rises in the level and is piecewise linear: Newton's step
// inside a bracket ends on the piece that holds the answer.
template <typename T>
RowResult SolveBudget(const T* scores, size_t n, T row_max, double budget, T* out,
                      RowScratch<T>* scratch) {
  std::vector<T>& list = ListFor(n, scratch);
  const size_t count = CompressAbove(scores, n, -std::numeric_limits<T>::infinity(), list.data());
  const double max = static_cast<double>(row_max);
  double level = std::numeric_limits<double>::infinity();
  if (static_cast<double>(count) > budget) {  // Otherwise everything that may be chosen is.
    const double lowest = static_cast<double>(*std::min_element(list.data(), list.data() + count));
    double low = 0.0;  // Sums to 0.
    // Sums to count > budget.
    double high = std::min((max - lowest) + 1.0, std::numeric_limits<double>::max());
    level = std::min(1.0, budget / static_cast<double>(count));
    // Enough for bisection alone to reach neighbouring numbers, from the largest range there is.
    for (int step = 0; step < 2200; ++step) {
      double sum = 0.0;
      double active = 0.0;
      SumClamped(list.data(), count, max, level, &sum, &active);
      if (sum == budget) break;  // Also on a flat piece, where every level is right.
      (sum < budget ? low : high) = level;
      double next = level + (budget - sum) / active;  // Infinite or NaN on a flat piece.
      if (!(next >= low && next <= high) || step % 8 == 7) next = 0.5 * low + 0.5 * high;
      const double change = std::abs(next - level);
      level = next;
      if (change <= 2.5e-16 * level) break;
    }
  }
  RowResult result{max - level, 0};
  for (size_t i = 0; i < n; ++i) {
    const double s = static_cast<double>(scores[i]);
    const bool masked = s == -std::numeric_limits<double>::infinity();
    out[i] = masked ? T{0} : static_cast<T>(std::min(std::max(level - (max - s), 0.0), 1.0));
    result.support_size += out[i] > T{0};
  }
  return result;
}

template <typename T>
void MapRowImpl(const T* scores, int64_t length, const RowMapping& mapping, T* out,
                RowScratch<T>* scratch, RowResult* result) {
  const size_t n = static_cast<size_t>(length);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  RowMaxima<T> maxima;
  FindMaxima(scores, n, &maxima);
  if (maxima.has_nan || maxima.max == std::numeric_limits<T>::infinity()) {
    std::fill_n(out, n, std::numeric_limits<T>::quiet_NaN());
    *result = {nan, 0};
    return;
  }
  if (maxima.max == -std::numeric_limits<T>::infinity()) {  // Nothing to choose from.
    std::fill_n(out, n, T{0});
    *result = {nan, 0};
    return;
  }
  if (mapping.kind == MappingKind::kBudget) {
    *result = SolveBudget(scores, n, maxima.max, mapping.budget, out, scratch);
    return;
  }
  const Curve curve = mapping.kind == MappingKind::kNormmax ? Curve::NormmaxThreshold(mapping.alpha)
                                                            : Curve::Entmax(mapping.alpha);
  switch (curve.kind) {
    case CurveKind::kSoftmax:
      *result = Softmax(scores, n, maxima.max, out);
      break;
    case CurveKind::kSquare:
      *result = SolveRow<CurveKind::kSquare>(scores, n, maxima, mapping, curve, out, scratch);
      break;
    case CurveKind::kSparsemax:
      *result = SolveRow<CurveKind::kSparsemax>(scores, n, maxima, mapping, curve, out, scratch);
      break;
    case CurveKind::kGeneral:
      *result = SolveRow<CurveKind::kGeneral>(scores, n, maxima, mapping, curve, out, scratch);
      break;
  }
}

// Highway's tables hold plain functions.
void MapRowFloat(const float* s, int64_t n, const RowMapping& mapping, float* p,
                 RowScratch<float>* scratch, RowResult* result) {
  MapRowImpl(s, n, mapping, p, scratch, result);
}
void MapRowDouble(const double* s, int64_t n, const RowMapping& mapping, double* p,
                  RowScratch<double>* scratch, RowResult* result) {
  MapRowImpl(s, n, mapping, p, scratch, result);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_entmax::cpu {

HWY_EXPORT(MapRowFloat);
HWY_EXPORT(MapRowDouble);

template <>
RowResult MapRow<float>(const float* scores, int64_t n, const RowMapping& mapping, float* p,
                        RowScratch<float>* scratch) {
  RowResult result;
  HWY_DYNAMIC_DISPATCH(MapRowFloat)(scores, n, mapping, p, scratch, &result);
  return result;
}

template <>
RowResult MapRow<double>(const double* scores, int64_t n, const RowMapping& mapping, double* p,
                         RowScratch<double>* scratch) {
  RowResult result;
  HWY_DYNAMIC_DISPATCH(MapRowDouble)(scores, n, mapping, p, scratch, &result);
  return result;
}

}  // namespace flash_entmax::cpu
#endif  // HWY_ONCE
