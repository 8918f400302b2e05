#include "checkpoint.h"

#include <ATen/ATen.h>

#include <array>
#include <cstring>
#include <map>
#include <vector>

#include "io/safetensors.h"

namespace flash_entmax::lab {
namespace {

constexpr const char* kFormat = "flash-entmax training state, version 1";

struct Entry {
  const char* name;
  at::Tensor TrainingState::*member;
};
constexpr std::array<Entry, 3> kEntries = {{{"parameters", &TrainingState::parameters},
                                            {"first_moment", &TrainingState::first_moment},
                                            {"second_moment", &TrainingState::second_moment}}};

uint64_t Begin(int64_t step) { return Checksum(&step, sizeof(step)); }

Status Damaged(const std::string& path, const std::string& why) {
  return Status::InvalidArgument("checkpoint: got \"" + path + "\", " + why +
                                 "; must be one that this run has written");
}

std::string Value(const std::map<std::string, std::string>& metadata, const char* key) {
  const auto found = metadata.find(key);
  return found == metadata.end() ? std::string() : found->second;
}

}  // namespace

std::string TrainingIdentity(const RunConfig& run) {
  RunConfig essential = run;
  essential.evaluation = EvaluationConfig();
  essential.training.log_every = 1;
  essential.training.evaluate_every = 0;
  essential.training.checkpoint_seconds = 1;
  return RunToJson(essential);
}

Status WriteCheckpoint(const std::string& path, const RunConfig& run, int64_t step,
                       const TrainingState& state) {
  std::vector<at::Tensor> kept;
  std::vector<io::NamedTensor> tensors;
  uint64_t checksum = Begin(step);
  for (const Entry& entry : kEntries) {
    kept.push_back((state.*entry.member).to(at::kCPU, at::kFloat).contiguous());
    const at::Tensor& tensor = kept.back();
    const auto size = static_cast<size_t>(tensor.numel());
    checksum = Checksum(tensor.const_data_ptr(), size * sizeof(float), checksum);
    tensors.push_back({entry.name, TensorView::Contiguous(tensor.const_data_ptr(), DType::kFloat32,
                                                          {tensor.numel()})});
  }
  return io::WriteSafetensors(path, tensors,
                              {{"format", kFormat},
                               {"step", std::to_string(step)},
                               {"run", TrainingIdentity(run)},
                               {"checksum", std::to_string(checksum)}});
}

Expected<int64_t> ReadCheckpoint(const std::string& path, const RunConfig& run,
                                 TrainingState* state) {
  Expected<io::SafetensorsFile> file = io::SafetensorsFile::Open(path);
  if (!file.ok()) return file.status();
  const auto& metadata = file->metadata();
  if (Value(metadata, "format") != kFormat) return Damaged(path, "which is of another format");
  if (Value(metadata, "run") != TrainingIdentity(run)) {
    return Damaged(path, "which belongs to another configuration");
  }
  int64_t step = 0;
  const std::string text = Value(metadata, "step");
  if (text.empty() || text.size() > 15 ||
      text.find_first_not_of("0123456789") != std::string::npos) {
    return Damaged(path, "which names no step");
  }
  step = std::stoll(text);
  uint64_t checksum = Begin(step);
  std::array<TensorView, kEntries.size()> views;
  for (size_t i = 0; i < kEntries.size(); ++i) {
    const Expected<TensorView> view = file->Tensor(kEntries[i].name);
    if (!view.ok()) return Damaged(path, "which lacks " + std::string(kEntries[i].name));
    if (view->dtype != DType::kFloat32 ||
        view->num_elements() != (state->*kEntries[i].member).numel()) {
      return Damaged(path, "which holds a model of another size");
    }
    views[i] = *view;
    checksum =
        Checksum(view->data, static_cast<size_t>(view->num_elements()) * sizeof(float), checksum);
  }
  if (std::to_string(checksum) != Value(metadata, "checksum")) {
    return Damaged(path, "whose checksum is wrong");
  }
  for (size_t i = 0; i < kEntries.size(); ++i) {
    const at::Tensor stored =
        at::from_blob(const_cast<void*>(views[i].data), {views[i].num_elements()}, at::kFloat);
    (state->*kEntries[i].member).copy_(stored);
  }
  return step;
}

}  // namespace flash_entmax::lab
