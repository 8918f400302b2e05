// Runs a kernel's own source on the CPU: each thread of a block is a fiber, and what the threads of
// a warp or of a block do together (shuffles, matrix products, barriers) waits for all of them.
// Slow, exact about who reads and writes what, and in need of no GPU. The kernel's file is compiled
// with this folder before src/cuda among the include folders: general/ptx.cuh here takes the place
// of the one with inline PTX.
//
// Only what the kernels under test use is here; the rest of what their headers mention is declared,
// and ends the program if it is called.
#ifndef FLASH_ENTMAX_TESTS_CUDA_EMULATION_GPU_H_
#define FLASH_ENTMAX_TESTS_CUDA_EMULATION_GPU_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>

namespace flash_entmax::testing {

struct Index {
  unsigned x = 0;
};

// Of the thread that runs.
struct Place {
  Index thread, block, block_size;
};
Place& CurrentPlace();

// Calls kernel() once for each of `threads` threads of block number `block`.
void RunBlock(int block, int threads, const std::function<void()>& kernel);

// Every thread of the warp gives `bytes` bytes and gets those of all 32, in order.
void GatherWarp(const void* own, size_t bytes, void* all);
// A barrier of the block; the bitwise or of what its threads give.
int OrOfBlock(int value);

// Shared memory of the blocks that run from now on, for instructions that take addresses in it:
// these count bytes from `base`, which must be aligned as the kernel wants its own.
void SetSharedMemory(void* base, size_t bytes);
// Both end the program if something lies outside.
uint32_t SharedOffset(const void* pointer);
void* SharedAt(uint32_t address, size_t bytes);

// Asynchronous copies of a thread; without a source, zeros. A device may do them at any time
// between start and wait: blocks of even number do them at the start, the others at the wait.
void StartCopy(void* destination, const void* source, size_t bytes);
void CommitCopies();
void WaitCopies(size_t pending);

template <class T>
struct OfWarp {
  T lane[32];

  explicit OfWarp(const T& own) { GatherWarp(&own, sizeof(T), lane); }
};

[[noreturn]] inline void NotEmulated() { std::abort(); }

}  // namespace flash_entmax::testing

// The names of CUDA that the kernels use and its headers do not give to a host compiler.
#ifndef __noinline__
#define __noinline__
#endif
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#define threadIdx (::flash_entmax::testing::CurrentPlace().thread)
#define blockIdx (::flash_entmax::testing::CurrentPlace().block)
#define blockDim (::flash_entmax::testing::CurrentPlace().block_size)

using std::isnan;
using std::max;
using std::min;

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return flash_entmax::testing::OfWarp<T>(value).lane[source % 32];
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
  return flash_entmax::testing::OfWarp<T>(value).lane[lane ^ mask];
}
inline void __syncwarp() { flash_entmax::testing::OfWarp<char>('\0'); }
inline int __reduce_max_sync(unsigned, int value) {
  const flash_entmax::testing::OfWarp<int> all(value);
  return *std::max_element(all.lane, all.lane + 32);
}
inline bool __any_sync(unsigned, bool value) {
  const flash_entmax::testing::OfWarp<bool> all(value);
  return std::any_of(all.lane, all.lane + 32, [](bool x) { return x; });
}
inline void __syncthreads() { flash_entmax::testing::OrOfBlock(0); }
inline int __syncthreads_or(int value) { return flash_entmax::testing::OrOfBlock(value); }

// The program is compiled without fusing products and sums.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }  // NaN: 0
inline float __log2f(float x) { return std::log2(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }

inline unsigned __ballot_sync(unsigned, bool value) {
  const flash_entmax::testing::OfWarp<bool> all(value);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= unsigned{all.lane[lane]} << lane;
  return bits;
}
// Only one fiber runs at a time.
inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }
inline int atomicMin(int* address, int value) {
  return std::exchange(*address, std::min(*address, value));
}
inline int atomicMax(int* address, int value) {
  return std::exchange(*address, std::max(*address, value));
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline float __fmul_ru(float, float) { flash_entmax::testing::NotEmulated(); }
inline float __fmul_rd(float, float) { flash_entmax::testing::NotEmulated(); }

#endif  // FLASH_ENTMAX_TESTS_CUDA_EMULATION_GPU_H_
