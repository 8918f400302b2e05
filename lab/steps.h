// Training steps, one after the other or as a replayed graph.

#ifndef FLASH_ENTMAX_LAB_STEPS_H_
#define FLASH_ENTMAX_LAB_STEPS_H_

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "batch.h"
#include "config.h"
#include "model.h"
#include "optimizer.h"

namespace flash_entmax::lab {

struct StepResult {
  double loss = 0.0;
  double gradient_norm = 0.0;  // before clipping
};

class Stepper {
 public:
  virtual ~Stepper() = default;
  // Runs the steps first … first + count − 1, which change the state given to the factory.
  virtual std::vector<StepResult> Run(int64_t first, int64_t count) = 0;
  // How many steps a call should be given for speed.
  virtual int64_t preferred_count() const = 0;
};

// Mean cross entropy over the labels that are not padding. `parameters` is of the compute type.
at::Tensor Loss(const Model& model, const at::Tensor& parameters, const at::Tensor& tokens,
                const at::Tensor& index, const at::Tensor& labels);

// The state's tensors stay where they are and are updated in place; all arguments outlive the
// result. On a GPU a step is captured as a graph.
std::unique_ptr<Stepper> MakeStepper(const Task& task, const RunConfig& run, const Model& model,
                                     TrainingState* state);

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_STEPS_H_
