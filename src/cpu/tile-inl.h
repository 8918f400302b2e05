// Tile verbs of the CPU engine: products of small matrices held in registers.

#if defined(FLASH_ENTMAX_SRC_CPU_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_ENTMAX_SRC_CPU_TILE_INL_H_
#undef FLASH_ENTMAX_SRC_CPU_TILE_INL_H_
#else
#define FLASH_ENTMAX_SRC_CPU_TILE_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// A tile is kTileRows × (kTileVectors vectors): as many accumulators as the register file holds
// beside one row of the right operand and one broadcast element of the left.
#if HWY_TARGET <= HWY_AVX3
constexpr int kTileRows = 12;  // 24 of 32 registers
#elif HWY_TARGET == HWY_NEON
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;  // 12 of 16 registers
#endif
constexpr int kTileVectors = 2;

// Keys (or value elements) that a tile is wide.
template <typename T>
constexpr size_t TileWidth() {
  return kTileVectors * hn::MaxLanes(hn::ScalableTag<T>());
}

// The accumulators of a tile. All loops over them are unrolled, so that they stay in registers.
template <typename T>
struct Tile {
  using D = hn::ScalableTag<T>;
  using V = hn::Vec<D>;
  V row[kTileRows][kTileVectors];

  // Written out because a constructor that the compiler adds is not compiled for the instruction
  // set.
  HWY_ATTR Tile() {}  // NOLINT(modernize-use-equals-default)

  HWY_INLINE void Zero() {
    HWY_UNROLL(kTileRows)
    for (int r = 0; r < kTileRows; ++r) {
      HWY_UNROLL(kTileVectors)
      for (int v = 0; v < kTileVectors; ++v) row[r][v] = hn::Zero(D());
    }
  }

  // p has `stride` elements from row to row.
  HWY_INLINE void Load(const T* HWY_RESTRICT p, size_t stride) {
    const size_t lanes = hn::Lanes(D());
    HWY_UNROLL(kTileRows)
    for (int r = 0; r < kTileRows; ++r) {
      HWY_UNROLL(kTileVectors)
      for (int v = 0; v < kTileVectors; ++v) row[r][v] = hn::LoadU(D(), p + r * stride + v * lanes);
    }
  }

  HWY_INLINE void Store(T* HWY_RESTRICT p, size_t stride) const {
    const size_t lanes = hn::Lanes(D());
    HWY_UNROLL(kTileRows)
    for (int r = 0; r < kTileRows; ++r) {
      HWY_UNROLL(kTileVectors)
      for (int v = 0; v < kTileVectors; ++v) hn::StoreU(row[r][v], D(), p + r * stride + v * lanes);
    }
  }

  // Adds left (kTileRows × depth, left_stride apart) times right (depth rows of a tile's width,
  // right_stride apart).
  HWY_INLINE void MultiplyAdd(const T* HWY_RESTRICT left, size_t left_stride,
                              const T* HWY_RESTRICT right, size_t right_stride, size_t depth) {
    const D d;
    const size_t lanes = hn::Lanes(d);
    for (size_t k = 0; k < depth; ++k) {
      V b[kTileVectors];
      HWY_UNROLL(kTileVectors)
      for (int v = 0; v < kTileVectors; ++v)
        b[v] = hn::LoadU(d, right + k * right_stride + v * lanes);
      HWY_UNROLL(kTileRows)
      for (int r = 0; r < kTileRows; ++r) {
        const V a = hn::Set(d, left[r * left_stride + k]);
        HWY_UNROLL(kTileVectors)
        for (int v = 0; v < kTileVectors; ++v) row[r][v] = hn::MulAdd(a, b[v], row[r][v]);
      }
    }
  }

  // Bit r is set if any element of row r is not at or below bound[r]; NaN is not.
  HWY_INLINE uint32_t RowsAbove(const T* HWY_RESTRICT bound) const {
    const D d;
    uint32_t bits = 0;
    HWY_UNROLL(kTileRows)
    for (int r = 0; r < kTileRows; ++r) {
      const V limit = hn::Set(d, bound[r]);
      auto below = hn::Le(row[r][0], limit);
      HWY_UNROLL(kTileVectors)
      for (int v = 1; v < kTileVectors; ++v) below = hn::And(below, hn::Le(row[r][v], limit));
      bits |= static_cast<uint32_t>(!hn::AllTrue(d, below)) << r;
    }
    return bits;
  }
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#endif  // FLASH_ENTMAX_SRC_CPU_TILE_INL_H_
