// The Hopper engine of a build without compute capability 9.0.

#include "engines.h"

namespace flash_entmax::cuda {
namespace {

Status Absent() {
  return Status::Unimplemented("engine: this build has no kernels for compute capability 9.0");
}

}  // namespace

Status CheckHopper(const AttentionCall&, const DeviceInfo&) { return Absent(); }
Expected<gpu::AttentionPlan> PlanHopper(const AttentionCall&, gpu::Engine) { return Absent(); }
Status ForwardHopper(const AttentionCall&, const DeviceInfo&, gpu::Engine,
                     const gpu::AttentionOutputs&, void*, void*) {
  return Absent();
}
Status BackwardHopper(const AttentionCall&, const DeviceInfo&, gpu::Engine,
                      const gpu::AttentionGradients&, void*, void*) {
  return Absent();
}

}  // namespace flash_entmax::cuda
