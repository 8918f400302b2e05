// 16-bit element types: conversion, packing and wide loads.
#ifndef FLASH_ENTMAX_CUDA_ELEMENT_CUH_
#define FLASH_ENTMAX_CUDA_ELEMENT_CUH_

#include "problem.h"

namespace flash_entmax::cuda {

template <class Element>
struct ElementTraits;

template <>
struct ElementTraits<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr float kWeightScale = 1.0f;
  static __device__ __forceinline__ uint32_t Pack(float low, float high) {
    const Pair pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ float2 Unpack(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  }
};

template <>
struct ElementTraits<__half> {
  using Pair = __half2;
  // Probabilities of flat rows would be subnormal in fp16: they are scaled up before the product.
  static constexpr float kWeightScale = 256.0f;
  static __device__ __forceinline__ uint32_t Pack(float low, float high) {
    const Pair pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ float2 Unpack(uint32_t bits) {
    return __half22float2(*reinterpret_cast<const Pair*>(&bits));
  }
};

// `kCount` contiguous elements of a row as packed pairs; loaded with the widest access.
template <int kCount>
struct Chunk {
  static constexpr int kWords = kCount / 2;
  uint32_t words[kWords];

  __device__ __forceinline__ void Load(const void* source) {
    if constexpr (kWords == 2) {
      const uint2 v = __ldg(static_cast<const uint2*>(source));
      words[0] = v.x, words[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 v = __ldg(static_cast<const uint4*>(source) + i / 4);
        words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
      }
    }
  }

  __device__ __forceinline__ void Store(void* destination) const {
    if constexpr (kWords == 2) {
      *static_cast<uint2*>(destination) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        static_cast<uint4*>(destination)[i / 4] =
            make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
      }
    }
  }

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }
};

template <class Element, int kCount>
__device__ __forceinline__ float Dot(const Chunk<kCount>& chunk, const float (&vector)[kCount]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float2 pair = ElementTraits<Element>::Unpack(chunk.words[i]);
    sum = fmaf(pair.x, vector[2 * i], sum);
    sum = fmaf(pair.y, vector[2 * i + 1], sum);
  }
  return sum;
}

template <class Element, int kCount>
__device__ __forceinline__ void Accumulate(float weight, const Chunk<kCount>& chunk,
                                           float (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float2 pair = ElementTraits<Element>::Unpack(chunk.words[i]);
    sum[2 * i] = fmaf(weight, pair.x, sum[2 * i]);
    sum[2 * i + 1] = fmaf(weight, pair.y, sum[2 * i + 1]);
  }
}

template <class Element, int kCount>
__device__ __forceinline__ void LoadVector(const Element* source, float (&vector)[kCount]) {
  Chunk<kCount> chunk;
  chunk.Load(source);
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float2 pair = ElementTraits<Element>::Unpack(chunk.words[i]);
    vector[2 * i] = pair.x;
    vector[2 * i + 1] = pair.y;
  }
}

template <class Element, int kCount>
__device__ __forceinline__ void StoreVector(const float (&vector)[kCount], float factor,
                                            Element* destination) {
  Chunk<kCount> chunk;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    chunk.words[i] =
        ElementTraits<Element>::Pack(factor * vector[2 * i], factor * vector[2 * i + 1]);
  }
  chunk.Store(destination);
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_ELEMENT_CUH_
