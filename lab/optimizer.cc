#include "optimizer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

namespace flash_entmax::lab {

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
          1.0 / (1.0 - std::pow(training.beta2, count)), rate * training.weight_decay};
}

double AdamStep(const TrainingConfig& training, int64_t step, at::Tensor gradient,
                TrainingState* state) {
  const at::NoGradGuard no_gradient;
  const double norm = gradient.norm().item<double>();
  if (norm > training.clip) gradient = gradient * (training.clip / norm);
  const StepRates rates = RatesOfStep(training, step);
  state->first_moment.mul_(training.beta1).add_(gradient, 1.0 - training.beta1);
  state->second_moment.mul_(training.beta2).addcmul_(gradient, gradient, 1.0 - training.beta2);
  const at::Tensor root = (state->second_moment * rates.second).sqrt_().add_(kAdamEpsilon);
  if (rates.decay > 0.0) state->parameters.mul_(1.0 - rates.decay);
  state->parameters.addcdiv_(state->first_moment, root, -rates.rate);
  return norm;
}

}  // namespace flash_entmax::lab
