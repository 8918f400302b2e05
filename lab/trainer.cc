#include "trainer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "checkpoint.h"
#include "device_lock.h"
#include "evaluation.h"
#include "flash_entmax/machine.h"
#include "io/atomic_file.h"
#include "model.h"
#include "steps.h"
#ifdef FLASH_ENTMAX_LAB_CUDA
#include "flash_entmax/gpu.h"
#endif

namespace flash_entmax::lab {
namespace {

using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;

constexpr int64_t kQuickSamples = 256;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::string Join(const std::string& folder, const char* name) {
  return (std::filesystem::path(folder) / name).string();
}

Expected<at::Device> FindDevice(const std::string& name) {
  if (name == "cpu") return at::Device(at::kCPU);
  if (name != "cuda") {
    return Status::InvalidArgument("device: got \"" + name + "\"; must be cpu or cuda");
  }
#ifdef FLASH_ENTMAX_LAB_CUDA
  const Expected<std::string> description = gpu::DescribeDevice();
  if (!description.ok()) return description.status();
  return at::Device(at::kCUDA, 0);
#else
  return Status::Device(
      "device: got \"cuda\"; must be cpu, since this program was built without "
      "FLASH_ENTMAX_CUDA");
#endif
}

std::string DescribeMachine(const std::string& device) {
#ifdef FLASH_ENTMAX_LAB_CUDA
  if (device == "cuda") {
    const Expected<std::string> description = gpu::DescribeDevice();
    if (description.ok()) return *description;
  }
#endif
  return device + ", " + std::to_string(at::get_num_threads()) + " threads";
}

// The lines of metrics.jsonl up to a step; later ones belong to steps that a kill has undone.
Status CutMetrics(const std::string& path, int64_t step, double* seconds) {
  *seconds = 0.0;
  std::ifstream file(path);
  if (!file) return Status::Ok();
  std::string kept;
  for (std::string line; std::getline(file, line);) {
    const Json json = Json::parse(line, nullptr, false);
    if (!json.is_object() || !json.contains("step") || json["step"] > step) continue;
    if (json.contains("seconds")) *seconds = json["seconds"].get<double>();
    kept += line + "\n";
  }
  file.close();
  return io::WriteFileAtomically(path, kept);
}

// Everything that Train and Evaluate share.
struct Session {
  std::unique_ptr<Task> task;
  std::unique_ptr<Model> model;
  TrainingState state;
  int64_t step = 0;
  bool resumed = false;
};

Expected<Session> Open(const RunConfig& run, const TrainingOptions& options) {
  const DeviceInCompany company;
  const Expected<at::Device> device = FindDevice(options.device);
  if (!device.ok()) return device.status();
  if (options.threads > 0) at::set_num_threads(options.threads);
  Session session;
  Expected<std::unique_ptr<Task>> task = MakeTask(run.task);
  if (!task.ok()) return task.status();
  session.task = *std::move(task);
  const at::ScalarType compute = ComputeType(run.training.precision);
  session.model = std::make_unique<Model>(run.model, session.task->vocabulary(), *device, compute);
  session.state.parameters = session.model->Initialise(run.seed).to(*device);
  session.state.first_moment = at::zeros_like(session.state.parameters);
  session.state.second_moment = at::zeros_like(session.state.parameters);
  if (run.training.precision == Precision::kBFloat16True) session.state.Round();
  const std::string path = Join(options.folder, "checkpoint.safetensors");
  if (std::filesystem::exists(path)) {
    const Expected<int64_t> step = ReadCheckpoint(path, run, &session.state);
    if (!step.ok()) return step.status();
    session.step = *step;
    session.resumed = true;
  }
  return session;
}

Status ClaimFolder(const RunConfig& run, const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) return Status::Io("cannot create \"" + folder + "\": " + error.message());
  if (const Status status = CheckFolder(run, folder); !status.ok()) return status;
  return io::WriteFileAtomically(Join(folder, "run.json"), RunToJson(run));
}

at::Tensor ComputeParameters(const RunConfig& run, const TrainingState& state) {
  return state.parameters.to(ComputeType(run.training.precision));
}

class Trainer {
 public:
  Trainer(const RunConfig& run, const TrainingOptions& options, Session session, double seconds)
      : run_(run), options_(options), session_(std::move(session)), earlier_(seconds) {}

  Expected<TrainingOutcome> Run() {
    const int64_t steps = run_.training.steps;
    metrics_.open(Join(options_.folder, "metrics.jsonl"), std::ios::app);
    if (!metrics_) return Status::Io("cannot write \"" + options_.folder + "/metrics.jsonl\"");
    const std::unique_ptr<Stepper> stepper =
        MakeStepper(*session_.task, run_, *session_.model, &session_.state);
    start_ = saved_ = Clock::now();
    const int64_t first = session_.step;
    bool stopped = false;
    while (session_.step < steps && !stopped) {
      const int64_t count = std::min(stepper->preferred_count(), steps - session_.step);
      for (const StepResult& result : stepper->Run(session_.step, count)) {
        const Status status = Note(result);
        if (!status.ok()) return status;
      }
      const Status status = CheckpointIfDue();
      if (!status.ok()) return status;
      if (options_.progress) {
        options_.progress({session_.step, steps, loss_,
                           static_cast<double>(session_.step - first) / SecondsSince(start_),
                           exact_match_});
      }
      stopped = (options_.time_limit > 0.0 && SecondsSince(start_) >= options_.time_limit) ||
                (options_.stop && options_.stop());
    }
    const Status status = Save();
    if (!status.ok()) return status;
    return TrainingOutcome{session_.step, session_.step >= steps, loss_};
  }

 private:
  Status Note(const StepResult& result) {
    loss_ = result.loss;
    if (!std::isfinite(result.loss) || !std::isfinite(result.gradient_norm)) {
      return Status::InvalidArgument(
          "training: got a loss or gradient that is not finite at step " +
          std::to_string(session_.step) + "; must stay finite (try a lower learning rate)");
    }
    if (options_.on_step) options_.on_step(session_.step, result.loss);
    sum_ += result.loss;
    ++summed_;
    ++session_.step;
    const TrainingConfig& training = run_.training;
    const bool end = session_.step == training.steps;
    const bool quick =
        training.evaluate_every > 0 && (end || session_.step % training.evaluate_every == 0);
    if (!end && !quick && session_.step % training.log_every != 0) return Status::Ok();
    Json line = {{"step", session_.step},
                 {"loss", sum_ / static_cast<double>(summed_)},
                 {"gradient_norm", result.gradient_norm},
                 {"rate", LearningRate(training, session_.step - 1)},
                 {"seconds", earlier_ + SecondsSince(start_)}};
    if (quick) {
      const DeviceInCompany company;
      const LengthResult evaluated =
          EvaluateLength(*session_.task, run_, *session_.model,
                         ComputeParameters(run_, session_.state), 1.0, false, kQuickSamples);
      exact_match_ = evaluated.exact_match;
      line["exact_match"] = evaluated.exact_match;
      line["token_accuracy"] = evaluated.token_accuracy;
      if (!evaluated.slot_accuracy.empty()) line["slot_accuracy"] = evaluated.slot_accuracy;
    }
    sum_ = 0.0;
    summed_ = 0;
    metrics_ << line.dump() << std::endl;
    if (!metrics_) return Status::Io("cannot write \"" + options_.folder + "/metrics.jsonl\"");
    return Status::Ok();
  }

  Status CheckpointIfDue() {
    if (SecondsSince(saved_) < static_cast<double>(run_.training.checkpoint_seconds)) {
      return Status::Ok();
    }
    return Save();
  }

  Status Save() {
    const DeviceInCompany company;
    saved_ = Clock::now();
    return WriteCheckpoint(Join(options_.folder, "checkpoint.safetensors"), run_, session_.step,
                           session_.state);
  }

  const RunConfig& run_;
  const TrainingOptions& options_;
  Session session_;
  const double earlier_;  // seconds of training before this call
  std::ofstream metrics_;
  Clock::time_point start_;
  Clock::time_point saved_;
  double loss_ = 0.0;
  double sum_ = 0.0;
  int64_t summed_ = 0;
  double exact_match_ = -1.0;
};

// LibTorch reports by exceptions; no caller of the lab should have to know.
template <typename Function>
auto WithoutExceptions(Function function) -> decltype(function()) {
  try {
    return function();
  } catch (const c10::OutOfMemoryError& error) {
    return Status::OutOfMemory(std::string("out of GPU memory: ") + error.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    return Status::OutOfMemory("out of memory: use a smaller batch or shorter sequences");
  } catch (const c10::Error& error) {
    std::string message = error.what_without_backtrace();
    for (char& c : message) c = c == '\n' ? ' ' : c;
    return Status(message.find("CUDA") != std::string::npos ? StatusCode::kDevice
                                                            : StatusCode::kInvalidArgument,
                  message);
  }
}

// The last logged loss and the seconds of training.
std::pair<double, double> LastMetrics(const std::string& path) {
  std::ifstream file(path);
  std::pair<double, double> last{0.0, 0.0};
  for (std::string line; std::getline(file, line);) {
    const Json json = Json::parse(line, nullptr, false);
    if (json.is_object() && json.contains("loss")) {
      last = {json.value("loss", 0.0), json.value("seconds", 0.0)};
    }
  }
  return last;
}

}  // namespace

Status CheckFolder(const RunConfig& run, const std::string& folder) {
  const std::string path = Join(folder, "run.json");
  if (!std::filesystem::exists(path)) return Status::Ok();
  const Expected<std::string> text = ReadFile(path);
  if (!text.ok()) return text.status();
  const Expected<RunConfig> other = ParseRun(*text);
  if (other.ok() && TrainingIdentity(*other) == TrainingIdentity(run)) return Status::Ok();
  return Status::InvalidArgument("folder: got \"" + folder +
                                 "\", which belongs to another run; must be new or of the same "
                                 "configuration");
}

Expected<TrainingOutcome> Train(const RunConfig& run, const TrainingOptions& options) {
  return WithoutExceptions([&]() -> Expected<TrainingOutcome> {
    const Status claimed = ClaimFolder(run, options.folder);
    if (!claimed.ok()) return claimed;
    Expected<Session> session = Open(run, options);
    if (!session.ok()) return session.status();
    double seconds = 0.0;
    const Status cut = CutMetrics(Join(options.folder, "metrics.jsonl"), session->step, &seconds);
    if (!cut.ok()) return cut;
    return Trainer(run, options, *std::move(session), seconds).Run();
  });
}

Status Evaluate(const RunConfig& run, const TrainingOptions& options,
                const std::function<void(int64_t, int64_t)>& progress) {
  return WithoutExceptions([&]() -> Status {
    const Expected<Session> session = Open(run, options);
    if (!session.ok()) return session.status();
    if (!session->resumed) {
      return Status::InvalidArgument("folder: got \"" + options.folder +
                                     "\", which has no checkpoint; must be that of a trained run");
    }
    const at::Tensor parameters = ComputeParameters(run, session->state);
    const auto total = static_cast<int64_t>(run.evaluation.multiples.size());
    std::vector<LengthResult> results;
    for (const double multiple : run.evaluation.multiples) {
      if (progress) progress(static_cast<int64_t>(results.size()), total);
      const DeviceInCompany company;
      results.push_back(
          EvaluateLength(*session->task, run, *session->model, parameters, multiple, true));
    }
    const auto [loss, seconds] = LastMetrics(Join(options.folder, "metrics.jsonl"));
    return io::WriteFileAtomically(
        Join(options.folder, "result.json"),
        ResultsToJson(run, results, session->step, loss, seconds, DescribeMachine(options.device)));
  });
}

}  // namespace flash_entmax::lab
