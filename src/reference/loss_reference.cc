#include "reference/loss_reference.h"

#include <cmath>
#include <limits>

#include "math/deformed_exp.h"
#include "reference/mapping_reference.h"

namespace flash_entmax::reference {
namespace {

// The generalised entropy H(p) of which the mapping is the regularised maximiser.
double Entropy(const std::vector<double>& p, MappingKind kind, double alpha) {
  double sum = 0.0;
  if (kind == MappingKind::kNormmax) {
    for (double pi : p) sum += std::pow(pi, alpha);
    return 1.0 - std::pow(sum, 1.0 / alpha);
  }
  // Σ(p − p^α)/(α(α−1)) = −Σ p·log_α(p)/α, which needs no special case at α = 1.
  for (double pi : p) {
    if (pi != 0.0) sum += pi * DeformedLog(alpha, pi);
  }
  return -sum / alpha;
}

}  // namespace

LossRow FenchelYoungLoss(const std::vector<double>& scores, int64_t target, MappingKind kind,
                         double alpha) {
  const auto y = static_cast<size_t>(target);
  const std::vector<double> p = MapRow(scores, kind, alpha).probability;

  LossRow row;
  double mass = 0.0;
  for (double pi : p) mass += pi;
  if (!(mass > 0.0)) {  // NaN in the row, or no class at all.
    row.loss = std::numeric_limits<double>::quiet_NaN();
    row.grad.assign(p.size(), row.loss);
    return row;
  }

  // (p − e_y)·s = Σ p_i·(s_i − s_y), since Σ p_i = 1; entries without weight may be −∞.
  for (size_t i = 0; i < p.size(); ++i) {
    if (p[i] > 0.0) row.loss += p[i] * (scores[i] - scores[y]);
  }
  row.loss += Entropy(p, kind, alpha);
  if (row.loss < 0.0) row.loss = 0.0;  // By rounding only.

  row.grad = p;
  row.grad[y] -= 1.0;
  return row;
}

}  // namespace flash_entmax::reference
