// Order between the kernels of one call.
//
// They are launched with programmatic stream serialisation: a kernel's blocks may be placed, and its
// launch is already paid for, while the kernel before it is ending. Every thread of every kernel
// therefore starts by waiting for that one. Also a kernel that finds nothing to do: the next kernel
// relies on all earlier ones having ended when the one before it has.
#ifndef FLASH_ENTMAX_CUDA_LAUNCH_ORDER_CUH_
#define FLASH_ENTMAX_CUDA_LAUNCH_ORDER_CUH_

namespace flash_entmax::cuda {

// Returns when the kernels launched earlier have ended and what they wrote can be read.
__device__ __forceinline__ void WaitForEarlierKernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_LAUNCH_ORDER_CUH_
