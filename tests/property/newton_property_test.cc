// Fact F2 for α ≤ 2: Newton's method for the threshold, started at or below it, stays there.

#include <algorithm>
#include <cmath>
#include <vector>

#include "math/deformed_exp.h"
#include "reference/mapping_reference.h"
#include "testing/compare.h"
#include "testing/property.h"

namespace flash_entmax {
namespace {

using testing::AlphaWithin;
using testing::AnyScores;
using testing::Error;

// λ is written as max s + c. S = Σ p and U = −dS/dc = Σ p^(2−α), with p_i = exp_α(−(gap_i + c)).
struct Sums {
  double s = 0.0;
  double u = 0.0;
};

Sums SumsAt(const std::vector<double>& gaps, double alpha, double c) {
  Sums sums;
  for (double gap : gaps) {
    const double p = DeformedExp(alpha, -(gap + c));
    if (p == 0.0) continue;
    sums.s += p;
    sums.u += std::pow(p, 2.0 - alpha);
  }
  return sums;
}

// Newton's step for S = 1, which is convex in c.
double PlainStep(double /*alpha*/, const Sums& sums) { return (sums.s - 1.0) / sums.u; }

// Newton's step for (S^m − 1)/m = 0. S^m is a norm of the bases [1 − m·x]₊, convex in c too and
// much straighter: for one key, or equal keys, the step lands on the root.
double NormStep(double alpha, const Sums& sums) {
  const double m = alpha - 1.0;
  const double log_s = std::log(sums.s);
  const double relative = m == 0.0 ? log_s : -std::expm1(-m * log_s) / m;
  return sums.s / sums.u * relative;
}

struct Row {
  double alpha = 1.5;
  std::vector<double> gaps;
  double root = 0.0;  // c of the threshold
};

Row AnyRow() {
  Row row;
  const std::vector<double> scores = *AnyScores();
  row.alpha = *AlphaWithin(0.3, 2.0);
  const double largest = *std::max_element(scores.begin(), scores.end());
  for (double score : scores) row.gaps.push_back(largest - score);
  const auto p = reference::MapRow(scores, MappingKind::kEntmax, row.alpha).probability;
  row.root = -DeformedLog(row.alpha, *std::max_element(p.begin(), p.end()));
  return row;
}

template <typename Step>
void StaysLeft(const Step& step) {
  const Row row = AnyRow();
  const double slack = 1e-13 * (1.0 + row.root);
  // Any start at or below the root will do; 0 is always one.
  double c = row.root * *rc::gen::inRange(0, 9) / 8.0;
  for (int i = 0; i < 100; ++i) {
    const double next = c + step(row.alpha, SumsAt(row.gaps, row.alpha, c));
    RC_ASSERT(next >= c - slack);         // Upwards
    RC_ASSERT(next <= row.root + slack);  // and never beyond.
    c = next;
  }
  RC_ASSERT(Error(c, row.root) <= 10.0 * slack);
}

RC_GTEST_PROP(NewtonProperty, PlainStepStaysLeft, ()) { StaysLeft(PlainStep); }

RC_GTEST_PROP(NewtonProperty, NormStepStaysLeft, ()) { StaysLeft(NormStep); }

RC_GTEST_PROP(NewtonProperty, NormStepIsNeverShorter, ()) {
  const Row row = AnyRow();
  const Sums sums = SumsAt(row.gaps, row.alpha, row.root * *rc::gen::inRange(0, 8) / 8.0);
  if (sums.s <= 1.0) return;
  RC_ASSERT(NormStep(row.alpha, sums) >= PlainStep(row.alpha, sums) - 1e-14 * (1.0 + row.root));
}

}  // namespace
}  // namespace flash_entmax
