// The emulated counterpart of src/cuda/general/mma.cuh: the same interface and fragment layouts for
// 16-bit elements. See ../gpu.h.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_MMA_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_MMA_CUH_

#include <type_traits>

#include "emulation/gpu.h"
#include "general/problem.h"
#include "general/ptx.cuh"

namespace flash_entmax::cuda {

template <class Element, int kColumns>
struct SharedTile {
  static constexpr int kStride = kColumns + 16 / static_cast<int>(sizeof(Element));
  static constexpr int Bytes(int rows) {
    return rows * kStride * static_cast<int>(sizeof(Element));
  }

  Element* data;

  Element* At(int row, int column) const { return data + row * kStride + column; }
};

template <class Element, int kColumns, int kRows, int kThreads>
void LoadSharedTile(const SharedTile<Element, kColumns>& tile, const Element* head,
                    int64_t row_stride, int64_t column_stride, int first, int row_count,
                    int columns, bool /*vectors*/) {
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns; i += kThreads) {
    const int row = i / kColumns, column = i % kColumns;
    const bool valid = first + row < row_count && column < columns;
    *tile.At(row, column) =
        valid ? head[(first + row) * row_stride + column * column_stride] : Element(0.0f);
  }
}

template <class Element>
struct Mma {
  static constexpr int kDepth = 16;
  static constexpr float kWeightScale = std::is_same_v<Element, __half> ? 256.0f : 1.0f;
  struct A {
    uint32_t x[4];
  };
  struct B {
    uint32_t x[2];
  };

  // Rows lane / 4 and 8 more, columns 2 (lane % 4) and 8 more, two elements each.
  template <int kColumns>
  static A LoadRowsA(const SharedTile<Element, kColumns>& tile, int row, int step) {
    A a;
    for (int i = 0; i < 4; ++i) {
      const int column = step * kDepth + i / 2 * 8 + Lane() % 4 * 2;
      a.x[i] = Two(tile.At(row + Lane() / 4 + i % 2 * 8, column),
                   tile.At(row + Lane() / 4 + i % 2 * 8, column + 1));
    }
    return a;
  }
  template <int kColumns>
  static void LoadRowsB2(const SharedTile<Element, kColumns>& tile, int row, int step, B* low,
                         B* high) {
    for (int i = 0; i < 4; ++i) {
      const int r = row + i / 2 * 8 + Lane() / 4;
      const int column = step * kDepth + i % 2 * 8 + Lane() % 4 * 2;
      (i < 2 ? low : high)->x[i % 2] = Two(tile.At(r, column), tile.At(r, column + 1));
    }
  }
  template <int kColumns>
  static void LoadSumB2(const SharedTile<Element, kColumns>& tile, int row, int column, B* low,
                        B* high) {
    for (int i = 0; i < 4; ++i) {
      const int r = row + i % 2 * 8 + Lane() % 4 * 2, c = column + i / 2 * 8 + Lane() / 4;
      (i < 2 ? low : high)->x[i % 2] = Two(tile.At(r, c), tile.At(r + 1, c));
    }
  }
  // Lane l has the address of row l % 8 of the 8 x 8 matrix l / 8.
  static A LoadTransposedA(const Element* address) {
    const testing::OfWarp<const Element*> rows(address);
    A a;
    for (int i = 0; i < 4; ++i) {
      const Element* const* matrix = rows.lane + 8 * i;
      a.x[i] = Two(matrix[Lane() % 4 * 2] + Lane() / 4, matrix[Lane() % 4 * 2 + 1] + Lane() / 4);
    }
    return a;
  }
  static uint32_t Pack(float low, float high) {
    const Element first(low), second(high);
    return Two(&first, &second);
  }
  static A FromAccumulators(const float (&left)[4], const float (&right)[4]) {
    return {{Pack(left[0], left[1]), Pack(left[2], left[3]), Pack(right[0], right[1]),
             Pack(right[2], right[3])}};
  }
  static void Multiply(const A& a, const B& b, float (&c)[4]) {
    struct Operands {
      float a[8], b[4];  // two of each word
    };
    Operands own;
    for (int i = 0; i < 8; ++i) own.a[i] = Half(a.x[i / 2], i % 2);
    for (int i = 0; i < 4; ++i) own.b[i] = Half(b.x[i / 2], i % 2);
    const testing::OfWarp<Operands> all(own);
    for (int e = 0; e < 4; ++e) {
      const int row = Lane() / 4 + e / 2 * 8, column = Lane() % 4 * 2 + e % 2;
      for (int k = 0; k < 16; ++k) {
        const int part = k % 8 / 2;  // which of four lanes
        c[e] += all.lane[row % 8 * 4 + part].a[row / 8 * 2 + k / 8 * 4 + k % 2] *
                all.lane[column * 4 + part].b[k / 8 * 2 + k % 2];
      }
    }
  }
  static void MultiplyFirst(const A& a, const B& b, float (&c)[4]) {
    c[0] = c[1] = c[2] = c[3] = 0.0f;
    Multiply(a, b, c);
  }

 private:
  static int Lane() { return static_cast<int>(threadIdx.x % 32); }
  static uint32_t Two(const Element* low, const Element* high) {
    return std::bit_cast<uint16_t>(*low) | static_cast<uint32_t>(std::bit_cast<uint16_t>(*high))
                                               << 16;
  }
  static float Half(uint32_t pair, int which) {
    return static_cast<float>(std::bit_cast<Element>(static_cast<uint16_t>(pair >> (16 * which))));
  }
};

// As in the other file.
template <class Product>
void MultiplyStep(bool first, const typename Product::A& a, const typename Product::B& b,
                  float (&c)[4]) {
  if (first) {
    Product::MultiplyFirst(a, b, c);
  } else {
    Product::Multiply(a, b, c);
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_MMA_CUH_
