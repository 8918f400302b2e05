// Operators of the mappings and of their losses, on the CPU.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "flash_entmax/loss.h"
#include "flash_entmax/mapping.h"
#include "tensors.h"

namespace flash_entmax::python {
namespace {

// `parameter` is α, or the budget. `kind` counts as MappingKind does; Python passes only those.
MappingOptions Options(int64_t kind, double parameter, const std::optional<Tensor>& alpha,
                       int64_t dim) {
  MappingOptions options;
  options.kind = static_cast<MappingKind>(kind);
  if (options.kind == MappingKind::kBudget) {
    options.budget = parameter;
  } else {
    options.alpha = parameter;
  }
  options.alpha_per_row = View("alpha", alpha);
  options.dim = static_cast<int>(
      std::clamp<int64_t>(dim, std::numeric_limits<int>::min(), std::numeric_limits<int>::max()));
  return options;
}

// The shape of one number a row: size 1 at `dim`.
std::vector<int64_t> RowShape(const Tensor& tensor, int64_t dim) {
  const auto sizes = tensor.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  const int64_t at = dim < 0 ? dim + tensor.dim() : dim;
  if (at >= 0 && at < tensor.dim()) shape[static_cast<size_t>(at)] = 1;
  return shape;
}

Tensor Mapping(Tensor scores, std::optional<Tensor> alpha, std::optional<Tensor> mask, int64_t kind,
               double parameter, int64_t dim) {
  MappingOptions options = Options(kind, parameter, alpha, dim);
  options.mask = View("mask", mask);
  Tensor probabilities = EmptyLike(scores);
  ThrowIfError(
      MappingForward(View("scores", scores), options, MutableView("probabilities", probabilities)));
  return probabilities;
}

std::tuple<Tensor, Tensor, Tensor> MappingWithStatistics(Tensor scores, std::optional<Tensor> alpha,
                                                         std::optional<Tensor> mask, int64_t kind,
                                                         double parameter, int64_t dim) {
  MappingOptions options = Options(kind, parameter, alpha, dim);
  options.mask = View("mask", mask);
  Tensor probabilities = EmptyLike(scores);
  Tensor threshold = Empty(scores, RowShape(scores, dim), StatisticsType(scores));
  Tensor support_size = Empty(scores, RowShape(scores, dim), ScalarType::Long);
  ThrowIfError(MappingForward(
      View("scores", scores), options, MutableView("probabilities", probabilities),
      {MutableView("threshold", threshold), MutableView("support_size", support_size)}));
  return {probabilities, threshold, support_size};
}

// The gradient in α is one number a row in the type of StatisticsType, or has no elements.
std::tuple<Tensor, Tensor> MappingGradient(Tensor probabilities, Tensor grad,
                                           std::optional<Tensor> alpha, int64_t kind,
                                           double parameter, int64_t dim, bool alpha_gradient) {
  const MappingOptions options = Options(kind, parameter, alpha, dim);
  Tensor grad_scores = EmptyLike(probabilities);
  Tensor grad_alpha = alpha_gradient ? Empty(probabilities, RowShape(probabilities, dim),
                                             StatisticsType(probabilities))
                                     : Empty(probabilities, {0}, StatisticsType(probabilities));
  ThrowIfError(MappingBackward(
      View("probabilities", probabilities), View("grad_probabilities", grad), options,
      MutableView("grad_scores", grad_scores),
      alpha_gradient ? MutableView("grad_alpha", grad_alpha) : MutableTensorView{}));
  return {grad_scores, grad_alpha};
}

// One loss a row, and the gradient of their sum.
std::tuple<Tensor, Tensor> Loss(Tensor scores, Tensor target, int64_t kind, double alpha,
                                int64_t ignore_index) {
  LossOptions options;
  options.kind = static_cast<MappingKind>(kind);
  options.alpha = alpha;
  options.ignore_index = ignore_index;
  options.reduction = Reduction::kNone;
  Tensor loss = Empty(scores, {scores.dim() > 0 ? scores.size(0) : 0}, StatisticsType(scores));
  Tensor grad = EmptyLike(scores);
  ThrowIfError(FenchelYoungLoss(View("scores", scores), View("target", target), options,
                                MutableView("loss", loss), MutableView("grad", grad)));
  return {loss, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flash_entmax, library) {
  // Each forward operator twice: the first gets a gradient in Python; the second is the bare
  // computation that it consists of.
  for (const char* schema :
       {"mapping(Tensor scores, Tensor? alpha, Tensor? mask, int kind, float parameter, int dim) "
        "-> Tensor",
        "mapping_forward(Tensor scores, Tensor? alpha, Tensor? mask, int kind, float parameter, "
        "int dim) -> Tensor",
        "fenchel_young_loss(Tensor scores, Tensor target, int kind, float alpha, "
        "int ignore_index) -> (Tensor, Tensor)",
        "fenchel_young_loss_forward(Tensor scores, Tensor target, int kind, float alpha, "
        "int ignore_index) -> (Tensor, Tensor)"}) {
    library.def(schema);
  }
  library.def(
      "mapping_with_statistics(Tensor scores, Tensor? alpha, Tensor? mask, int kind, "
      "float parameter, int dim) -> (Tensor, Tensor, Tensor)");
  library.def(
      "mapping_backward(Tensor probabilities, Tensor grad, Tensor? alpha, int kind, "
      "float parameter, int dim, bool alpha_gradient) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(flash_entmax, CPU, library) {
  library.impl("mapping", TORCH_BOX(&Mapping));
  library.impl("mapping_forward", TORCH_BOX(&Mapping));
  library.impl("mapping_with_statistics", TORCH_BOX(&MappingWithStatistics));
  library.impl("mapping_backward", TORCH_BOX(&MappingGradient));
  library.impl("fenchel_young_loss", TORCH_BOX(&Loss));
  library.impl("fenchel_young_loss_forward", TORCH_BOX(&Loss));
}

}  // namespace flash_entmax::python
