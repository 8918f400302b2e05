#include "steps.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#ifdef FLASH_ENTMAX_LAB_CUDA
#include "cuda/graph.h"
#endif

namespace flash_entmax::lab {
namespace {

at::Tensor AsTensor(const std::vector<int64_t>& values, int64_t rows, int64_t columns) {
  return at::from_blob(const_cast<int64_t*>(values.data()), {rows, columns}, at::kLong);
}

class PlainStepper final : public Stepper {
 public:
  PlainStepper(const Task& task, const RunConfig& run, const Model& model, TrainingState* state)
      : task_(task), run_(run), model_(model), matrices_(model.HiddenMatrices()), state_(state) {}

  std::vector<StepResult> Run(int64_t first, int64_t count) override {
    std::vector<StepResult> results;
    const at::Device device = state_->parameters.device();
    const at::ScalarType compute = ComputeType(run_.training.precision);
    for (int64_t step = first; step < first + count; ++step) {
      const Batch batch = TrainingBatch(task_, run_, step, false);
      const at::Tensor leaf =
          state_->parameters.detach().to(compute, /*non_blocking=*/false, /*copy=*/true);
      leaf.set_requires_grad(true);
      const at::Tensor loss =
          Loss(model_, leaf, AsTensor(batch.tokens, batch.rows, batch.tokens_per_row).to(device),
               AsTensor(batch.index, batch.rows, batch.targets_per_row).view({-1}).to(device),
               AsTensor(batch.labels, batch.rows, batch.targets_per_row).view({-1}).to(device));
      at::Tensor gradient = torch::autograd::grad({loss}, {leaf})[0].to(at::kFloat);
      model_.ClearZeroToken(gradient);
      StepResult result;
      result.loss = loss.item<double>();
      result.gradient_norm = OptimizerStep(run_.training, step, matrices_, gradient, state_);
      results.push_back(result);
    }
    return results;
  }
  int64_t preferred_count() const override { return 1; }

 private:
  const Task& task_;
  const RunConfig& run_;
  const Model& model_;
  const std::vector<HiddenMatrix> matrices_;
  TrainingState* state_;
};

}  // namespace

at::Tensor Loss(const Model& model, const at::Tensor& parameters, const at::Tensor& tokens,
                const at::Tensor& index, const at::Tensor& labels) {
  const at::Tensor logits = model.Forward(parameters, tokens, index);
  return at::cross_entropy_loss(logits.to(at::kFloat), labels, {}, at::Reduction::Mean,
                                Batch::kIgnored);
}

std::unique_ptr<Stepper> MakeStepper(const Task& task, const RunConfig& run, const Model& model,
                                     TrainingState* state) {
#ifdef FLASH_ENTMAX_LAB_CUDA
  if (state->parameters.is_cuda()) return cuda::MakeGraphStepper(task, run, model, state);
#endif
  return std::make_unique<PlainStepper>(task, run, model, state);
}

}  // namespace flash_entmax::lab
