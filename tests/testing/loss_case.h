// Random problems for FenchelYoungLoss and the comparison of their results with the reference.

#ifndef FLASH_ENTMAX_TESTS_TESTING_LOSS_CASE_H_
#define FLASH_ENTMAX_TESTS_TESTING_LOSS_CASE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include "flash_entmax/loss.h"
#include "reference/loss_reference.h"
#include "testing/compare.h"
#include "testing/mapping_case.h"
#include "testing/random.h"
#include "testing/stored_tensor.h"

namespace flash_entmax::testing {

struct LossCase {
  MappingKind kind = MappingKind::kEntmax;
  double alpha = 1.5;
  DType dtype = DType::kFloat64;
  DType loss_dtype = DType::kFloat64;
  Reduction reduction = Reduction::kMean;
  int64_t rows = 5;
  int64_t classes = 7;
  double ignored = 0.25;  // Share of rows whose target is ignore_index.
  bool with_grad = true;
  bool strided = false;
  double spread = 1.0;
  uint64_t stream = 0;
};

inline std::ostream& operator<<(std::ostream& out, const LossCase& c) {
  out.precision(17);
  return out << (c.kind == MappingKind::kEntmax ? "entmax" : "normmax") << " alpha " << c.alpha
             << ' ' << NameOf(c.dtype) << " loss " << NameOf(c.loss_dtype) << " reduction "
             << static_cast<int>(c.reduction) << " rows " << c.rows << " classes " << c.classes
             << " ignored " << c.ignored << (c.with_grad ? " grad" : "")
             << (c.strided ? " strided" : "") << " spread " << c.spread << " stream " << c.stream
             << ' ' << SeedMessage();
}

// The tensors of a case.
class LossProblem {
 public:
  explicit LossProblem(const LossCase& c) : with_grad_(c.with_grad) {
    Random random(c.stream);
    Random* layout = c.strided ? &random : nullptr;
    scores = StoredTensor(c.dtype, {c.rows, c.classes}, layout);
    scores.SetValues(random.GaussVector(scores.size(), c.spread));
    options.kind = c.kind;
    options.alpha = c.alpha;
    options.reduction = c.reduction;
    options.ignore_index = random.Pick<int64_t>({-100, -1, 0, 1000});
    target = StoredTensor(DType::kInt64, {c.rows}, layout);
    for (int64_t row = 0; row < c.rows; ++row) {
      const int64_t y = random.Integer(0, c.classes - 1);
      target.Set({row}, static_cast<double>(random.Chance(c.ignored) ? options.ignore_index : y));
    }
    const Index one = random.Chance(0.5) ? Index{} : Index{1};
    loss =
        StoredTensor(c.loss_dtype, c.reduction == Reduction::kNone ? Index{c.rows} : one, layout);
    grad = StoredTensor(c.dtype, {c.rows, c.classes}, layout);
  }

  Status Run() {
    return FenchelYoungLoss(scores.view(), target.view(), options, loss.mutable_view(),
                            with_grad_ ? grad.mutable_view() : MutableTensorView{});
  }

  LossOptions options;
  StoredTensor scores, target, loss, grad;

 private:
  bool with_grad_;
};

// Runs on poisoned outputs; returns what disagrees with the reference, one line each.
inline std::string LossDisagreement(const LossCase& c, LossProblem* problem) {
  Report report;
  if (const Status status = problem->Run(); !status.ok()) return status.message();
  if (!problem->loss.GapsAreIntact()) report.Add("wrote between the losses");
  if (!problem->grad.GapsAreIntact()) report.Add("wrote between the gradients");

  double counted = 0.0;
  for (double y : problem->target.Values()) {
    counted += static_cast<int64_t>(y) != problem->options.ignore_index ? 1.0 : 0.0;
  }
  const double divisor = c.reduction == Reduction::kMean ? std::max(counted, 1.0) : 1.0;
  const double epsilon = EpsilonOf(c.loss_dtype);
  double total = 0.0;
  double total_bound = 0.0;
  for (int64_t row = 0; row < c.rows; ++row) {
    const std::string where = "row " + std::to_string(row) + ' ';
    const auto y = static_cast<int64_t>(problem->target.Get({row}));
    const bool ignored = y == problem->options.ignore_index;
    std::vector<double> scores(c.classes);
    double largest = 1.0;
    for (int64_t k = 0; k < c.classes; ++k) {
      scores[k] = problem->scores.Get({row, k});
      if (std::isfinite(scores[k])) largest = std::max(largest, std::fabs(scores[k]));
    }
    const reference::LossRow want =
        ignored ? reference::LossRow{0.0, std::vector<double>(c.classes, 0.0)}
                : reference::FenchelYoungLoss(scores, y, c.kind, c.alpha);
    const double bound = ignored ? 0.0 : 1e-12 * largest;
    total += want.loss;
    total_bound += bound + 0x1p-52 * std::fabs(want.loss);
    if (c.reduction == Reduction::kNone) {
      const double got = problem->loss.Get({row});
      report.Expect(where + "loss", got, RoundTo(c.loss_dtype, want.loss),
                    bound + epsilon * (std::isfinite(want.loss) ? want.loss : 0.0));
      if (got < 0.0) report.Add(where + "loss is negative");
    }
    if (!c.with_grad) continue;
    const double range = SupportRange(scores, want.grad);
    for (int64_t k = 0; k < c.classes; ++k) {
      const std::string entry = where + "grad " + std::to_string(k);
      const double p = want.grad[k] + (!ignored && k == y ? 1.0 : 0.0);
      // The probability is computed in double, then rounded once.
      const double exact = ProbabilityBound(DType::kFloat64, c.alpha, std::max(range, largest),
                                            std::max(p, 0x1p-52), p);
      const double gradient = want.grad[k] / divisor;
      report.Expect(entry, problem->grad.Get({row, k}), gradient,
                    ignored ? 0.0
                            : 2.0 * exact / divisor + EpsilonOf(c.dtype) * std::fabs(gradient) +
                                  2.0 * RoundingNearZero(c.dtype));
    }
  }
  if (c.reduction != Reduction::kNone) {
    const double want = total / divisor;
    report.Expect("loss", problem->loss.Values()[0], RoundTo(c.loss_dtype, want),
                  total_bound / divisor + epsilon * (std::isfinite(want) ? std::fabs(want) : 0.0));
  }
  return report.text();
}

}  // namespace flash_entmax::testing

#endif  // FLASH_ENTMAX_TESTS_TESTING_LOSS_CASE_H_
