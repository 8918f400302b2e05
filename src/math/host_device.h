// Marks functions that the CPU and the GPU code share.

#ifndef FLASH_ENTMAX_SRC_MATH_HOST_DEVICE_H_
#define FLASH_ENTMAX_SRC_MATH_HOST_DEVICE_H_

#ifdef __CUDACC__
#define FLASH_ENTMAX_HOST_DEVICE __host__ __device__
#else
#define FLASH_ENTMAX_HOST_DEVICE
#endif

#endif  // FLASH_ENTMAX_SRC_MATH_HOST_DEVICE_H_
