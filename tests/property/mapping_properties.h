// What must hold for every row, whoever computes it. Each property takes an engine with
//     MappedRow Map(scores, Mapping)
//     MappedRowGradient Backward(probability, grad_probability, Mapping)
// in float64, and draws its inputs with RapidCheck.

#ifndef FLASH_ENTMAX_TESTS_PROPERTY_MAPPING_PROPERTIES_H_
#define FLASH_ENTMAX_TESTS_PROPERTY_MAPPING_PROPERTIES_H_

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "reference/mapping_reference.h"
#include "testing/compare.h"
#include "testing/finite_difference.h"
#include "testing/mapping_case.h"
#include "testing/property.h"

namespace flash_entmax::testing {

// How far apart two results of the same row may be: each keeps the bound of mapping.h.
inline double Apart(const Mapping& mapping, const std::vector<double>& scores, double a, double b) {
  const auto [low, high] = std::minmax_element(scores.begin(), scores.end());
  const double alpha = mapping.kind == MappingKind::kBudget ? 2.0 : mapping.alpha;
  return 2.0 * ProbabilityBound(DType::kFloat64, alpha, *high - *low, a, b);
}

template <typename Engine>
void SumsToOne(const Engine& engine) {
  const std::vector<double> scores = *AnyScores();
  const Mapping mapping = *AnyMapping(scores.size());
  const std::vector<double> p = engine.Map(scores, mapping).probability;
  const double total = mapping.kind == MappingKind::kBudget ? mapping.budget : 1.0;
  const double n = static_cast<double>(scores.size());
  RC_ASSERT(Error(std::accumulate(p.begin(), p.end(), 0.0), total) <=
            n * 0x1p-52 * std::max(1.0, total));
  for (double x : p) RC_ASSERT(x >= 0.0 && x <= 1.0 + n * 0x1p-52);
}

template <typename Engine>
void PreservesOrder(const Engine& engine) {
  const std::vector<double> scores = *AnyScores();
  const Mapping mapping = *AnyMapping(scores.size());
  const std::vector<double> p = engine.Map(scores, mapping).probability;
  for (size_t i = 0; i < p.size(); ++i) {
    for (size_t j = 0; j < p.size(); ++j) {
      if (scores[i] == scores[j]) RC_ASSERT(p[i] == p[j]);
      if (scores[i] > scores[j]) RC_ASSERT(p[i] >= p[j] * (1.0 - 4.0 * 0x1p-52));
    }
  }
}

template <typename Engine>
void IgnoresShifts(const Engine& engine) {
  const std::vector<double> scores = *AnyScores();
  const Mapping mapping = *AnyMapping(scores.size());
  const double shift = *rc::gen::inRange(-1000, 1000);
  std::vector<double> moved = scores;
  for (double& score : moved) score += shift;  // Exact.
  const auto before = engine.Map(scores, mapping);
  const auto after = engine.Map(moved, mapping);
  for (size_t i = 0; i < scores.size(); ++i) {
    const double a = before.probability[i];
    const double b = after.probability[i];
    // The clamp's shift is rounded to the size of the scores.
    const double rounding = mapping.kind == MappingKind::kBudget ? 1100.0 * 0x1p-52 : 0.0;
    RC_ASSERT(Error(a, b) <= Apart(mapping, scores, a, b) + rounding);
  }
}

template <typename Engine>
void FollowsPermutations(const Engine& engine) {
  const std::vector<double> scores = *AnyScores();
  const Mapping mapping = *AnyMapping(scores.size());
  std::vector<size_t> order(scores.size());
  std::iota(order.begin(), order.end(), size_t{0});
  order = *rc::gen::map(rc::gen::arbitrary<uint32_t>(), [order](uint32_t stream) {
    std::vector<size_t> shuffled = order;
    Random random(stream);
    for (size_t i = shuffled.size(); i > 1; --i) {
      std::swap(shuffled[i - 1], shuffled[random.Integer(0, static_cast<int64_t>(i) - 1)]);
    }
    return shuffled;
  });
  std::vector<double> permuted;
  for (size_t i : order) permuted.push_back(scores[i]);
  const auto before = engine.Map(scores, mapping);
  const auto after = engine.Map(permuted, mapping);
  for (size_t i = 0; i < order.size(); ++i) {
    const double a = before.probability[order[i]];
    const double b = after.probability[i];
    RC_ASSERT(Error(a, b) <= Apart(mapping, scores, a, b));
  }
}

// True if p > 0 cannot be a matter of rounding: the base p^(α−1) is well above 0.
inline bool IsClearlyPositive(double alpha, double p) {
  return p > 0.0 && std::pow(p, alpha - 1.0) > 1e-9;
}

// Larger α, smaller support: with δ_i = s_i − s_k, key k is positive as long as
// Σ_{δ_i > 0} (m·δ_i)^(1/m) < 1, and while a term is below 1 it grows with m.
template <typename Engine>
void SupportShrinksWithAlpha(const Engine& engine) {
  const std::vector<double> scores = *AnyScores();
  double low = *AlphaWithin(1.0001, 20.0);
  double high = *AlphaWithin(1.0001, 20.0);
  if (low > high) std::swap(low, high);
  const auto wide = engine.Map(scores, {MappingKind::kEntmax, low}).probability;
  const auto narrow = engine.Map(scores, {MappingKind::kEntmax, high}).probability;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (IsClearlyPositive(high, narrow[i])) RC_ASSERT(wide[i] > 0.0);
  }
}

template <typename Engine>
void SupportShrinksWithScale(const Engine& engine) {
  const std::vector<double> scores = *AnyScores();
  const double alpha = *AlphaWithin(1.0001, 20.0);
  const double factor = *rc::gen::element(1.0, 1.125, 2.0, 10.0);
  std::vector<double> scaled = scores;
  for (double& score : scaled) score *= factor;
  const auto wide = engine.Map(scores, {MappingKind::kEntmax, alpha}).probability;
  const auto narrow = engine.Map(scaled, {MappingKind::kEntmax, alpha}).probability;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (IsClearlyPositive(alpha, narrow[i])) RC_ASSERT(wide[i] > 0.0);
  }
}

// Entmax's λ as it follows from the reported threshold, up to a positive factor and a constant.
inline double Level(double alpha, double threshold) { return alpha < 1.0 ? -threshold : threshold; }

// A last-bits allowance for thresholds of a row.
inline double ThresholdSlack(double alpha, const std::vector<double>& scores) {
  double largest = 1.0;
  for (double score : scores) largest = std::max(largest, std::fabs(score));
  const double n = static_cast<double>(scores.size());
  // For α < 1 the threshold itself can be as large as n^(1−α).
  return 1e-14 * (largest * std::max(1.0, alpha - 1.0) + std::pow(n, std::max(0.0, 1.0 - alpha)));
}

// Fact F1: the threshold never falls as keys arrive.
template <typename Engine>
void ThresholdNeverFalls(const Engine& engine) {
  const std::vector<double> scores = *AnyScores();
  const double alpha = *AnyAlpha();
  const double slack = ThresholdSlack(alpha, scores);
  double last = -std::numeric_limits<double>::infinity();
  for (size_t n = 1; n <= scores.size(); ++n) {
    const std::vector<double> seen(scores.begin(), scores.begin() + static_cast<int64_t>(n));
    const double level = Level(alpha, engine.Map(seen, {MappingKind::kEntmax, alpha}).threshold);
    RC_ASSERT(level >= last - slack);
    last = std::max(last, level);
  }
}

// Fact F1b: the maxima of disjoint groups have a threshold at or below that of the row.
template <typename Engine>
void GroupMaximaBoundTheThreshold(const Engine& engine) {
  const std::vector<double> scores = *AnyScores();
  const double alpha = *AnyAlpha();
  const auto groups = static_cast<size_t>(*rc::gen::inRange(1, 17));
  std::vector<double> maxima(std::min(groups, scores.size()),
                             -std::numeric_limits<double>::infinity());
  for (size_t i = 0; i < scores.size(); ++i) {
    double& largest = maxima[i % maxima.size()];
    largest = std::max(largest, scores[i]);
  }
  const Mapping mapping{MappingKind::kEntmax, alpha};
  RC_ASSERT(Level(alpha, engine.Map(maxima, mapping).threshold) <=
            Level(alpha, engine.Map(scores, mapping).threshold) + ThresholdSlack(alpha, scores));
}

// p changes by less than |∂p/∂α|·|α − 1|, and |∂p_i/∂α| ≤ a_i + p_i·Σa with a = ½ p log² p, which
// is below 1 + Σa.
template <typename Engine>
void IsContinuousThroughSoftmax(const Engine& engine) {
  const std::vector<double> scores = *AnyScores();
  const auto softmax = engine.Map(scores, {MappingKind::kEntmax, 1.0}).probability;
  double slope = 1.0;
  for (double p : softmax) slope += p > 0.0 ? 0.5 * p * std::log(p) * std::log(p) : 0.0;
  for (double step : {-1e-7, -1e-9, -1e-12, 1e-12, 1e-9, 1e-7}) {
    const auto near = engine.Map(scores, {MappingKind::kEntmax, 1.0 + step}).probability;
    for (size_t i = 0; i < scores.size(); ++i) {
      RC_ASSERT(Error(near[i], softmax[i]) <=
                2.0 * slope * std::fabs(step) + Apart({}, scores, near[i], softmax[i]));
    }
  }
}

inline std::vector<double> AnyDirection(size_t size) {
  std::vector<double> values;
  for (int x : *rc::gen::container<std::vector<int>>(size, rc::gen::inRange(-64, 65))) {
    values.push_back(x / 64.0);
  }
  return values;
}

inline double DotProduct(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

// The Jacobian is symmetric and its rows sum to 0, because p is the gradient of a convex function
// that grows by c when every score does.
template <typename Engine>
void JacobianIsSymmetricAndBlindToShifts(const Engine& engine) {
  const std::vector<double> scores = *AnyScores();
  const Mapping mapping = *AnyMapping(scores.size());
  const std::vector<double> g = AnyDirection(scores.size());
  const std::vector<double> h = AnyDirection(scores.size());
  const auto p = engine.Map(scores, mapping).probability;
  const auto from_g = engine.Backward(p, g, mapping).scores;
  const auto from_h = engine.Backward(p, h, mapping).scores;
  // Everything is a sum of a few terms of this size.
  double size = 1e-300;
  for (double x : p) {
    if (x == 0.0) continue;
    const double weight =
        mapping.kind == MappingKind::kBudget ? 1.0 : std::pow(x, 2.0 - mapping.alpha);
    size += weight * (mapping.kind == MappingKind::kNormmax ? 1.0 / (mapping.alpha - 1.0) : 1.0);
  }
  const double bound = 1e-13 * size;
  RC_ASSERT(std::fabs(std::accumulate(from_g.begin(), from_g.end(), 0.0)) <= bound);
  RC_ASSERT(Error(DotProduct(h, from_g), DotProduct(g, from_h)) <= bound);
}

// Central differences in a random direction and in α. α below 1.3, where p has three continuous
// derivatives wherever the scores lie.
template <typename Engine>
void GradientsMatchDifferences(const Engine& engine) {
  const std::vector<double> scores = *AnyScores();
  const double alpha = *AlphaWithin(0.8, 1.25);
  const Mapping mapping{MappingKind::kEntmax, alpha};
  const std::vector<double> g = AnyDirection(scores.size());
  const std::vector<double> direction = AnyDirection(scores.size());
  const auto gradient = engine.Backward(engine.Map(scores, mapping).probability, g, mapping);
  const double along = CentralDifference(
      [&](double t) {
        std::vector<double> moved = scores;
        for (size_t i = 0; i < moved.size(); ++i) moved[i] += t * direction[i];
        return DotProduct(g, engine.Map(moved, mapping).probability);
      },
      0.0, 1e-5);
  RC_ASSERT(Error(DotProduct(gradient.scores, direction), along) <= 1e-8);
  const double in_alpha = CentralDifference(
      [&](double a) {
        return DotProduct(g, engine.Map(scores, {MappingKind::kEntmax, a}).probability);
      },
      alpha, 1e-5);
  RC_ASSERT(Error(gradient.alpha, in_alpha) <= 1e-6);
}

}  // namespace flash_entmax::testing

// Declares a test for every property. A macro because RapidCheck's own is one.
#define FLASH_ENTMAX_MAPPING_PROPERTY(suite, engine, name) \
  RC_GTEST_PROP(suite, name, ()) { ::flash_entmax::testing::name(engine()); }
#define FLASH_ENTMAX_MAPPING_PROPERTIES(suite, engine)                              \
  FLASH_ENTMAX_MAPPING_PROPERTY(suite, engine, SumsToOne)                           \
  FLASH_ENTMAX_MAPPING_PROPERTY(suite, engine, PreservesOrder)                      \
  FLASH_ENTMAX_MAPPING_PROPERTY(suite, engine, IgnoresShifts)                       \
  FLASH_ENTMAX_MAPPING_PROPERTY(suite, engine, FollowsPermutations)                 \
  FLASH_ENTMAX_MAPPING_PROPERTY(suite, engine, SupportShrinksWithAlpha)             \
  FLASH_ENTMAX_MAPPING_PROPERTY(suite, engine, SupportShrinksWithScale)             \
  FLASH_ENTMAX_MAPPING_PROPERTY(suite, engine, ThresholdNeverFalls)                 \
  FLASH_ENTMAX_MAPPING_PROPERTY(suite, engine, GroupMaximaBoundTheThreshold)        \
  FLASH_ENTMAX_MAPPING_PROPERTY(suite, engine, IsContinuousThroughSoftmax)          \
  FLASH_ENTMAX_MAPPING_PROPERTY(suite, engine, JacobianIsSymmetricAndBlindToShifts) \
  FLASH_ENTMAX_MAPPING_PROPERTY(suite, engine, GradientsMatchDifferences)

#endif  // FLASH_ENTMAX_TESTS_PROPERTY_MAPPING_PROPERTIES_H_
