#include "cuda/graph.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <array>
#include <future>
#include <thread>
#include <vector>

#include "cuda/kernels.h"
#include "device_lock.h"

namespace flash_entmax::lab::cuda {
namespace {

constexpr int64_t kChunkSteps = 64;
constexpr int kWarmUpSteps = 3;

// The data of up to kChunkSteps steps, on the host (pinned) or on the device.
struct Chunk {
  at::Tensor tokens;  // [steps, batch, tokens]
  at::Tensor index;   // [steps, batch·targets]
  at::Tensor labels;  // [steps, batch·targets]
  at::Tensor rates;   // [steps, 4] float32: StepRates
};

class GraphStepper final : public Stepper {
 public:
  GraphStepper(const Task& task, const RunConfig& run, const Model& model, TrainingState* state)
      : task_(task),
        run_(run),
        model_(model),
        state_(state),
        bfloat16_(run.training.precision != Precision::kFloat32),
        rounded_(run.training.precision == Precision::kBFloat16True),
        tokens_(task.MaxTokens(run.training.max_length) - 1),
        targets_(task.MaxTargets(run.training.max_length)),
        stream_(c10::cuda::getStreamFromPool()) {
    const DeviceInCompany company;
    for (Chunk& chunk : host_) chunk = Allocate(at::TensorOptions(at::kCPU).pinned_memory(true));
    const at::TensorOptions device(state->parameters.device());
    device_ = Allocate(device);
    counter_ = at::zeros({1}, device.dtype(at::kLong));
    results_ = at::zeros({kChunkSteps, 2}, device.dtype(at::kFloat));
    host_results_ = at::zeros({kChunkSteps, 2}, at::TensorOptions(at::kCPU).pinned_memory(true));
    leaf_ = bfloat16_ ? state->parameters.to(at::kBFloat16) : state->parameters.detach();
    leaf_.set_requires_grad(true);
    // All this ran on another stream than the steps will.
    c10::cuda::device_synchronize();
  }

  ~GraphStepper() override {
    if (next_.valid()) next_.wait();
  }

  std::vector<StepResult> Run(int64_t first, int64_t count) override {
    if (!next_.valid() || next_first_ != first || next_count_ != count) {
      if (next_.valid()) next_.get();
      Fill(first, count, &host_[filled_]);
    } else {
      next_.get();
    }
    const c10::cuda::CUDAStreamGuard guard(stream_);
    if (!captured_) {
      const DeviceAlone alone;
      Upload(host_[filled_]);
      Capture();
    }
    Launch(count);
    // The other buffer's upload has long finished: every chunk ends with a wait.
    filled_ = 1 - filled_;
    next_first_ = first + count;
    next_count_ = std::min(kChunkSteps, run_.training.steps - next_first_);
    if (next_count_ > 0) {
      next_ = std::async(std::launch::async, [this, f = next_first_, n = next_count_,
                                              chunk = &host_[filled_]] { Fill(f, n, chunk); });
    }
    stream_.synchronize();
    std::vector<StepResult> results;
    const float* numbers = host_results_.const_data_ptr<float>();
    for (int64_t i = 0; i < count; ++i) {
      results.push_back(
          {static_cast<double>(numbers[2 * i]), static_cast<double>(numbers[2 * i + 1])});
    }
    return results;
  }

  int64_t preferred_count() const override { return kChunkSteps; }

 private:
  void Launch(int64_t count) {
    const DeviceInCompany company;
    Upload(host_[filled_]);
    counter_.zero_();
    for (int64_t i = 0; i < count; ++i) graph_.replay();
    host_results_.copy_(results_, /*non_blocking=*/true);
  }

  Chunk Allocate(const at::TensorOptions& options) const {
    const int64_t batch = run_.training.batch;
    return {at::zeros({kChunkSteps, batch, tokens_}, options.dtype(at::kLong)),
            at::zeros({kChunkSteps, batch * targets_}, options.dtype(at::kLong)),
            at::zeros({kChunkSteps, batch * targets_}, options.dtype(at::kLong)),
            at::zeros({kChunkSteps, 4}, options.dtype(at::kFloat))};
  }

  // Makes the data of some steps; no call into CUDA, so that it may run beside a capture.
  void Fill(int64_t first, int64_t count, Chunk* chunk) const {
    int64_t* tokens = chunk->tokens.mutable_data_ptr<int64_t>();
    int64_t* index = chunk->index.mutable_data_ptr<int64_t>();
    int64_t* labels = chunk->labels.mutable_data_ptr<int64_t>();
    float* rates = chunk->rates.mutable_data_ptr<float>();
    const int64_t batch_tokens = run_.training.batch * tokens_;
    const int64_t batch_targets = run_.training.batch * targets_;
    const auto make = [&](int64_t i) {
      const Batch batch = TrainingBatch(task_, run_, first + i, true);
      std::copy(batch.tokens.begin(), batch.tokens.end(), tokens + i * batch_tokens);
      std::copy(batch.index.begin(), batch.index.end(), index + i * batch_targets);
      std::copy(batch.labels.begin(), batch.labels.end(), labels + i * batch_targets);
      const StepRates step = RatesOfStep(run_.training, first + i);
      rates[4 * i] = static_cast<float>(step.rate);
      rates[4 * i + 1] = static_cast<float>(step.second);
      rates[4 * i + 2] = static_cast<float>(step.decay);
      rates[4 * i + 3] = static_cast<float>(step.muon);
    };
    const auto workers =
        static_cast<int64_t>(std::clamp(std::thread::hardware_concurrency(), 2u, 16u) - 1);
    std::vector<std::thread> threads;
    for (int64_t worker = 0; worker < workers; ++worker) {
      threads.emplace_back([&, worker] {
        for (int64_t i = worker; i < count; i += workers) make(i);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  void Upload(const Chunk& from) {
    device_.tokens.copy_(from.tokens, true);
    device_.index.copy_(from.index, true);
    device_.labels.copy_(from.labels, true);
    device_.rates.copy_(from.rates, true);
  }

  // One step, reading row `counter_` of the chunk.
  void Step() {
    const at::Tensor tokens = device_.tokens.index_select(0, counter_)[0];
    const at::Tensor loss = Loss(model_, leaf_, tokens, device_.index.index_select(0, counter_)[0],
                                 device_.labels.index_select(0, counter_)[0]);
    const at::Tensor gradient = torch::autograd::grad({loss}, {leaf_})[0].contiguous();
    const at::NoGradGuard no_gradient;
    model_.ClearZeroToken(gradient);
    const at::Tensor norm = at::linalg_vector_norm(gradient, 2, {}, false, at::kFloat);
    Update(gradient, norm);
    results_.index_copy_(0, counter_, at::stack({loss.detach(), norm}).unsqueeze(0));
    counter_.add_(1);
  }

  void Update(const at::Tensor& gradient, const at::Tensor& norm) {
    std::vector<HiddenMatrix> matrices;
    if (run_.training.optimizer == Optimizer::kMuon) matrices = model_.HiddenMatrices();
    for (const ParameterRange& range : OtherRanges(matrices, gradient.numel())) {
      const auto at = [&](const at::Tensor& flat) {
        return flat.narrow(0, range.offset, range.size);
      };
      AdamCall call{};
      call.parameters = at(state_->parameters).mutable_data_ptr<float>();
      call.first_moment = at(state_->first_moment).mutable_data_ptr<float>();
      call.second_moment = at(state_->second_moment).mutable_data_ptr<float>();
      call.gradient = at(gradient).const_data_ptr();
      if (bfloat16_) call.copy = static_cast<__nv_bfloat16*>(at(leaf_).mutable_data_ptr());
      call.bfloat16 = bfloat16_;
      call.rounded = rounded_;
      call.norm = norm.const_data_ptr<float>();
      call.rates = device_.rates.const_data_ptr<float>();
      call.step = counter_.const_data_ptr<int64_t>();
      call.beta1 = static_cast<float>(run_.training.beta1);
      call.beta2 = static_cast<float>(run_.training.beta2);
      call.clip = static_cast<float>(run_.training.clip);
      call.epsilon = static_cast<float>(kAdamEpsilon);
      call.size = range.size;
      const cudaError_t error = cuda::Launch(call, c10::cuda::getCurrentCUDAStream().stream());
      TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
    }
    if (matrices.empty()) return;
    const at::Tensor clipped = gradient.to(at::kFloat) * (run_.training.clip / norm).clamp_max(1.0);
    MuonStep(matrices, clipped, device_.rates.index_select(0, counter_)[0][3], state_->first_moment,
             state_->parameters);
    if (!bfloat16_) return;
    for (const ParameterRange& range : CoveredRanges(matrices)) {
      leaf_.narrow(0, range.offset, range.size)
          .copy_(state_->parameters.narrow(0, range.offset, range.size));
    }
    if (rounded_) state_->Round();
  }

  // Libraries choose their algorithms and allocate in the first steps, which must not be part of
  // the graph, and must not train either.
  void Capture() {
    const TrainingState before = {state_->parameters.clone(), state_->first_moment.clone(),
                                  state_->second_moment.clone()};
    for (int i = 0; i < kWarmUpSteps; ++i) {
      counter_.zero_();
      Step();
    }
    const auto restore = [&] {
      const at::NoGradGuard no_gradient;
      state_->parameters.copy_(before.parameters);
      state_->first_moment.copy_(before.first_moment);
      state_->second_moment.copy_(before.second_moment);
      if (bfloat16_) leaf_.copy_(state_->parameters);
    };
    restore();
    counter_.zero_();
    stream_.synchronize();
    // Of this thread alone: the backward pass, and other runs, have threads of their own.
    graph_.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    Step();
    graph_.capture_end();
    captured_ = true;
  }

  const Task& task_;
  const RunConfig& run_;
  const Model& model_;
  TrainingState* state_;
  const bool bfloat16_;
  const bool rounded_;  // parameters and moments are bfloat16 numbers too
  const int64_t tokens_;
  const int64_t targets_;
  c10::cuda::CUDAStream stream_;
  std::array<Chunk, 2> host_;
  Chunk device_;
  int filled_ = 0;  // which of host_ holds, or will hold, the next chunk
  std::future<void> next_;
  int64_t next_first_ = -1;
  int64_t next_count_ = 0;
  at::Tensor counter_;  // [1]: the step within the chunk
  at::Tensor results_;  // [kChunkSteps, 2]: loss, gradient norm
  at::Tensor host_results_;
  at::Tensor leaf_;  // parameters of the compute type; shares memory with the state's in
                     // float32
  at::cuda::CUDAGraph graph_;
  bool captured_ = false;
};

}  // namespace

std::unique_ptr<Stepper> MakeGraphStepper(const Task& task, const RunConfig& run,
                                          const Model& model, TrainingState* state) {
  return std::make_unique<GraphStepper>(task, run, model, state);
}

}  // namespace flash_entmax::lab::cuda
