// Warp-level tensor-core products that every device from compute capability 8.0 on has, and shared
// memory tiles for them. One interface for bf16, fp16 and (three TF32 products, error about that of
// fp32) float.
//
// A 16 x 8 accumulator c[4] of a warp: c[0], c[1] = row lane / 4, columns 2 (lane % 4) and the
// next; c[2], c[3] = the same columns of row lane / 4 + 8.
//
//   Mma<Element>::kDepth          length of one product's sum: 16 (16-bit types) or 8 (float)
//   Mma<Element>::A, ::B          operand fragments
//   Multiply(a, b, c)             c += A . B
//   MultiplyFirst(a, b, c)        c = A . B: a sum that starts so needs no registers set to zero
//   LoadRowsA(tile, row, step)    A = tile rows [row, row + 16), the step's kDepth columns
//   LoadRowsB2(tile, row, step, &low, &high)     two B: transposes of tile rows [row, row + 8) and
//                                 the next eight, the same columns: the sum runs along the tile's
//                                 rows (scores: Q . K^T)
//   LoadSumB2(tile, row, column, &low, &high)    two B: columns [column, column + 8) and the next
//                                 eight of tile rows [row, row + kDepth): the sum runs over the
//                                 tile's rows (output: P . V)
//   LoadTransposedA(address)      A = transpose of 16 x 16 elements anywhere in shared memory
//   FromAccumulators(c)           A from kDepth / 8 neighbouring accumulators (P for P . V). For
//                                 float the order of the sum is permuted, as in LoadSumB.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_MMA_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_MMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "element.cuh"
#include "general/problem.h"
#include "general/ptx.cuh"

namespace flash_entmax::cuda {

// Rows of kColumns elements in shared memory, padded by 16 bytes so that neither ldmatrix nor the
// strided reads of float fragments meet bank conflicts (kColumns a multiple of 16).
template <class Element, int kColumns>
struct SharedTile {
  static constexpr int kStride = kColumns + 16 / static_cast<int>(sizeof(Element));
  static constexpr int Bytes(int rows) {
    return rows * kStride * static_cast<int>(sizeof(Element));
  }

  Element* data;

  __device__ __forceinline__ Element* At(int row, int column) const {
    return data + row * kStride + column;
  }
};

// Copies rows [first, first + kRows) of one head, `columns` of them real, into a tile; rows at or
// past `row_count` and columns past `columns` become zero. With `vectors` the copy is asynchronous
// (the caller commits and waits), otherwise it is done element by element. All kThreads threads of
// a block take part; the caller synchronises.
template <class Element, int kColumns, int kRows, int kThreads>
__device__ __forceinline__ void LoadSharedTile(const SharedTile<Element, kColumns>& tile,
                                               const Element* head, int64_t row_stride,
                                               int64_t column_stride, int first, int row_count,
                                               int columns, bool vectors) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(Element));
  constexpr int kVectors = kColumns / kVector;  // a row
  static_assert(kThreads % kVectors == 0);
  const int thread = static_cast<int>(threadIdx.x);
  if (vectors && columns % kVector == 0) {
    // A thread copies the same columns of several rows.
    const int column = thread % kVectors * kVector;
#pragma unroll
    for (int step = 0; step < kRows * kVectors; step += kThreads) {
      const int row = thread / kVectors + step / kVectors;
      if (kRows * kVectors % kThreads != 0 && row >= kRows) break;
      const bool valid = first + row < row_count && column < columns;
      // The address must be valid even where nothing is read.
      const Element* source = valid ? head + (first + row) * row_stride + column : head;
      CopyAsync16(tile.At(row, column), source, valid);
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < kRows * kColumns; i += kThreads) {
      const int row = i / kColumns, column = i % kColumns;
      const bool valid = first + row < row_count && column < columns;
      *tile.At(row, column) =
          valid ? head[(first + row) * row_stride + column * column_stride] : Element(0.0f);
    }
  }
}

template <class Element>
struct Mma;

// bf16 and fp16.
template <class Element>
struct HalfMma {
  static constexpr int kDepth = 16;
  static constexpr float kWeightScale = ElementTraits<Element>::kWeightScale;
  struct A {
    uint32_t x[4];
  };
  struct B {
    uint32_t x[2];
  };

  template <int kColumns>
  static __device__ __forceinline__ A LoadRowsA(const SharedTile<Element, kColumns>& tile, int row,
                                                int step) {
    const int lane = threadIdx.x % 32;
    A a;
    LoadMatrices<false>(SharedAddress(tile.At(row + lane % 16, step * kDepth + lane / 16 * 8)),
                        a.x);
    return a;
  }
  // Two B fragments, of rows [row, row + 8) and [row + 8, row + 16), in one instruction.
  template <int kColumns>
  static __device__ __forceinline__ void LoadRowsB2(const SharedTile<Element, kColumns>& tile,
                                                    int row, int step, B* low, B* high) {
    const int lane = threadIdx.x % 32;
    uint32_t x[4];
    LoadMatrices<false>(
        SharedAddress(tile.At(row + lane / 16 * 8 + lane % 8, step * kDepth + lane / 8 % 2 * 8)),
        x);
    *low = {x[0], x[1]};
    *high = {x[2], x[3]};
  }
  // A from a matrix that lies transposed. Lane l gives the address of row l % 8 of the 8 x 8 matrix
  // l / 8: the first two become the upper and lower half of A's first 8 columns, the others of its
  // last 8.
  static __device__ __forceinline__ A LoadTransposedA(const Element* address) {
    A a;
    LoadMatrices<true>(SharedAddress(address), a.x);
    return a;
  }
  static __device__ __forceinline__ uint32_t Pack(float low, float high) {
    return ElementTraits<Element>::Pack(low, high);
  }
  static __device__ __forceinline__ A FromAccumulators(const float (&left)[4],
                                                       const float (&right)[4]) {
    return {{Pack(left[0], left[1]), Pack(left[2], left[3]), Pack(right[0], right[1]),
             Pack(right[2], right[3])}};
  }
  // Two B fragments, of columns [column, column + 8) and [column + 8, column + 16).
  template <int kColumns>
  static __device__ __forceinline__ void LoadSumB2(const SharedTile<Element, kColumns>& tile,
                                                   int row, int column, B* low, B* high) {
    const int lane = threadIdx.x % 32;
    uint32_t x[4];
    LoadMatrices<true>(SharedAddress(tile.At(row + lane % 16, column + lane / 16 * 8)), x);
    *low = {x[0], x[1]};
    *high = {x[2], x[3]};
  }
  static __device__ __forceinline__ void Multiply(const A& a, const B& b, float (&c)[4]) {
    MultiplyMatrices<Element, true>(a.x, b.x, c);
  }
  static __device__ __forceinline__ void MultiplyFirst(const A& a, const B& b, float (&c)[4]) {
    MultiplyMatrices<Element, false>(a.x, b.x, c);
  }
};

template <>
struct Mma<__nv_bfloat16> : HalfMma<__nv_bfloat16> {};
template <>
struct Mma<__half> : HalfMma<__half> {};

// float as the sum of two TF32 numbers: three of the four products; what is dropped is below 2^-22.
template <>
struct Mma<float> {
  static constexpr int kDepth = 8;
  static constexpr float kWeightScale = 1.0f;
  struct A {
    uint32_t high[4], low[4];
  };
  struct B {
    uint32_t high[2], low[2];
  };

  static __device__ __forceinline__ void Split(float x, uint32_t* high, uint32_t* low) {
    *high = ToTf32(x);
    *low = ToTf32(x - __uint_as_float(*high));
  }
  template <int kColumns>
  static __device__ __forceinline__ A LoadRowsA(const SharedTile<float, kColumns>& tile, int row,
                                                int step) {
    const int lane = threadIdx.x % 32;
    A a;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Split(*tile.At(row + lane / 4 + i % 2 * 8, step * kDepth + lane % 4 + i / 2 * 4), &a.high[i],
            &a.low[i]);
    }
    return a;
  }
  template <int kColumns>
  static __device__ __forceinline__ B LoadRowsB(const SharedTile<float, kColumns>& tile, int row,
                                                int step) {
    const int lane = threadIdx.x % 32;
    B b;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Split(*tile.At(row + lane / 4, step * kDepth + lane % 4 + i * 4), &b.high[i], &b.low[i]);
    }
    return b;
  }
  template <int kColumns>
  static __device__ __forceinline__ void LoadRowsB2(const SharedTile<float, kColumns>& tile,
                                                    int row, int step, B* low, B* high) {
    *low = LoadRowsB(tile, row, step);
    *high = LoadRowsB(tile, row + 8, step);
  }
  // Position t of the sum is tile row 2 t, position t + 4 row 2 t + 1 (t < 4).
  template <int kColumns>
  static __device__ __forceinline__ B LoadSumB(const SharedTile<float, kColumns>& tile, int row,
                                               int column) {
    const int lane = threadIdx.x % 32;
    B b;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Split(*tile.At(row + 2 * (lane % 4) + i, column + lane / 4), &b.high[i], &b.low[i]);
    }
    return b;
  }
  template <int kColumns>
  static __device__ __forceinline__ void LoadSumB2(const SharedTile<float, kColumns>& tile, int row,
                                                   int column, B* low, B* high) {
    *low = LoadSumB(tile, row, column);
    *high = LoadSumB(tile, row, column + 8);
  }
  static __device__ __forceinline__ A FromAccumulators(const float (&c)[4]) {
    A a;
    Split(c[0], &a.high[0], &a.low[0]);
    Split(c[2], &a.high[1], &a.low[1]);
    Split(c[1], &a.high[2], &a.low[2]);
    Split(c[3], &a.high[3], &a.low[3]);
    return a;
  }
  static __device__ __forceinline__ void Multiply(const A& a, const B& b, float (&c)[4]) {
    MultiplyTf32(a.low, b.high, c);
    MultiplyTf32(a.high, b.low, c);
    MultiplyTf32(a.high, b.high, c);
  }
  static __device__ __forceinline__ void MultiplyFirst(const A& a, const B& b, float (&c)[4]) {
    c[0] = c[1] = c[2] = c[3] = 0.0f;
    Multiply(a, b, c);
  }
};

// One step of a sum: c += A . B, or c = A . B if this is the first one, which must be known when
// the code is compiled.
template <class Product>
__device__ __forceinline__ void MultiplyStep(bool first, const typename Product::A& a,
                                             const typename Product::B& b, float (&c)[4]) {
  if (first) {
    Product::MultiplyFirst(a, b, c);
  } else {
    Product::Multiply(a, b, c);
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_MMA_CUH_
