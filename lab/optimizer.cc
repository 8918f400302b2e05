#include "optimizer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

namespace flash_entmax::lab {

void TrainingState::Round() {
  const at::NoGradGuard no_gradient;
  for (at::Tensor* tensor : {&parameters, &first_moment, &second_moment}) {
    tensor->copy_(tensor->to(at::kBFloat16));
  }
}

at::ScalarType ComputeType(Precision precision) {
  return precision == Precision::kFloat32 ? at::kFloat : at::kBFloat16;
}

double LearningRate(const TrainingConfig& training, int64_t step) {
  if (step < training.warmup) {
    return training.learning_rate * static_cast<double>(step + 1) /
           static_cast<double>(training.warmup);
  }
  const auto rest = static_cast<double>(std::max<int64_t>(1, training.steps - training.warmup));
  const double done = std::min(1.0, static_cast<double>(step - training.warmup) / rest);
  const double cosine = 0.5 * (1.0 + std::cos(3.141592653589793 * done));
  return training.learning_rate * (training.final_rate + (1.0 - training.final_rate) * cosine);
}

StepRates RatesOfStep(const TrainingConfig& training, int64_t step) {
  const auto count = static_cast<double>(step + 1);
  const double rate = LearningRate(training, step);
  return {rate / (1.0 - std::pow(training.beta1, count)),
          1.0 / (1.0 - std::pow(training.beta2, count)), rate * training.weight_decay,
          training.muon_rate * rate / std::max(training.learning_rate, 1e-300)};
}

double OptimizerStep(const TrainingConfig& training, int64_t step,
                     const std::vector<HiddenMatrix>& matrices, at::Tensor gradient,
                     TrainingState* state) {
  const at::NoGradGuard no_gradient;
  const double norm = gradient.norm().item<double>();
  if (norm > training.clip) gradient = gradient * (training.clip / norm);
  const StepRates rates = RatesOfStep(training, step);
  std::vector<HiddenMatrix> taken;
  if (training.optimizer == Optimizer::kMuon) taken = matrices;
  for (const ParameterRange& range : OtherRanges(taken, gradient.numel())) {
    const auto part = [&](const at::Tensor& flat) {
      return flat.narrow(0, range.offset, range.size);
    };
    const at::Tensor g = part(gradient), parameters = part(state->parameters);
    const at::Tensor first = part(state->first_moment), second = part(state->second_moment);
    first.mul_(training.beta1).add_(g, 1.0 - training.beta1);
    second.mul_(training.beta2).addcmul_(g, g, 1.0 - training.beta2);
    const at::Tensor root = (second * rates.second).sqrt_().add_(kAdamEpsilon);
    if (rates.decay > 0.0) parameters.mul_(1.0 - rates.decay);
    parameters.addcdiv_(first, root, -rates.rate);
  }
  if (!taken.empty()) {
    MuonStep(taken, gradient, at::full({}, rates.muon, gradient.options().dtype(at::kFloat)),
             state->first_moment, state->parameters);
  }
  if (training.precision == Precision::kBFloat16True) state->Round();
  return norm;
}

}  // namespace flash_entmax::lab
