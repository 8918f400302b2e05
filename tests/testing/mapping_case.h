// Random problems for MappingForward and MappingBackward, and the comparison of their results with
// the reference. Used by the tests that walk through a fixed matrix and by the property tests.

#ifndef FLASH_ENTMAX_TESTS_TESTING_MAPPING_CASE_H_
#define FLASH_ENTMAX_TESTS_TESTING_MAPPING_CASE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include "flash_entmax/mapping.h"
#include "math/deformed_exp.h"
#include "reference/mapping_reference.h"
#include "testing/compare.h"
#include "testing/random.h"
#include "testing/report.h"
#include "testing/stored_tensor.h"

namespace flash_entmax::testing {

inline const std::vector<double>& TestAlphas() {
  static const std::vector<double> alphas = {0.3,       0.8, 1.0,  1.0 + 1e-9, 1.0001, 1.1, 1.25,
                                             4.0 / 3.0, 1.5, 1.75, 2.0,        2.5,    4.0, 20.0};
  return alphas;
}

inline const std::vector<DType>& FloatingTypes() {
  static const std::vector<DType> types = {DType::kFloat64, DType::kFloat32, DType::kBFloat16,
                                           DType::kFloat16};
  return types;
}

struct MappingCase {
  MappingKind kind = MappingKind::kEntmax;
  double alpha = 1.5;
  bool alpha_per_row = false;  // Then each row draws one of TestAlphas(), if the kind allows it.
  double budget = 1.0;
  DType dtype = DType::kFloat64;
  DType threshold_dtype = DType::kFloat64;
  Index shape = {3, 10};
  int dim = -1;
  bool strided = false;  // Random memory order and gaps, else row-major.
  bool masked = false;   // A mask that broadcasts, and some scores of −∞.
  bool ties = false;     // Scores are multiples of 1/4.
  double spread = 1.0;   // Standard deviation of the scores.
  uint64_t stream = 0;   // Of random numbers.
};

inline std::ostream& operator<<(std::ostream& out, const MappingCase& c) {
  out << (c.kind == MappingKind::kEntmax    ? "entmax"
          : c.kind == MappingKind::kNormmax ? "normmax"
                                            : "budget");
  out.precision(17);
  out << " alpha " << c.alpha << (c.alpha_per_row ? " per row" : "") << " budget " << c.budget
      << ' ' << NameOf(c.dtype) << " threshold " << NameOf(c.threshold_dtype) << " shape [";
  for (int64_t size : c.shape) out << size << ' ';
  return out << "] dim " << c.dim << (c.strided ? " strided" : "") << (c.masked ? " masked" : "")
             << (c.ties ? " ties" : "") << " spread " << c.spread << " stream " << c.stream << ' '
             << SeedMessage();
}

// The tensors of a case and the options that point at them; do not move it.
class MappingProblem {
 public:
  explicit MappingProblem(const MappingCase& c) : case_(c), random_(c.stream) {
    const int rank = static_cast<int>(c.shape.size());
    dim_ = c.dim < 0 ? c.dim + rank : c.dim;
    outer_shape_ = c.shape;
    outer_shape_[dim_] = 1;
    scores = Make(c.dtype, c.shape);
    for (int64_t i = 0; i < scores.size(); ++i) {
      double score = c.spread * random_.Gauss();
      if (c.ties) score = std::round(4.0 * score) / 4.0;
      if (c.masked && random_.Chance(0.1)) score = -std::numeric_limits<double>::infinity();
      scores.Set(Unravel(c.shape, i), score);
    }
    options.kind = c.kind;
    options.alpha = c.alpha;
    options.budget = c.budget;
    options.dim = c.dim;
    if (c.alpha_per_row) {
      alphas_ = Make(random_.Chance(0.5) ? DType::kFloat64 : DType::kFloat32,
                     BroadcastableShape(c.shape, dim_, &random_));
      for (int64_t i = 0; i < alphas_.size(); ++i) {
        double alpha = random_.Pick(TestAlphas());
        // 1 + 1e-9 rounds to 1 in float32, which normmax does not allow.
        if (c.kind == MappingKind::kNormmax) alpha = std::max(alpha, 1.1);
        alphas_.Set(Unravel(alphas_.shape(), i), alpha);
      }
      options.alpha_per_row = alphas_.view();
      options.alpha = -1.0;  // Must not be looked at.
    }
    if (c.masked) {
      mask_ = Make(DType::kUInt8, BroadcastableShape(c.shape, -1, &random_));
      for (int64_t i = 0; i < mask_.size(); ++i) {
        mask_.Set(Unravel(mask_.shape(), i), random_.Chance(0.75) ? random_.Integer(1, 255) : 0.0);
      }
      options.mask = mask_.view();
    }
    probabilities = Make(c.dtype, c.shape);
    threshold = Make(c.threshold_dtype, outer_shape_);
    support_size = Make(random_.Chance(0.5) ? DType::kInt32 : DType::kInt64, outer_shape_);
    grad_probabilities = Make(c.dtype, c.shape);
    for (int64_t i = 0; i < grad_probabilities.size(); ++i) {
      grad_probabilities.Set(Unravel(c.shape, i), random_.Gauss());
    }
    grad_scores = Make(c.dtype, c.shape);
    grad_alpha = Make(c.threshold_dtype, outer_shape_);
  }
  MappingProblem(const MappingProblem&) = delete;
  MappingProblem& operator=(const MappingProblem&) = delete;

  Status RunForward() {
    return MappingForward(scores.view(), options, probabilities.mutable_view(),
                          {threshold.mutable_view(), support_size.mutable_view()});
  }
  Status RunBackward() {
    return MappingBackward(
        probabilities.view(), grad_probabilities.view(), options, grad_scores.mutable_view(),
        options.kind == MappingKind::kEntmax ? grad_alpha.mutable_view() : MutableTensorView{});
  }

  int64_t num_rows() const { return Product(outer_shape_); }
  int64_t row_length() const { return case_.shape[dim_]; }
  // Index of a row: 0 at dim.
  Index RowIndex(int64_t row) const { return Unravel(outer_shape_, row); }

  std::vector<double> Row(const StoredTensor& tensor, int64_t row) const {
    Index index = RowIndex(row);
    std::vector<double> values(row_length());
    for (int64_t i = 0; i < row_length(); ++i) {
      index[dim_] = i;
      values[i] = tensor.Get(index);
    }
    return values;
  }
  void SetScore(int64_t row, int64_t i, double score) {
    Index index = RowIndex(row);
    index[dim_] = i;
    scores.Set(index, score);
  }
  // The scores with −∞ where the mask is 0.
  std::vector<double> MaskedScores(int64_t row) const {
    std::vector<double> values = Row(scores, row);
    if (!options.mask) return values;
    Index index = RowIndex(row);
    for (int64_t i = 0; i < row_length(); ++i) {
      index[dim_] = i;
      if (GetBroadcast(mask_, index) == 0.0) values[i] = -std::numeric_limits<double>::infinity();
    }
    return values;
  }
  double Alpha(int64_t row) const {
    return options.alpha_per_row ? GetBroadcast(alphas_, RowIndex(row)) : case_.alpha;
  }

  MappingOptions options;
  StoredTensor scores, probabilities, threshold, support_size;
  StoredTensor grad_probabilities, grad_scores, grad_alpha;

 private:
  StoredTensor Make(DType dtype, const Index& shape) {
    return StoredTensor(dtype, shape, case_.strided ? &random_ : nullptr);
  }

  MappingCase case_;
  Random random_;
  int dim_ = 0;
  Index outer_shape_;
  StoredTensor alphas_, mask_;
};

// The bound of mapping.h, ε·(4 + 2·|log p|)·p + 4ε·max(1, range)·p^(2−α), taken at the larger of
// the two, because either may have been rounded to 0; and the rounding next to 0.
inline double ProbabilityBound(DType dtype, double alpha, double range, double got, double want) {
  const double p = std::max(got, want);
  const double rounding = RoundingNearZero(dtype);
  if (!(p > 0.0)) return rounding;
  const double epsilon = EpsilonOf(dtype);
  return epsilon * (4.0 + 2.0 * std::fabs(std::log(p))) * p +
         4.0 * epsilon * std::max(1.0, range) * std::pow(p, 2.0 - alpha) + rounding;
}

// Spread of the scores where p > 0.
inline double SupportRange(const std::vector<double>& scores, const std::vector<double>& p) {
  double low = std::numeric_limits<double>::infinity();
  double high = -low;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (!(p[i] > 0.0)) continue;
    low = std::min(low, scores[i]);
    high = std::max(high, scores[i]);
  }
  return high > low ? high - low : 0.0;
}

// Runs the forward pass on poisoned outputs and compares it with the reference. Returns what
// disagrees, one line each; empty if nothing does.
inline std::string ForwardDisagreement(const MappingCase& c, MappingProblem* problem) {
  Report report;
  if (const Status status = problem->RunForward(); !status.ok()) return status.message();
  for (const StoredTensor* tensor :
       {&problem->probabilities, &problem->threshold, &problem->support_size}) {
    if (!tensor->GapsAreIntact()) report.Add("wrote between the elements");
  }
  for (int64_t row = 0; row < problem->num_rows(); ++row) {
    const std::string where = "row " + std::to_string(row) + ' ';
    const std::vector<double> scores = problem->MaskedScores(row);
    const double alpha = problem->Alpha(row);
    const reference::MappedRow want = reference::MapRow(scores, c.kind, alpha, c.budget);
    const std::vector<double> got = problem->Row(problem->probabilities, row);
    const double range = SupportRange(scores, want.probability);
    const double shape_alpha = c.kind == MappingKind::kBudget ? 2.0 : alpha;
    const bool undefined = std::isnan(problem->threshold.Get(problem->RowIndex(row))) &&
                           std::isnan(want.threshold) && want.support_size == 0;
    double sum = 0.0;
    double unmasked = 0.0;
    double positive = 0.0;
    for (size_t i = 0; i < got.size(); ++i) {
      // In a row with NaN a masked entry may be 0 or NaN.
      if (undefined && scores[i] == -std::numeric_limits<double>::infinity()) continue;
      // The reference keeps the same bound in float64.
      const double bound =
          ProbabilityBound(c.dtype, shape_alpha, range, got[i], want.probability[i]);
      report.Expect(where + "probability " + std::to_string(i), got[i], want.probability[i],
                    c.dtype == DType::kFloat64 ? 2.0 * bound : bound);
      if (scores[i] == -std::numeric_limits<double>::infinity() && got[i] != 0.0) {
        report.Add(where + "masked entry " + std::to_string(i) + " is not 0");
      }
      if (got[i] < 0.0) report.Add(where + "entry " + std::to_string(i) + " is negative");
      sum += got[i];
      unmasked += scores[i] == -std::numeric_limits<double>::infinity() ? 0.0 : 1.0;
      positive += got[i] > 0.0 ? 1.0 : 0.0;
    }
    if (!undefined) {
      const double total = c.kind == MappingKind::kBudget ? std::min(c.budget, unmasked) : 1.0;
      const double n = static_cast<double>(got.size());
      // The budget mapping's probabilities are differences of scores, with their rounding.
      const double scale = c.kind == MappingKind::kBudget ? std::max({1.0, total, range}) : 1.0;
      report.Expect(where + "sum", sum, total,
                    n * (EpsilonOf(c.dtype) * scale + RoundingNearZero(c.dtype)));
    }
    report.Expect(where + "support_size", problem->support_size.Get(problem->RowIndex(row)),
                  positive, 0.0);
  }
  return report.text();
}

// τ against the reference, to the precision of its type and of the scores.
inline std::string ThresholdDisagreement(const MappingCase& c, const MappingProblem& problem) {
  Report report;
  for (int64_t row = 0; row < problem.num_rows(); ++row) {
    const std::vector<double> scores = problem.MaskedScores(row);
    const double alpha = problem.Alpha(row);
    const reference::MappedRow want = reference::MapRow(scores, c.kind, alpha, c.budget);
    const double got = problem.threshold.Get(problem.RowIndex(row));
    const std::string where = "row " + std::to_string(row) + ' ';
    double largest = 1.0;
    for (double score : scores) {
      if (std::isfinite(score)) largest = std::max(largest, std::fabs(score));
    }
    const double rounding = EpsilonOf(c.threshold_dtype) * std::fabs(want.threshold);
    if (c.kind == MappingKind::kBudget) {
      // With a gap in the scores more than one shift gives the same probabilities.
      for (size_t i = 0; i < scores.size(); ++i) {
        if (std::isnan(want.threshold) || scores[i] == -std::numeric_limits<double>::infinity()) {
          continue;
        }
        report.Expect(
            where + "clamp(s − threshold)", std::min(std::max(scores[i] - got, 0.0), 1.0),
            want.probability[i],
            EpsilonOf(c.threshold_dtype) * (largest + std::fabs(got)) + 32 * 0x1p-52 * largest);
      }
      continue;
    }
    // log Σ exp(s) is a sum in the precision of the probabilities, every other τ solved in double.
    const bool is_sum = c.kind == MappingKind::kEntmax && alpha == 1.0;
    const double precision = is_sum && c.dtype != DType::kFloat64 ? 0x1p-24 : 0x1p-52;
    const double factor = is_sum || c.kind != MappingKind::kEntmax ? 1.0 : std::fabs(alpha - 1.0);
    report.Expect(where + "threshold", got, want.threshold,
                  rounding + 64 * precision * (1.0 + std::fabs(want.threshold) + factor * largest));
  }
  return report.text();
}

// Runs the backward pass on the probabilities that the problem holds and compares it.
inline std::string BackwardDisagreement(const MappingCase& c, MappingProblem* problem) {
  Report report;
  if (const Status status = problem->RunBackward(); !status.ok()) return status.message();
  if (!problem->grad_scores.GapsAreIntact()) report.Add("wrote between the elements");
  for (int64_t row = 0; row < problem->num_rows(); ++row) {
    const std::string where = "row " + std::to_string(row) + ' ';
    const double alpha = problem->Alpha(row);
    const std::vector<double> p = problem->Row(problem->probabilities, row);
    const std::vector<double> g = problem->Row(problem->grad_probabilities, row);
    const reference::MappedRowGradient want = reference::MapRowBackward(p, g, c.kind, alpha);
    const std::vector<double> got = problem->Row(problem->grad_scores, row);
    // Every gradient is a factor times a difference of numbers no larger than the largest g.
    double largest = 0.0;
    double norm = 0.0;
    double weights = 0.0;
    double partials = 0.0;
    for (size_t i = 0; i < p.size(); ++i) {
      if (!(p[i] > 0.0)) continue;
      largest = std::max(largest, std::fabs(g[i]));
      norm += std::pow(p[i], alpha);
      partials += std::fabs(DeformedExpAlphaPartial(alpha, p[i]));
    }
    if (c.kind == MappingKind::kNormmax) {
      norm = std::pow(norm, (alpha - 1.0) / alpha) / (alpha - 1.0);
    }
    const auto weight = [&](double x) {
      if (c.kind == MappingKind::kBudget) return 1.0;
      return std::pow(x, 2.0 - alpha) * (c.kind == MappingKind::kNormmax ? norm : 1.0);
    };
    for (double x : p) {
      if (c.kind == MappingKind::kNormmax && x > 0.0) weights += weight(x);
    }
    for (size_t i = 0; i < p.size(); ++i) {
      const std::string entry = where + "grad_scores " + std::to_string(i);
      if (p[i] == 0.0) {
        report.Expect(entry, got[i], 0.0, 0.0);
        continue;
      }
      const double scale = largest * (weight(p[i]) + p[i] * weights);
      // A power costs as many last bits as its logarithm is large.
      const double bits = 8.0 + 4.0 * std::fabs((2.0 - alpha) * std::log(p[i]));
      report.Expect(entry, got[i], RoundTo(c.dtype, want.scores[i]),
                    bits * EpsilonOf(c.dtype) * scale + 2.0 * RoundingNearZero(c.dtype));
    }
    if (c.kind == MappingKind::kEntmax) {
      const double epsilon =
          std::max(EpsilonOf(c.threshold_dtype), c.dtype == DType::kFloat64 ? 0x1p-52 : 0x1p-23);
      report.Expect(where + "grad_alpha", problem->grad_alpha.Get(problem->RowIndex(row)),
                    want.alpha, 32.0 * epsilon * largest * partials + 1e-300);
    }
  }
  return report.text();
}

}  // namespace flash_entmax::testing

#endif  // FLASH_ENTMAX_TESTS_TESTING_MAPPING_CASE_H_
