// AdamW on one flat tensor, or Muon for the matrices in it and AdamW for the rest, with linear
// warm-up, cosine decay and clipping by the norm.

#ifndef FLASH_ENTMAX_LAB_OPTIMIZER_H_
#define FLASH_ENTMAX_LAB_OPTIMIZER_H_

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <vector>

#include "config.h"
#include "muon.h"

namespace flash_entmax::lab {

// Everything that training carries from one step to the next, besides the step's number.
struct TrainingState {
  at::Tensor parameters;     // [num_parameters] float32
  at::Tensor first_moment;   // like parameters
  at::Tensor second_moment;  // like parameters

  // Every number to the nearest bfloat16: Precision::kBFloat16True.
  void Round();
};

// The type of products and activations.
at::ScalarType ComputeType(Precision precision);

inline constexpr double kAdamEpsilon = 1e-8;

// The learning rate of a step, counted from 0.
double LearningRate(const TrainingConfig& training, int64_t step);

// The numbers of a step's update (Kingma & Ba 2015; Loshchilov & Hutter 2019):
//   m ← β1·m + (1 − β1)·g,  v ← β2·v + (1 − β2)·g²,
//   w ← w·(1 − decay) − rate·m / (√(v·second) + ε).
struct StepRates {
  double rate = 0.0;    // learning rate / (1 − β1^t)
  double second = 1.0;  // 1 / (1 − β2^t)
  double decay = 0.0;   // learning rate · weight decay
  double muon = 0.0;    // muon.h: rate
};
StepRates RatesOfStep(const TrainingConfig& training, int64_t step);

// One step. `matrices`: those of the model (Model::HiddenMatrices), which Muon takes if it is the
// optimizer. Scales `gradient` down to the norm training.clip if it is longer; returns its norm
// before that.
double OptimizerStep(const TrainingConfig& training, int64_t step,
                     const std::vector<HiddenMatrix>& matrices, at::Tensor gradient,
                     TrainingState* state);

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_OPTIMIZER_H_
