// Launch sequences of one element type and head size; instantiated in instance.cu.
#ifndef FLASH_ENTMAX_CUDA_LAUNCH_H_
#define FLASH_ENTMAX_CUDA_LAUNCH_H_

#include "plan.h"

namespace flash_entmax::cuda {

struct DeviceLimits {
  int multiprocessors;
};

template <class Element, int kHeadDim>
int LaunchForward(const Plan& plan, const DeviceLimits& device,
                  const FlashEntmaxForwardTensors& tensors, const SavedBuffers& saved,
                  const ForwardScratch& scratch, cudaStream_t stream);

template <class Element, int kHeadDim>
int LaunchBackward(const Plan& plan, const DeviceLimits& device,
                   const FlashEntmaxBackwardTensors& tensors, const SavedBuffers& saved,
                   const BackwardScratch& scratch, cudaStream_t stream);

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_LAUNCH_H_
