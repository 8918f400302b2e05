// Argument checks of the Fenchel–Young losses, and their rows.

#include "flash_entmax/loss.h"

#include <cmath>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "cpu/mapping_rows.h"
#include "cpu/parallel.h"
#include "math/element.h"
#include "views.h"

namespace flash_entmax {
namespace {

constexpr int64_t kElementsPerPiece = 1 << 14;

// H(p) of loss.h.
double Entropy(const std::vector<double>& p, MappingKind kind, double alpha) {
  const double m = alpha - 1.0;
  double sum = 0.0;
  if (kind == MappingKind::kNormmax) {
    for (const double x : p) sum += x > 0.0 ? std::pow(x, alpha) : 0.0;
    return 1.0 - std::pow(sum, 1.0 / alpha);
  }
  for (const double x : p) {
    if (!(x > 0.0)) continue;
    const double log_p = std::log(x);
    // (p − p^α)/m = −p·(p^m − 1)/m, which tends to −p·log p as α → 1 without cancellation.
    sum -= x * (m == 0.0 ? log_p : std::expm1(m * log_p) / m);
  }
  return sum / alpha;
}

struct LossRowInput {
  std::vector<double> scores;
  std::vector<double> probability;
  cpu::RowScratch<double> scratch;
};

// L(s; y) for the row in `input`; leaves p − e_y in input.probability.
double LossOfRow(LossRowInput* input, int64_t target, const cpu::RowMapping& mapping) {
  const std::vector<double>& s = input->scores;
  std::vector<double>& p = input->probability;
  const auto n = static_cast<int64_t>(s.size());
  const cpu::RowResult result =
      cpu::MapRow<double>(s.data(), n, mapping, p.data(), &input->scratch);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  if (std::isnan(result.threshold)) {
    std::fill(p.begin(), p.end(), nan);
    return nan;
  }
  const double entropy = Entropy(p, mapping.kind, mapping.alpha);
  const double target_score = s[static_cast<size_t>(target)];
  double inner = 0.0;  // (p − e_y)·s, summed as differences from s_y, which are small near L = 0.
  for (size_t i = 0; i < s.size(); ++i) {
    if (p[i] > 0.0) inner += p[i] * (s[i] - target_score);
  }
  p[static_cast<size_t>(target)] -= 1.0;
  return std::max(0.0, inner + entropy);
}

Status CheckLossArguments(const TensorView& scores, const TensorView& target,
                          const LossOptions& options, const MutableTensorView& loss,
                          const MutableTensorView& grad) {
  if (!IsFloating(scores.dtype)) {
    return BadArgument("scores", NameOf(scores.dtype), "float64, float32, bfloat16 or float16");
  }
  if (scores.rank != 2 || scores.shape[1] < 1) {
    return BadArgument("scores", "shape " + ShapeToString(scores),
                       "[rows, classes] with at least one class");
  }
  if (Status status = CheckView("scores", scores); !status.ok()) return status;
  const int64_t rows = scores.shape[0];
  if (target.dtype != DType::kInt64) {
    return BadArgument("target", NameOf(target.dtype), "int64");
  }
  if (target.rank != 1 || target.shape[0] != rows) {
    return BadArgument("target", "shape " + ShapeToString(target),
                       "[" + std::to_string(rows) + "]");
  }
  if (Status status = CheckView("target", target); !status.ok()) return status;
  const bool entmax = options.kind == MappingKind::kEntmax;
  if (!entmax && options.kind != MappingKind::kNormmax) {
    return BadArgument("kind", "kBudget", "kEntmax or kNormmax");
  }
  if (!(std::isfinite(options.alpha) && options.alpha > (entmax ? 0.0 : 1.0))) {
    return BadArgument("alpha", Number(options.alpha),
                       entmax ? "finite and > 0" : "finite and > 1 for normmax");
  }
  if (options.num_threads < 0) {
    return BadArgument("num_threads", std::to_string(options.num_threads), "≥ 0");
  }
  if (loss.dtype != DType::kFloat32 && loss.dtype != DType::kFloat64) {
    return BadArgument("loss", NameOf(loss.dtype), "float32 or float64");
  }
  const TensorView loss_view = loss.view();
  const bool per_row = options.reduction == Reduction::kNone;
  const bool shape_fits = per_row ? loss.rank == 1 && loss.shape[0] == rows
                                  : loss.rank == 0 || (loss.rank == 1 && loss.shape[0] == 1);
  if (!shape_fits) {
    return BadArgument("loss", "shape " + ShapeToString(loss_view),
                       per_row ? "[" + std::to_string(rows) + "]" : "[] or [1]");
  }
  if (Status status = CheckWritable("loss", loss); !status.ok()) return status;
  if (Status status = CheckDisjoint("loss", loss_view, "scores", scores); !status.ok()) {
    return status;
  }
  if (grad) {
    const TensorView view = grad.view();
    if (grad.dtype != scores.dtype) {
      return BadArgument("grad", NameOf(grad.dtype),
                         std::string("of the type of scores, ") + NameOf(scores.dtype));
    }
    if (grad.rank != 2 || grad.shape[0] != rows || grad.shape[1] != scores.shape[1]) {
      return BadArgument("grad", "shape " + ShapeToString(view),
                         "that of scores, " + ShapeToString(scores));
    }
    for (const Status& status :
         {CheckWritable("grad", grad), CheckDisjoint("grad", view, "scores", scores),
          CheckDisjoint("grad", view, "target", target),
          CheckDisjoint("grad", view, "loss", loss_view)}) {
      if (!status.ok()) return status;
    }
  }
  const auto* targets = static_cast<const int64_t*>(target.data);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t y = targets[row * target.strides[0]];
    if (y != options.ignore_index && (y < 0 || y >= scores.shape[1])) {
      return BadArgument("target", std::to_string(y) + " in row " + std::to_string(row),
                         "ignore_index (" + std::to_string(options.ignore_index) + ") or in [0, " +
                             std::to_string(scores.shape[1] - 1) + "]");
    }
  }
  return Status::Ok();
}

}  // namespace

Status FenchelYoungLoss(const TensorView& scores, const TensorView& target,
                        const LossOptions& options, const MutableTensorView& loss,
                        const MutableTensorView& grad) {
  if (Status status = CheckLossArguments(scores, target, options, loss, grad); !status.ok()) {
    return status;
  }
  const int64_t rows = scores.shape[0];
  const int64_t classes = scores.shape[1];
  const auto* targets = static_cast<const int64_t*>(target.data);
  int64_t counted = 0;
  for (int64_t row = 0; row < rows; ++row) {
    counted += targets[row * target.strides[0]] != options.ignore_index;
  }
  const double factor = options.reduction == Reduction::kMean && counted > 0
                            ? 1.0 / static_cast<double>(counted)
                            : 1.0;
  try {
    std::vector<double> row_loss(static_cast<size_t>(rows), 0.0);
    std::vector<LossRowInput> threads(static_cast<size_t>(cpu::ThreadCount(options.num_threads)));
    for (LossRowInput& input : threads) {
      input.scores.resize(static_cast<size_t>(classes));
      input.probability.resize(static_cast<size_t>(classes));
      input.scratch.candidates.resize(static_cast<size_t>(classes) + 256);
    }
    const cpu::RowMapping mapping{options.kind, options.alpha, 1.0};
    const auto run_row = [&](int64_t row, LossRowInput* input) {
      const int64_t y = targets[row * target.strides[0]];
      const bool ignored = y == options.ignore_index;
      if (!ignored) {
        for (int64_t i = 0; i < classes; ++i) {
          input->scores[static_cast<size_t>(i)] =
              ReadElement(scores, row * scores.strides[0] + i * scores.strides[1]);
        }
        row_loss[static_cast<size_t>(row)] = LossOfRow(input, y, mapping);
      }
      if (!grad) return;
      for (int64_t i = 0; i < classes; ++i) {
        const double value = ignored ? 0.0 : factor * input->probability[static_cast<size_t>(i)];
        WriteElement(grad, row * grad.strides[0] + i * grad.strides[1], value);
      }
    };
    cpu::ParallelFor(rows, std::max<int64_t>(1, kElementsPerPiece / classes), options.num_threads,
                     [&](int64_t first, int64_t last, int thread) {
                       for (int64_t row = first; row < last; ++row) {
                         run_row(row, &threads[static_cast<size_t>(thread)]);
                       }
                     });
    if (options.reduction == Reduction::kNone) {
      for (int64_t row = 0; row < rows; ++row) {
        WriteElement(loss, row * loss.strides[0], row_loss[static_cast<size_t>(row)]);
      }
      return Status::Ok();
    }
    double total = 0.0;  // In row order, whatever the threads did.
    for (const double value : row_loss) total += value;
    WriteElement(loss, 0, total * factor);
  } catch (const std::bad_alloc&) {
    return Status::OutOfMemory("scores: no memory for " + std::to_string(rows) + " losses and " +
                               std::to_string(classes) + " classes in every thread");
  }
  return Status::Ok();
}

}  // namespace flash_entmax
