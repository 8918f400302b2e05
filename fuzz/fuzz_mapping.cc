// Any views as arguments of mappings and losses: an error, or a run that writes nothing but its
// outputs.

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "flash_entmax/loss.h"
#include "flash_entmax/mapping.h"
#include "view_builder.h"

namespace flash_entmax::fuzz {
namespace {

// Runs `call`, which may write the given views if it succeeds.
template <typename Call>
void Expect(ViewBuilder& views, const std::vector<MutableTensorView>& written, const Call& call) {
  const bool broken = views.broken();
  views.Remember();
  // What a broken view describes cannot be marked; it must not be written at all.
  if (!broken) {
    for (const MutableTensorView& view : written) views.Allow(view);
  }
  const Status status = call();
  if (broken && status.ok()) std::abort();
  if (!status.ok() && status.message().empty()) std::abort();
  if (!views.OnlyAllowedBytesChanged()) std::abort();
}

void Run(FuzzedDataProvider& input) {
  ViewBuilder views(input);
  const auto some = [&input] { return input.ConsumeIntegralInRange(0, 3) == 0; };
  std::vector<int64_t> shape(input.ConsumeIntegralInRange<size_t>(0, 4));
  for (int64_t& size : shape) size = input.ConsumeIntegralInRange<int64_t>(0, 5);
  MappingOptions options;
  options.kind = static_cast<MappingKind>(input.ConsumeIntegralInRange(0, 2));
  options.alpha = some() ? views.AnyDouble() : 1.5;
  options.budget = some() ? views.AnyDouble() : 1.0;
  options.dim = some() ? input.ConsumeIntegralInRange(-10, 10) : -1;
  options.num_threads = 1;
  std::vector<int64_t> row_shape = shape;
  const int rank = static_cast<int>(shape.size());
  const int dim = options.dim < 0 ? options.dim + rank : options.dim;
  if (dim >= 0 && dim < rank) row_shape[static_cast<size_t>(dim)] = 1;
  const DType dtype = views.FloatingType();

  switch (input.ConsumeIntegralInRange(0, 3)) {
    case 0: {
      if (some()) options.alpha_per_row = views.View(DType::kFloat64, row_shape).view();
      if (some()) options.mask = views.View(DType::kUInt8, shape).view();
      const MutableTensorView scores = views.View(dtype, shape);
      const MutableTensorView probabilities = some() ? scores : views.View(dtype, shape);
      MappingExtras extras;
      if (some()) extras.threshold = views.View(DType::kFloat32, row_shape);
      if (some()) extras.support_size = views.View(DType::kInt32, row_shape);
      Expect(views, {probabilities, extras.threshold, extras.support_size},
             [&] { return MappingForward(scores.view(), options, probabilities, extras); });
      break;
    }
    case 1: {
      if (some()) options.alpha_per_row = views.View(DType::kFloat64, row_shape).view();
      const TensorView probabilities = views.View(dtype, shape).view();
      const TensorView grad = views.View(dtype, shape).view();
      const MutableTensorView grad_scores = views.View(dtype, shape);
      MutableTensorView grad_alpha;
      if (some()) grad_alpha = views.View(DType::kFloat64, row_shape);
      Expect(views, {grad_scores, grad_alpha}, [&] {
        return MappingBackward(probabilities, grad, options, grad_scores, grad_alpha);
      });
      break;
    }
    case 2: {
      const TensorView probabilities = views.View(dtype, shape).view();
      Expect(views, {}, [&] { return MappingSupport(probabilities, options.dim).status(); });
      break;
    }
    default: {
      LossOptions loss_options;
      loss_options.kind = options.kind;
      loss_options.alpha = options.alpha;
      loss_options.reduction = static_cast<Reduction>(input.ConsumeIntegralInRange(0, 2));
      loss_options.num_threads = 1;
      shape.resize(2, 2);
      const TensorView scores = views.View(dtype, shape).view();
      const TensorView target = views.View(DType::kInt64, {shape[0]}).view();
      const bool per_row = loss_options.reduction == Reduction::kNone;
      const MutableTensorView loss = views.View(
          DType::kFloat64, per_row ? std::vector<int64_t>{shape[0]} : std::vector<int64_t>{});
      MutableTensorView grad;
      if (some()) grad = views.View(dtype, shape);
      Expect(views, {loss, grad},
             [&] { return FenchelYoungLoss(scores, target, loss_options, loss, grad); });
      break;
    }
  }
}

}  // namespace
}  // namespace flash_entmax::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzedDataProvider input(data, size);
  flash_entmax::fuzz::Run(input);
  return 0;
}
