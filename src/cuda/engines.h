// The two engines behind gpu.h, as attention.cc sees them: plan, forward, backward.
#ifndef FLASH_ENTMAX_CUDA_ENGINES_H_
#define FLASH_ENTMAX_CUDA_ENGINES_H_

#include "attention_call.h"

namespace flash_entmax::cuda {

// Compute capability 8.0 and later, every feature (general/).
Expected<gpu::AttentionPlan> PlanGeneral(const AttentionCall& call);
Status ForwardGeneral(const AttentionCall& call, const DeviceInfo& device,
                      const gpu::AttentionOutputs& outputs, void* saved, void* workspace);
Status BackwardGeneral(const AttentionCall& call, const DeviceInfo& device,
                       const gpu::AttentionGradients& gradients, void* saved, void* workspace);

// Compute capability 9.0: screening, and tiles for rows with large supports. Ok if it can run the
// problem, otherwise the first reason against it.
Status CheckHopper(const AttentionCall& call, const DeviceInfo& device);
Expected<gpu::AttentionPlan> PlanHopper(const AttentionCall& call, gpu::Engine engine);
Status ForwardHopper(const AttentionCall& call, const DeviceInfo& device, gpu::Engine engine,
                     const gpu::AttentionOutputs& outputs, void* saved, void* workspace);
Status BackwardHopper(const AttentionCall& call, const DeviceInfo& device, gpu::Engine engine,
                      const gpu::AttentionGradients& gradients, void* saved, void* workspace);

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_ENGINES_H_
