// The threshold of a set of scores, vectorised: the heart of the mapping and of attention.
//
// Scores enter as distances δ_i = max − s_i ≥ 0 and the unknown is the offset c = λ − max ≥ 0, so
// that p_i = [1 − (m·c + slope·δ_i)]₊^(1/m) with m = α − 1 (slope = m for entmax), or
// exp(−(c + δ_i)) at m = 0. In these units nothing overflows, c = 0 is the left end (the largest
// score alone already sums to 1 there), and α = 1 is an ordinary point.
//
// Newton's method runs on the α-norm of the row, (Σ p)^m = 1, instead of on Σ p = 1. With S = Σ p
// and U = Σ p^(2−α) the step is
//     Δc = (S/U)·(1 − S^(−m))/m        (ln S at m = 0).
// For m in (0, 1] the norm is convex in c and falls, for m < 0 it is concave and rises, so from the
// left every iterate stays on the left (fact F2: each is a valid lower bound), and for tied scores,
// a single score, or α = 1 the first step is the answer. For m > 1 neither holds, and the unknown
// is another: SolveForPeak().
//
// Sums are in double whatever the type of the scores, so the threshold of float scores is exact to
// double precision.

#if defined(FLASH_ENTMAX_SRC_CPU_THRESHOLD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_ENTMAX_SRC_CPU_THRESHOLD_INL_H_
#undef FLASH_ENTMAX_SRC_CPU_THRESHOLD_INL_H_
#else
#define FLASH_ENTMAX_SRC_CPU_THRESHOLD_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/compress-inl.h"
#include "cpu/curve.h"
#include "cpu/powers-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// What one pass over the scores sums, at one level (without its factor).
struct CurveSums {
  double p = 0.0;
  double u = 0.0;
  double count = 0.0;     // Entries with p > 0.
  double distance = 0.0;  // Σ δ over them; for the closed form of kSquare only.
  double distance_square = 0.0;
  double farthest = 0.0;  // Largest δ among them.
};

// Sums over scores[0, n), computed in Compute. Scores may be read up to the next multiple of two
// vectors of T; what lies behind n must be −∞. max is finite, and no score is above it.
template <CurveKind kKind, typename Compute, typename T>
CurveSums SumCurve(const T* HWY_RESTRICT scores, size_t n, const Level& level, double max) {
  const hn::ScalableTag<Compute> d;
  const auto set = [d](double x) HWY_ATTR { return hn::Set(d, static_cast<Compute>(x)); };
  const auto total = [d](auto v) HWY_ATTR {
    return static_cast<double>(hn::GetLane(hn::SumOfLanes(d, v)));
  };
  const auto vmax = set(max);
  const auto slope = set(level.slope);
  const auto shift = set(level.shift);
  const auto zero = hn::Zero(d);
  const auto one = set(1.0);
  auto sum_p = zero;
  auto sum_u = zero;
  auto count = zero;
  auto sum_distance = zero;
  auto sum_square = zero;
  auto farthest = zero;
  for (size_t i = 0; i < n; i += hn::Lanes(d)) {
    const auto distance = hn::Sub(vmax, LoadScores(d, scores + i));
    hn::Vec<decltype(d)> p;
    hn::Vec<decltype(d)> u;
    EvaluateCurve<kKind>(d, hn::MulAdd(distance, slope, shift), level.exponent, &p, &u);
    sum_p = hn::Add(sum_p, p);
    sum_u = hn::Add(sum_u, u);
    const auto positive = hn::Gt(p, zero);
    count = hn::Add(count, hn::IfThenElseZero(positive, one));
    if constexpr (kKind == CurveKind::kSquare) {
      const auto kept = hn::IfThenElseZero(positive, distance);
      sum_distance = hn::Add(sum_distance, kept);
      sum_square = hn::MulAdd(kept, kept, sum_square);
      farthest = hn::Max(farthest, kept);
    }
  }
  CurveSums sums;
  sums.p = total(sum_p);
  sums.u = total(sum_u);
  sums.count = total(count);
  if constexpr (kKind == CurveKind::kSquare) {
    sums.distance = total(sum_distance);
    sums.distance_square = total(sum_square);
    sums.farthest = static_cast<double>(hn::GetLane(hn::MaxOfLanes(d, farthest)));
  }
  return sums;
}

template <CurveKind kKind, bool kFromBase, typename Compute, typename T>
CurveSums SumPowersOf(const T* HWY_RESTRICT scores, size_t n, const Level& level, double max) {
  const hn::ScalableTag<Compute> d;
  using V = hn::Vec<decltype(d)>;
  const V vmax = hn::Set(d, static_cast<Compute>(max));
  const auto at = VectorLevel<kKind, hn::ScalableTag<Compute>>::Of(d, level, T{});
  const auto evaluate = [&](size_t i, V* p, V* u) HWY_ATTR {
    at.template Evaluate<kFromBase>(d, hn::Sub(vmax, LoadScores(d, scores + i)), p, u);
  };
  const size_t lanes = hn::Lanes(d);
  // Long sums in double, so that those of float lanes round no more than a few dozen times.
  constexpr size_t kChunk = 1024;
  CurveSums sums;
  for (size_t first = 0; first < n; first += kChunk) {
    const size_t end = std::min(n, first + kChunk);
    // Two of each, for the latency of additions.
    V sum_p0 = hn::Zero(d);
    V sum_p1 = sum_p0;
    V sum_u0 = sum_p0;
    V sum_u1 = sum_p0;
    for (size_t i = first; i < end; i += 2 * lanes) {
      V p;
      V u;
      evaluate(i, &p, &u);
      sum_p0 = hn::Add(sum_p0, p);
      sum_u0 = hn::Add(sum_u0, u);
      evaluate(i + lanes, &p, &u);
      sum_p1 = hn::Add(sum_p1, p);
      sum_u1 = hn::Add(sum_u1, u);
    }
    sums.p += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, hn::Add(sum_p0, sum_p1))));
    sums.u += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, hn::Add(sum_u0, sum_u1))));
  }
  return sums;
}

// Σ p and Σ u alone, as SumCurve(), computed in Compute.
template <CurveKind kKind, typename Compute, typename T>
CurveSums SumPowers(const T* scores, size_t n, const Level& level, double max) {
  if constexpr (kKind == CurveKind::kGeneral) {
    if (!PowerWay::Of<T>(level.exponent).from_base()) {
      return SumPowersOf<kKind, false, Compute>(scores, n, level, max);
    }
  }
  return SumPowersOf<kKind, true, Compute>(scores, n, level, max);
}

// Newton's step on the α-norm, from sums at some c.
template <CurveKind kKind>
double NewtonStep(const CurveSums& sums, double m) {
  const double ratio = sums.p / sums.u;
  if constexpr (kKind == CurveKind::kSoftmax) return std::log(sums.p);
  if constexpr (kKind == CurveKind::kSparsemax) return ratio * (1.0 - 1.0 / sums.p);
  if constexpr (kKind == CurveKind::kSquare) return ratio * 2.0 * (1.0 - 1.0 / std::sqrt(sums.p));
  return ratio * -std::expm1(-m * std::log(sums.p)) / m;
}

// For kSquare: the c at which Σ (T − slope·δ)² = 1 over the entries that were positive at the last
// c, with T = 1 − m·c. Those entries contain the support; if all of them are still positive at that
// c they are the support, and the c is the answer. Otherwise returns the last resort, `newton`.
inline double ClosedForm(const CurveSums& sums, const Curve& curve, double newton) {
  const double mean = sums.distance / sums.count;
  const double spread = sums.distance_square - sums.distance * mean;
  const double left = 1.0 - curve.slope * curve.slope * spread;
  const double top = curve.slope * mean + std::sqrt(left / sums.count);  // T; NaN if there is none.
  return top > curve.slope * sums.farthest ? (1.0 - top) / curve.m : newton;
}

// Whether logarithms and exponentials make a pass in float worth having for float scores.
template <CurveKind kKind, typename T>
constexpr bool kHasFloatPass = kKind == CurveKind::kGeneral&& std::is_same_v<T, float>;
// How far a solution in float may be off, relative to 1 + c; many times what was ever seen.
constexpr double kFloatPassError = 1e-4;

// How far rounding of sums in Compute may carry an exact answer too far, relative to 1 + c.
template <typename Compute>
constexpr double kRoundingOf = std::is_same_v<Compute, float> ? kFloatPassError : 1e-12;

// A lower bound of the c that solves the row, at or above `lower`, by a few Newton steps from the
// left, summed in Compute, less `error`. Curves with m ≤ 1 only; for others `lower` is returned.
// Scores are read up to the next multiple of two vectors, as SumCurve() says.
template <CurveKind kKind, typename Compute, typename T>
double RaiseLowerBoundIn(const T* scores, size_t n, const Curve& curve, double max, double lower,
                         int steps, double error = kRoundingOf<Compute>) {
  if (curve.m > 1.0) return lower;
  double c = lower;
  for (int step = 0; step < steps; ++step) {
    const double change =
        NewtonStep<kKind>(SumPowers<kKind, Compute>(scores, n, curve.LevelAt(c), max), curve.m);
    if (!(change > 0.0)) break;
    c += change;
    // Nearer than the error that is taken off below.
    if (std::is_same_v<Compute, float> && change < kFloatPassError) break;
  }
  return std::max(lower, c - error * (1.0 + c));
}

// The same in double, but for scores in float and curves whose powers are expensive.
template <CurveKind kKind, typename T>
double RaiseLowerBound(const T* scores, size_t n, const Curve& curve, double max, double lower,
                       int steps) {
  using Compute = std::conditional_t<kHasFloatPass<kKind, T>, float, double>;
  return RaiseLowerBoundIn<kKind, Compute>(scores, n, curve, max, lower, steps);
}

struct Solution {
  Level level;
  // p is the sum of this and `level`; its factor is 0 unless m > 1, see SolveForPeak().
  Level second = {0.0, 0.0, 1.0, 0.0};
  double threshold = 0.0;  // As Curve::Threshold().
};

// The step after which a solution is final.
constexpr double kLastStep = 1e-9;
// No row needs nearly as many passes; a bound all the same, against rounding that goes in circles.
constexpr int kMaxPasses = 200;

// Curves with m ≤ 1, from a lower bound of c.
template <CurveKind kKind, typename T>
Solution SolveFromLeft(const T* scores, size_t n, const Curve& curve, double max, double lower) {
  double c = lower;
  if (kHasFloatPass<kKind, T>) {
    c = RaiseLowerBound<kKind>(scores, n, curve, max, lower, /*steps=*/6);
  }
  for (int pass = 0; pass < kMaxPasses; ++pass) {
    const CurveSums sums = SumCurve<kKind, double>(scores, n, curve.LevelAt(c), max);
    double next = c + NewtonStep<kKind>(sums, curve.m);
    if constexpr (kKind == CurveKind::kSquare) next = ClosedForm(sums, curve, next);
    const double change = next - c;
    c = next;
    // Newton's method squares the error: after a step this small what is left is rounding. Every
    // true step goes up; one that does not, after the first (which may start a rounding error too
    // far right), is rounding too.
    if (std::abs(change) <= kLastStep * (1.0 + std::abs(c)) || (pass > 1 && change <= 0.0)) break;
  }
  Solution solution;
  solution.level = curve.LevelAt(c);
  solution.threshold = curve.Threshold(max, c);
  return solution;
}

// Curves with m > 1. The unknown is P, the probability of the largest score: with y = slope·δ·P^−m,
//     p = P·[1 − y]₊^(1/m)   and   dp/dP = [1 − y]₊^(1/m − 1).
// In c the same row would lose its digits: 1 − m·c = P^m is tiny when many scores share the lead.
// Newton's step inside the bracket 1/n ≤ P ≤ 1; bisection where it leaves it or crawls.
//
// Next to the threshold p is so steep that Σ p may jump over 1 between two neighbouring numbers P.
// The row is then the mixture of the two that sums to 1: what a P of more digits would give.
template <typename T>
Solution SolveForPeak(const T* scores, size_t n, const Curve& curve, double max) {
  const auto level_at = [&curve](double peak) {
    // A product with δ = 0 must stay 0.
    const double steepness = std::min(std::pow(peak, -curve.m), 1e280);
    return Level{0.0, curve.slope * steepness, curve.exponent, peak};
  };
  const auto excess_at = [&](double peak, double* derivative) {
    const CurveSums sums = SumCurve<CurveKind::kGeneral, double>(scores, n, level_at(peak), max);
    *derivative = sums.u;
    return peak * sums.p - 1.0;
  };
  constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
  double derivative = 0.0;
  double low = 1.0 / static_cast<double>(n);
  double low_excess = excess_at(low, &derivative);
  double high = 1.0;
  double high_excess = excess_at(high, &derivative);
  double peak = high;
  double excess = high_excess;
  for (int pass = 0; pass < kMaxPasses && std::abs(excess) > kEpsilon; ++pass) {
    const double middle = 0.5 * (low + high);
    if (!(middle > low && middle < high)) break;  // Neighbours.
    // Newton, but every other pass halves the bracket once that has not been enough.
    peak -= excess / derivative;
    if (!(peak > low && peak < high) || (pass > 8 && pass % 2 == 1)) peak = middle;
    excess = excess_at(peak, &derivative);
    (excess <= 0.0 ? low : high) = peak;
    (excess <= 0.0 ? low_excess : high_excess) = excess;
  }
  Solution solution;
  solution.threshold = max * curve.slope - std::pow(peak, curve.m);
  solution.level = level_at(peak);
  if (std::abs(excess) > kEpsilon && high_excess > 0.0 && low_excess < 0.0) {
    const double weight = -low_excess / (high_excess - low_excess);  // Of the upper end.
    solution.level = level_at(low);
    solution.level.factor *= 1.0 - weight;
    solution.second = level_at(high);
    solution.second.factor *= weight;
  }
  return solution;
}

// SolveCurve() by lean passes, for expensive powers: Newton's steps on sums in T while they are
// long, then in double (for scores in float with powers good to about 1e-11).
template <CurveKind kKind, typename T>
Solution SolveLean(const T* scores, size_t n, const Curve& curve, double max, double lower) {
  if ((kKind == CurveKind::kGeneral && curve.m > 1.0)) return SolveForPeak(scores, n, curve, max);
  constexpr int kRoughSteps = 12;
  // The sums in float leave an error near 1e-6; the step that removes it is the last one.
  constexpr double kLastLeanStep = std::is_same_v<T, float> ? 3e-6 : kLastStep;
  double c = RaiseLowerBoundIn<kKind, T>(scores, n, curve, max, lower, kRoughSteps, /*error=*/0.0);
  for (int pass = 0; pass < kMaxPasses; ++pass) {
    const double change =
        NewtonStep<kKind>(SumPowers<kKind, double>(scores, n, curve.LevelAt(c), max), curve.m);
    c += change;
    if (std::abs(change) <= kLastLeanStep * (1.0 + std::abs(c)) || (pass > 1 && change <= 0.0))
      break;
  }
  Solution solution;
  solution.level = curve.LevelAt(c);
  solution.threshold = curve.Threshold(max, c);
  return solution;
}

// Copies the scores above `bound` to `out`, followed by two vectors of −∞; returns how many. n is a
// multiple of a vector; `out` has room for n and two vectors.
template <typename T>
size_t CopyAbove(const T* HWY_RESTRICT scores, size_t n, T bound, T* HWY_RESTRICT out) {
  const hn::ScalableTag<T> d;
  const auto limit = hn::Set(d, bound);
  size_t count = 0;
  for (size_t i = 0; i < n; i += hn::Lanes(d)) {
    const auto s = hn::LoadU(d, scores + i);
    const auto above = hn::Gt(s, limit);
    hn::StoreU(CompressLanes(d, s, above), d, out + count);
    count += hn::CountTrue(d, above);
  }
  const auto lowest = hn::Set(d, -std::numeric_limits<T>::infinity());
  hn::StoreU(lowest, d, out + count);
  hn::StoreU(lowest, d, out + count + hn::Lanes(d));
  return count;
}

// SolveCurve() for so many scores that every pass counts: evaluated in T, so that Σ p is 1 to a few
// roundings of T. `guess` is where the answer may be, from a row like this one; −∞ for none. `room`
// is for n scores and two vectors.
template <CurveKind kKind, typename T>
Solution SolveMany(const T* scores, size_t n, const Curve& curve, double max, double lower,
                   double guess, T* room) {
  if ((kKind == CurveKind::kGeneral && curve.m > 1.0)) return SolveForPeak(scores, n, curve, max);
  constexpr double kEpsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  double c = std::max(lower, guess);
  double last_step = std::numeric_limits<double>::quiet_NaN();  // None.
  for (int pass = 0; pass < kMaxPasses; ++pass) {
    const CurveSums sums = SumPowers<kKind, T>(scores, n, curve.LevelAt(c), max);
    if (!(sums.p > 0.0 && sums.u > 0.0) && c > lower) {  // A guess beyond every entry.
      c = lower;
      continue;
    }
    // From the right of the answer a step lands on its left, for the reason why one from the left
    // stays there.
    const double next = std::max(lower, c + NewtonStep<kKind>(sums, curve.m));
    const double step = next - c;
    c = next;
    // What a change of c does to Σ p.
    const double weight = sums.u / sums.p;
    if (std::abs(step) * weight <= 4.0 * kEpsilon || (pass > 1 && step <= 0.0)) break;
    // Newton's method squares the error, so two steps tell how large it is now, where p has a slope
    // without jumps; with a margin for the entries that leave the support.
    if (std::is_same_v<T, float> && curve.m <= 0.5) {
      const double error = std::abs(step) * (step / last_step) * (step / last_step);
      if (error * weight <= kEpsilon / 128.0) break;  // Never the first.
    }
    last_step = step;
    // What is at or below this bound stays zero. With a margin for the rounding of the sums.
    if (pass == 0 && curve.m > 0.0) {
      const double reach = curve.Reach(std::max(lower, c - kRoundingOf<T> * (1.0 + c)));
      const double slack = (std::abs(max) + reach) * 4.0 * kEpsilon;
      n = CopyAbove(scores, n, static_cast<T>(max - reach - slack), room);
      scores = room;
    }
  }
  Solution solution;
  solution.level = curve.LevelAt(c);
  solution.threshold = curve.Threshold(max, c);
  return solution;
}

// The level at which the row sums to 1. `lower` is a lower bound of its c, 0 if none is known.
template <CurveKind kKind, typename T>
Solution SolveCurve(const T* scores, size_t n, const Curve& curve, double max, double lower) {
  if (kKind == CurveKind::kGeneral && curve.m > 1.0) return SolveForPeak(scores, n, curve, max);
  return SolveFromLeft<kKind>(scores, n, curve, max, lower);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#endif  // FLASH_ENTMAX_SRC_CPU_THRESHOLD_INL_H_
