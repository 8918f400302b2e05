// gpu.h in a build without CUDA.

#include "flash_entmax/gpu.h"

namespace flash_entmax::gpu {
namespace {

Status Absent() {
  return Status::Device("this build of flash_entmax has no GPU engine (FLASH_ENTMAX_CUDA is off)");
}

}  // namespace

Expected<AttentionPlan> PlanAttention(const AttentionProblem&, const AttentionOptions&) {
  return Absent();
}
Status AttentionForward(const AttentionProblem&, const AttentionOutputs&, const AttentionOptions&,
                        DeviceBuffer, DeviceBuffer) {
  return Absent();
}
Status AttentionBackward(const AttentionProblem&, const AttentionGradients&,
                         const AttentionOptions&, DeviceBuffer, DeviceBuffer) {
  return Absent();
}
Expected<int64_t> SupportWorkspaceBytes(const AttentionProblem&) { return Absent(); }
Status SupportOffsets(const AttentionProblem&, const TensorView&, const AttentionOptions&,
                      MutableTensorView, DeviceBuffer) {
  return Absent();
}
Status SupportEntries(const AttentionProblem&, const TensorView&, const AttentionOptions&,
                      const TensorView&, MutableTensorView, MutableTensorView) {
  return Absent();
}
Expected<std::string> DescribeDevice() { return Absent(); }

}  // namespace flash_entmax::gpu
