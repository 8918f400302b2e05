#include "check/mapping_problem.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "check/precision.h"
#include "flash_entmax/loss.h"
#include "math/deformed_exp.h"
#include "math/element.h"
#include "random.h"

namespace flash_entmax::cli {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

constexpr DType kTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr double kAlphas[] = {0.5, 0.8, 1.0, 1.01, 1.25, 4.0 / 3.0, 1.5, 1.5, 2.0, 2.0, 2.5, 4.0};
constexpr double kSpreads[] = {0.01, 1.0, 4.0, 20.0};

constexpr int64_t kMaxRows = 4;
constexpr int64_t kMaxSize = 500;

// One row of a [rows, size] tensor.
std::vector<double> ReadRow(const TensorView& tensor, int64_t row) {
  std::vector<double> values;
  for (int64_t i = 0; i < tensor.shape[1]; ++i) {
    values.push_back(ReadElement(tensor, row * tensor.strides[0] + i * tensor.strides[1]));
  }
  return values;
}

double LargestMagnitude(const std::vector<double>& values) {
  double largest = 0.0;
  for (const double x : values) {
    if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
  }
  return largest;
}

template <typename T, size_t N>
const T& Pick(bench::Random& random, const T (&choices)[N]) {
  return choices[static_cast<size_t>(random.Integer(0, int64_t{N} - 1))];
}

}  // namespace

Expected<MappingProblem> MappingProblem::Make(uint64_t seed, int64_t number) {
  bench::Random random(seed ^ (static_cast<uint64_t>(number) * 0x9E3779B97F4A7C15u + 1));
  MappingProblem problem;
  problem.number_ = number;
  problem.dtype_ = Pick(random, kTypes);
  problem.rows_ = random.Integer(1, kMaxRows);
  problem.size_ = random.Integer(1, random.Chance(0.5) ? 20 : kMaxSize);
  MappingOptions& options = problem.options_;
  options.alpha = random.Chance(0.2) ? random.Uniform(1.05, 3.0) : Pick(random, kAlphas);
  const double which = random.Uniform();
  if (which < 0.15) {
    options.kind = MappingKind::kNormmax;
    options.alpha = std::max(options.alpha, 1.25);
  } else if (which < 0.3) {
    options.kind = MappingKind::kBudget;
    options.budget = random.Uniform(0.1, static_cast<double>(problem.size_));
  }

  Expected<OwnedTensor> tensors[3] = {Status(), Status(), Status()};
  for (auto& tensor : tensors) {
    tensor = OwnedTensor::Allocate("check", problem.dtype_, {problem.rows_, problem.size_});
    if (!tensor.ok()) return tensor.status();
  }
  problem.scores_ = std::move(tensors[0]).value();
  problem.probability_ = std::move(tensors[1]).value();
  problem.grad_probability_ = std::move(tensors[2]).value();

  const double spread = Pick(random, kSpreads);
  const bool ties = random.Chance(0.2);
  const double hidden = random.Chance(0.2) ? 0.3 : 0.0;
  // One NaN or +∞ makes its row NaN and must not touch the others.
  const int64_t poisoned = hidden == 0.0 && random.Chance(0.1)
                               ? random.Integer(0, problem.rows_ * problem.size_ - 1)
                               : -1;
  for (int64_t i = 0; i < problem.rows_ * problem.size_; ++i) {
    double score = spread * random.Gauss();
    if (ties) score = std::round(2.0 * score) / 2.0;
    if (random.Chance(hidden)) score = -kInfinity;
    if (i == poisoned) score = random.Chance(0.5) ? kInfinity : std::nan("");
    WriteElement(problem.scores_.mutable_view(), i, score);
    WriteElement(problem.grad_probability_.mutable_view(), i, random.Gauss());
  }
  for (int64_t row = 0; row < problem.rows_; ++row) {
    const std::vector<double> scores = ReadRow(problem.scores_.view(), row);
    problem.mapped_.push_back(
        reference::MapRow(scores, options.kind, options.alpha, options.budget));
    const std::vector<double>& p = problem.mapped_.back().probability;
    double low = kInfinity;
    double high = -kInfinity;
    double slope_sum = 0.0;
    for (int64_t i = 0; i < problem.size_; ++i) {
      const double probability = p[static_cast<size_t>(i)];
      WriteElement(problem.probability_.mutable_view(), row * problem.size_ + i, probability);
      if (!(probability > 0.0)) continue;
      slope_sum += options.kind == MappingKind::kBudget
                       ? (probability < 1.0 ? 1.0 : 0.0)
                       : std::pow(probability, 2.0 - options.alpha);
      low = std::min(low, scores[static_cast<size_t>(i)]);
      high = std::max(high, scores[static_cast<size_t>(i)]);
    }
    problem.slope_sum_.push_back(std::max(slope_sum, 1e-300));
    problem.score_range_.push_back(low < high ? std::max(1.0, high - low) : 1.0);
    problem.largest_score_.push_back(std::max(1.0, LargestMagnitude(scores)));
    problem.gradients_.push_back(reference::MapRowBackward(
        ReadRow(problem.probability_.view(), row), ReadRow(problem.grad_probability_.view(), row),
        options.kind, options.alpha));
    problem.targets_.push_back(random.Integer(0, problem.size_ - 1));
    if (options.kind != MappingKind::kBudget) {
      problem.losses_.push_back(reference::FenchelYoungLoss(scores, problem.targets_.back(),
                                                            options.kind, options.alpha));
    }
  }
  return problem;
}

std::string MappingProblem::Describe() const {
  const std::string shape = fmt::format("[{}, {}]", rows_, size_);
  switch (options_.kind) {
    case MappingKind::kNormmax:
      return fmt::format("normmax {} {}, alpha {}", flash_entmax::NameOf(dtype_), shape,
                         options_.alpha);
    case MappingKind::kBudget:
      return fmt::format("budget {} {}, budget {}", flash_entmax::NameOf(dtype_), shape,
                         options_.budget);
    default:
      return fmt::format("entmax {} {}, alpha {}", flash_entmax::NameOf(dtype_), shape,
                         options_.alpha);
  }
}

void MappingProblem::Note(ErrorTable& errors, const char* what, double actual, double expected,
                          double bound) const {
  // Where the result has to be NaN or infinite, it has to be just that.
  const bool same =
      actual == RoundTo(dtype_, expected) || (std::isnan(actual) && std::isnan(expected));
  errors.Record(what, flash_entmax::NameOf(dtype_), same ? 0.0 : std::abs(actual - expected),
                same || std::isnan(expected) ? 0.0 : bound, number_);
}

// The bound of mapping.h; at the edge of the support, where its derivative ends, the exact change.
// To that comes what both sides' sums over the support cannot know, being sums in double.
double MappingProblem::ProbabilityBound(int64_t row, double p, double epsilon) const {
  const auto r = static_cast<size_t>(row);
  const double alpha = options_.kind == MappingKind::kBudget ? 2.0 : options_.alpha;
  const double shift = 4.0 * epsilon * score_range_[r];
  if (std::isnan(p)) return 0.0;
  double linear = 0.0;
  double sum_error = 0.0;
  if (p > 0.0) {
    const double slope = std::pow(p, 2.0 - alpha);
    linear = epsilon * (4.0 + 2.0 * std::abs(std::log(p))) * p + shift * slope;
    const double sum = options_.kind == MappingKind::kBudget ? std::max(1.0, options_.budget) : 1.0;
    sum_error =
        slope / slope_sum_[r] * sum * 0x1p-52 * static_cast<double>(mapped_[r].support_size);
  }
  double bound = std::max(linear, ProbabilityShift(p, alpha, shift)) + sum_error;
  if (options_.kind == MappingKind::kNormmax) {
    // Normmax divides by a sum, so that what the edge of the support is uncertain of reaches all.
    for (const double other : mapped_[r].probability) {
      bound += p * ProbabilityShift(other, alpha, 4.0 * 0x1p-52 * score_range_[r]);
    }
  }
  return bound + SmallestOf(dtype_);
}

Status MappingProblem::CompareMapping(int threads, ErrorTable& errors) const {
  MappingOptions options = options_;
  options.num_threads = threads;
  const std::vector<int64_t> shape = {rows_, size_};
  Expected<OwnedTensor> result = OwnedTensor::Allocate("check", dtype_, shape);
  if (!result.ok()) return result.status();
  Expected<OwnedTensor> support_size = OwnedTensor::Allocate("check", DType::kInt64, {rows_, 1});
  if (!support_size.ok()) return support_size.status();
  Expected<OwnedTensor> grad_alpha = OwnedTensor::Allocate("check", DType::kFloat64, {rows_, 1});
  if (!grad_alpha.ok()) return grad_alpha.status();

  MappingExtras extras;
  extras.support_size = support_size->mutable_view();
  Status status = MappingForward(scores_.view(), options, result->mutable_view(), extras);
  if (!status.ok()) return status;
  const double epsilon = EpsilonOf(dtype_);
  for (int64_t row = 0; row < rows_; ++row) {
    const auto r = static_cast<size_t>(row);
    const std::vector<double> actual = ReadRow(result->view(), row);
    for (size_t i = 0; i < actual.size(); ++i) {
      const double expected = mapped_[r].probability[i];
      Note(errors, "mapping forward", actual[i], expected,
           ProbabilityBound(row, expected, epsilon));
    }
  }

  const bool with_alpha = options.kind == MappingKind::kEntmax;
  status = MappingBackward(probability_.view(), grad_probability_.view(), options,
                           result->mutable_view(),
                           with_alpha ? grad_alpha->mutable_view() : MutableTensorView());
  if (!status.ok()) return status;
  for (int64_t row = 0; row < rows_; ++row) {
    const auto r = static_cast<size_t>(row);
    const std::vector<double> actual = ReadRow(result->view(), row);
    const std::vector<double> p = ReadRow(probability_.view(), row);
    const double largest = LargestMagnitude(ReadRow(grad_probability_.view(), row));
    for (size_t i = 0; i < actual.size(); ++i) {
      const double expected = gradients_[r].scores[i];
      // How strongly the entry's probability answers to its score, times the largest gradient: the
      // size of the two terms whose difference the gradient is.
      double weight = p[i] > 0.0 ? 1.0 : 0.0;
      if (options.kind != MappingKind::kBudget && p[i] > 0.0) {
        // A power computed as exp(log) has an error in proportion to the logarithm.
        weight = std::pow(p[i], 2.0 - options.alpha) * (1.0 - 0.25 * std::log(p[i]));
        if (options.kind == MappingKind::kNormmax) weight /= options.alpha - 1.0;
      }
      Note(errors, "mapping backward", actual[i], expected,
           8.0 * epsilon * (std::abs(expected) + weight * largest) + 2.0 * SmallestOf(dtype_));
    }
    if (!with_alpha) continue;
    // The gradient is a sum of each entry's own derivative in α times a difference of gradients,
    // powers again with errors in proportion to the logarithm. Half precisions and float32 are
    // computed in float32.
    double size = 0.0;
    for (const double x : p) {
      if (!(x > 0.0)) continue;
      const double terms = x * (1.0 + std::log(x) * std::log(x));
      size += (terms + std::abs(DeformedExpAlphaPartial(options.alpha, x))) *
              (1.0 - 0.25 * std::log(x));
    }
    const double compute = std::min(epsilon, 0x1p-23);
    Note(errors, "gradient in alpha", ReadElement(grad_alpha->view(), row), gradients_[r].alpha,
         8.0 * compute * largest * size);
  }
  return Status::Ok();
}

Status MappingProblem::CompareLoss(int threads, ErrorTable& errors) const {
  if (losses_.empty()) return Status::Ok();
  LossOptions options;
  options.kind = options_.kind;
  options.alpha = options_.alpha;
  options.reduction = Reduction::kNone;
  options.num_threads = threads;
  Expected<OwnedTensor> loss = OwnedTensor::Allocate("check", DType::kFloat64, {rows_});
  if (!loss.ok()) return loss.status();
  Expected<OwnedTensor> grad = OwnedTensor::Allocate("check", dtype_, {rows_, size_});
  if (!grad.ok()) return grad.status();
  Status status = FenchelYoungLoss(scores_.view(),
                                   TensorView::Contiguous(targets_.data(), DType::kInt64, {rows_}),
                                   options, loss->mutable_view(), grad->mutable_view());
  if (!status.ok()) return status;
  for (int64_t row = 0; row < rows_; ++row) {
    const auto r = static_cast<size_t>(row);
    Note(errors, "loss", ReadElement(loss->view(), row), losses_[r].loss,
         1e-12 * largest_score_[r]);
    const std::vector<double> actual = ReadRow(grad->view(), row);
    for (size_t i = 0; i < actual.size(); ++i) {
      const double expected = losses_[r].grad[i];
      Note(errors, "loss gradient", actual[i], expected,
           EpsilonOf(dtype_) * std::abs(expected) +
               ProbabilityBound(row, mapped_[r].probability[i], 0x1p-52));
    }
  }
  return Status::Ok();
}

Status MappingProblem::Compare(int threads, ErrorTable& errors) const {
  if (Status status = CompareMapping(threads, errors); !status.ok()) return status;
  return CompareLoss(threads, errors);
}

}  // namespace flash_entmax::cli
