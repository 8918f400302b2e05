// The emulated counterpart of src/cuda/general/ptx.cuh. See ../gpu.h.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_PTX_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_PTX_CUH_

#include "emulation/gpu.h"

namespace flash_entmax::cuda {

inline uint32_t SharedAddress(const void* pointer) { return testing::SharedOffset(pointer); }

inline void CopyAsync16(void* destination, const void* source, bool valid) {
  testing::StartCopy(destination, valid ? source : nullptr, 16);
}
inline void CopyAsync4(void* destination, const void* source, bool valid) {
  testing::StartCopy(destination, valid ? source : nullptr, 4);
}
inline void CommitCopies() { testing::CommitCopies(); }
template <int kPending>
void WaitCopies() {
  testing::WaitCopies(kPending);
}

// Thread t gets elements 2 (t % 4) and the next of row t / 4 of each matrix, or of its transpose.
template <bool kTransposed>
void LoadMatrices(uint32_t address, uint32_t (&x)[4]) {
  const testing::OfWarp<uint32_t> rows(address);
  const int row = static_cast<int>(threadIdx.x) % 32 / 4;
  const int column = static_cast<int>(threadIdx.x) % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int r, int c) -> uint32_t {
      return static_cast<const uint16_t*>(testing::SharedAt(rows.lane[8 * i + r], 16))[c];
    };
    x[i] = kTransposed ? element(column, row) | element(column + 1, row) << 16
                       : element(row, column) | element(row, column + 1) << 16;
  }
}

// As sums in float, in the order of the columns of A.
template <class Element, bool kAdd>
void MultiplyMatrices(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4]) {
  struct Operands {
    float a[8], b[4];  // two of each word
  };
  const auto half = [](uint32_t pair, int which) {
    return static_cast<float>(std::bit_cast<Element>(static_cast<uint16_t>(pair >> (16 * which))));
  };
  Operands own;
  for (int i = 0; i < 8; ++i) own.a[i] = half(a[i / 2], i % 2);
  for (int i = 0; i < 4; ++i) own.b[i] = half(b[i / 2], i % 2);
  const testing::OfWarp<Operands> all(own);
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    if (!kAdd) c[e] = 0.0f;
    for (int k = 0; k < 16; ++k) {
      const int part = k % 8 / 2;  // which of four lanes
      c[e] += all.lane[row % 8 * 4 + part].a[row / 8 * 2 + k / 8 * 4 + k % 2] *
              all.lane[column * 4 + part].b[k / 8 * 2 + k % 2];
    }
  }
}
inline uint32_t ToTf32(float) { testing::NotEmulated(); }
inline void MultiplyTf32(const uint32_t (&)[4], const uint32_t (&)[2], float (&)[4]) {
  testing::NotEmulated();
}

inline void StoreShared(uint32_t address, float x) {
  *static_cast<float*>(testing::SharedAt(address, sizeof(x))) = x;
}
inline float LoadShared(uint32_t address) {
  return *static_cast<const float*>(testing::SharedAt(address, sizeof(float)));
}

// max(x, 0) in which NaN stays NaN.
inline float PositivePart(float x) { return std::isnan(x) || x > 0.0f ? x : 0.0f; }
inline float MaxKeepNan(float a, float b) { return std::isnan(a) || a > b ? a : b; }
inline float SquareRoot(float x) { return std::sqrt(x); }
inline int ComputeHere(int x) { return x; }

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_PTX_CUH_
