#include "reference/mapping_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "math/deformed_exp.h"

namespace flash_entmax::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

double Sum(const std::vector<double>& terms) {
  double sum = 0.0;
  for (double term : terms) sum += term;
  return sum;
}

// Two neighbouring doubles between which a function reaches its target, or the same one twice.
struct Bracket {
  double low;
  double high;
};

// Where in [low, high] the increasing `function` reaches `target`, by halving until no double is
// left between the ends.
template <typename Function>
Bracket Bisect(double low, double high, double target, const Function& function) {
  if (function(high) <= target) return {high, high};
  while (true) {
    const double middle = low + 0.5 * (high - low);
    if (!(low < middle && middle < high)) return {low, high};
    (function(middle) < target ? low : high) = middle;
  }
}

// The probabilities between those at the two ends that sum to `target`; sum_at(x) fills in those
// at x. The sum can jump over the target from one double to the next, for two reasons: for large α
// it is steep where an entry enters the support, and a threshold of the size of the scores has few
// digits for differences between them. The entries that jump then share what is missing.
template <typename SumAt>
void FillBetween(const Bracket& ends, double target, const SumAt& sum_at,
                 std::vector<double>* probability) {
  const double sum_low = sum_at(ends.low);
  const std::vector<double> low = *probability;
  const double sum_high = sum_at(ends.high);
  if (!(sum_low < target && target < sum_high)) return;
  const double part = (target - sum_low) / (sum_high - sum_low);
  for (size_t i = 0; i < low.size(); ++i) {
    (*probability)[i] = low[i] + part * ((*probability)[i] - low[i]);
  }
}

// Below, a gap is max s − s_i ≥ 0, +∞ for masked entries, and m = α − 1.

// Softmax in closed form; returns log Σ exp(−gap).
double SoftmaxFromGaps(const std::vector<double>& gaps, std::vector<double>* probability) {
  double sum = 0.0;
  for (double gap : gaps) sum += std::exp(-gap);
  for (size_t i = 0; i < gaps.size(); ++i) (*probability)[i] = std::exp(-gaps[i]) / sum;
  return std::log(sum);
}

// [top^m − m·gap]₊^(1/m), written as top·exp_α(−gap/top^m) to be accurate close to α = 1, and for
// large α too, where top^m may be far smaller than an ulp of 1.
double PowerBelowTop(double top, double gap, double alpha) {
  if (gap == 0.0) return top;  // Whatever top^m is, 0 included.
  return top * DeformedExp(alpha, -gap * std::pow(top, 1.0 - alpha));
}

// α-entmax: with z = m·s, p_i = [z_i − τ]₊^(1/m). The unknown is the largest probability P, for
// which max z − τ = P^m, so that p_i = [P^m − m·gap_i]₊^(1/m). They sum to at most 1 at P = 1/n
// and to at least 1 at P = 1. Returns max z − τ.
double EntmaxFromGaps(const std::vector<double>& gaps, double alpha, double count,
                      std::vector<double>* probability) {
  const auto sum_at = [&](double top) {
    for (size_t i = 0; i < gaps.size(); ++i) {
      (*probability)[i] = PowerBelowTop(top, gaps[i], alpha);
    }
    return Sum(*probability);
  };
  const Bracket top = Bisect(1.0 / count, 1.0, 1.0, sum_at);
  FillBetween(top, 1.0, sum_at, probability);
  return std::pow(top.high, alpha - 1.0);
}

// Normmax: p = t/Σt, t_i = [s_i − τ]₊^(1/m) with Σ t_i^α = 1, from the optimality condition
// s_i − (p_i/‖p‖_α)^m = τ. The unknown is the largest t, T, for which max s − τ = T^m, so that
// t_i = [T^m − gap_i]₊^(1/m). The sum is at most 1 at T = n^(−1/α) and at least 1 at T = 1.
// Returns max s − τ.
double NormmaxFromGaps(const std::vector<double>& gaps, double alpha, double count,
                       std::vector<double>* probability) {
  const double m = alpha - 1.0;
  std::vector<double>& t = *probability;
  const auto sum_at = [&](double top) {
    double sum = 0.0;
    for (size_t i = 0; i < gaps.size(); ++i) {
      t[i] = PowerBelowTop(top, gaps[i] / m, alpha);
      sum += std::pow(t[i], alpha);
    }
    return sum;
  };
  const double top = Bisect(std::pow(count, -1.0 / alpha), 1.0, 1.0, sum_at).low;
  sum_at(top);
  const double sum = Sum(t);
  for (double& p : t) p /= sum;
  return std::pow(top, m);
}

// Budget: p_i = clamp(s_i − τ, 0, 1) with Σ p_i = budget; τ = max s − d, returns d. At d = 0 the
// sum is 0, one above the largest gap it is n. With n ≤ budget every p_i is 1, by that largest d.
double BudgetFromGaps(const std::vector<double>& gaps, double budget, double count,
                      std::vector<double>* probability) {
  const auto sum_at = [&](double d) {
    for (size_t i = 0; i < gaps.size(); ++i) {
      (*probability)[i] = std::clamp(d - gaps[i], 0.0, 1.0);
    }
    return Sum(*probability);
  };
  double largest_gap = 0.0;
  for (double gap : gaps) {
    if (gap < kInfinity) largest_gap = std::max(largest_gap, gap);
  }
  if (count <= budget) {
    for (size_t i = 0; i < gaps.size(); ++i) (*probability)[i] = gaps[i] < kInfinity ? 1.0 : 0.0;
    return largest_gap + 1.0;
  }
  const Bracket d = Bisect(0.0, largest_gap + 1.0, budget, sum_at);
  FillBetween(d, budget, sum_at, probability);
  return d.low;
}

}  // namespace

MappedRow MapRow(const std::vector<double>& scores, MappingKind kind, double alpha, double budget) {
  MappedRow row;
  row.probability.assign(scores.size(), 0.0);
  row.threshold = kNaN;

  double largest = -kInfinity;
  double count = 0.0;  // unmasked entries
  bool defined = true;
  for (double score : scores) {
    if (std::isnan(score) || score == kInfinity) defined = false;
    if (score == -kInfinity) continue;
    largest = std::max(largest, score);
    count += 1.0;
  }
  if (!defined) {
    for (size_t i = 0; i < scores.size(); ++i) {
      if (scores[i] != -kInfinity) row.probability[i] = kNaN;
    }
    return row;
  }
  if (count == 0.0) return row;

  std::vector<double> gaps(scores.size());
  for (size_t i = 0; i < scores.size(); ++i) gaps[i] = largest - scores[i];

  switch (kind) {
    case MappingKind::kEntmax:
      if (alpha == 1.0) {
        row.threshold = largest + SoftmaxFromGaps(gaps, &row.probability);
      } else {
        row.threshold =
            (alpha - 1.0) * largest - EntmaxFromGaps(gaps, alpha, count, &row.probability);
      }
      break;
    case MappingKind::kNormmax:
      row.threshold = largest - NormmaxFromGaps(gaps, alpha, count, &row.probability);
      break;
    case MappingKind::kBudget:
      row.threshold = largest - BudgetFromGaps(gaps, budget, count, &row.probability);
      break;
  }
  for (double p : row.probability) row.support_size += p > 0.0 ? 1 : 0;
  return row;
}

namespace {

// True if any entry is NaN: such a row has no gradient.
bool IsUndefined(const std::vector<double>& p, const std::vector<double>& g) {
  const auto is_nan = [](double x) { return std::isnan(x); };
  return std::any_of(p.begin(), p.end(), is_nan) || std::any_of(g.begin(), g.end(), is_nan);
}

// ∂L/∂s = u ⊙ (g − ḡ) with u_i = p_i^(2−α) and ḡ = (u·g)/Σu, because dp_i = u_i·(ds_i − dλ) and
// Σ dp_i = 0. In the same way dp_i = a_i·dα − u_i·dλ with a_i the partial of exp_α at fixed
// s_i − λ, so ∂L/∂α = Σ a_i·(g_i − ḡ).
MappedRowGradient EntmaxBackward(const std::vector<double>& p, const std::vector<double>& g,
                                 double alpha) {
  MappedRowGradient gradient;
  gradient.scores.assign(p.size(), 0.0);
  double u_sum = 0.0;
  double u_dot_g = 0.0;
  for (size_t i = 0; i < p.size(); ++i) {
    if (p[i] == 0.0) continue;  // Outside the support; a NaN stays in.
    const double u = std::pow(p[i], 2.0 - alpha);
    u_sum += u;
    u_dot_g += u * g[i];
  }
  const double mean = u_dot_g / u_sum;
  for (size_t i = 0; i < p.size(); ++i) {
    if (p[i] == 0.0) continue;
    gradient.scores[i] = std::pow(p[i], 2.0 - alpha) * (g[i] - mean);
    gradient.alpha += DeformedExpAlphaPartial(alpha, p[i]) * (g[i] - mean);
  }
  return gradient;
}

// ∂L/∂s = (I − p1ᵀ)(w ⊙ (g − p·g)) with w_i = p_i^(2−α)·‖p‖_α^(α−1)/(α−1) on the support.
MappedRowGradient NormmaxBackward(const std::vector<double>& p, const std::vector<double>& g,
                                  double alpha) {
  MappedRowGradient gradient;
  gradient.scores.assign(p.size(), 0.0);
  double sum_of_powers = 0.0;
  double p_dot_g = 0.0;
  for (size_t i = 0; i < p.size(); ++i) {
    if (p[i] == 0.0) continue;
    sum_of_powers += std::pow(p[i], alpha);
    p_dot_g += p[i] * g[i];
  }
  const double factor = std::pow(sum_of_powers, (alpha - 1.0) / alpha) / (alpha - 1.0);
  double sum = 0.0;
  for (size_t i = 0; i < p.size(); ++i) {
    if (p[i] == 0.0) continue;
    gradient.scores[i] = factor * std::pow(p[i], 2.0 - alpha) * (g[i] - p_dot_g);
    sum += gradient.scores[i];
  }
  for (size_t i = 0; i < p.size(); ++i) {
    if (p[i] != 0.0) gradient.scores[i] -= p[i] * sum;
  }
  return gradient;
}

// ∂L/∂s = g − mean(g) over the entries strictly between the clamps.
MappedRowGradient BudgetBackward(const std::vector<double>& p, const std::vector<double>& g) {
  MappedRowGradient gradient;
  gradient.scores.assign(p.size(), 0.0);
  const auto is_free = [](double probability) { return probability != 0.0 && probability != 1.0; };
  double sum = 0.0;
  double count = 0.0;
  for (size_t i = 0; i < p.size(); ++i) {
    if (!is_free(p[i])) continue;
    sum += g[i];
    count += 1.0;
  }
  for (size_t i = 0; i < p.size(); ++i) {
    // Adding 0·p changes no number and carries the NaN of an undefined row.
    if (is_free(p[i])) gradient.scores[i] = g[i] - sum / count + 0.0 * p[i];
  }
  return gradient;
}

}  // namespace

MappedRowGradient MapRowBackward(const std::vector<double>& probability,
                                 const std::vector<double>& grad_probability, MappingKind kind,
                                 double alpha) {
  if (IsUndefined(probability, grad_probability)) {
    return {std::vector<double>(probability.size(), kNaN), kNaN};
  }
  switch (kind) {
    case MappingKind::kNormmax:
      return NormmaxBackward(probability, grad_probability, alpha);
    case MappingKind::kBudget:
      return BudgetBackward(probability, grad_probability);
    case MappingKind::kEntmax:
      break;
  }
  return EntmaxBackward(probability, grad_probability, alpha);
}

}  // namespace flash_entmax::reference
