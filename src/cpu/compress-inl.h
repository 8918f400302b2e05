// Lanes of a vector that a mask selects, moved to its beginning.

#if defined(FLASH_ENTMAX_SRC_CPU_COMPRESS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_ENTMAX_SRC_CPU_COMPRESS_INL_H_
#undef FLASH_ENTMAX_SRC_CPU_COMPRESS_INL_H_
#else
#define FLASH_ENTMAX_SRC_CPU_COMPRESS_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "cpu/compress_tables.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// The lanes of `v` whose bits are set; what stands behind them is not defined.
//
// Vectors of 16 and 32 bytes need tables for it (AVX-512 has an instruction). Those of Highway 1.0
// are local arrays, of which GCC copies up to a kilobyte to the stack for every vector; that takes
// longer than all else. Here they are static.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V CompressBits(D d, V v, uint32_t bits) {
#if HWY_MAX_BYTES == 16 || HWY_MAX_BYTES == 32
  constexpr size_t kLane = sizeof(hn::TFromD<D>);
  if constexpr (hn::MaxLanes(D()) * kLane == 32) {
    const hn::Repartition<uint32_t, D> du32;
    const hn::Rebind<uint8_t, decltype(du32)> du8;
    const uint8_t* order = kWordsOf<kLane>.data() + size_t{8} * bits;
    const auto index = hn::PromoteTo(hn::RebindToSigned<decltype(du32)>(), hn::Load(du8, order));
    return hn::BitCast(d,
                       hn::TableLookupLanes(hn::BitCast(du32, v), hn::IndicesFromVec(du32, index)));
  } else {
    const hn::Repartition<uint8_t, D> du8;
    const uint8_t* order = kBytesOf<kLane>.data() + size_t{16} * bits;
    return hn::BitCast(d, hn::TableLookupBytes(hn::BitCast(du8, v), hn::LoadU(du8, order)));
  }
#else
  uint8_t bytes[8] = {};
  hwy::CopyBytes<sizeof(bits)>(&bits, bytes);
  return hn::Compress(v, hn::LoadMaskBits(d, bytes));
#endif
}

// The lanes of `v` that `mask` selects, in the same way.
template <class D, class V = hn::Vec<D>, class M = hn::Mask<D>>
HWY_INLINE V CompressLanes(D d, V v, M mask) {
#if HWY_MAX_BYTES == 16 || HWY_MAX_BYTES == 32
  uint8_t bits[8];
  hn::StoreMaskBits(d, mask, bits);
  return CompressBits(d, v, bits[0]);
#else
  (void)d;
  return hn::Compress(v, mask);
#endif
}

// Writes the scores and keys of the lanes that `mask` selects, in whole vectors. Returns how many
// there are.
template <class D, class DI>
HWY_INLINE size_t CompressEntries(D d, DI di, hn::Vec<D> score, hn::Vec<DI> key, hn::Mask<D> mask,
                                  hn::TFromD<D>* score_out, int32_t* key_out) {
  hn::StoreU(CompressLanes(d, score, mask), d, score_out);
  if constexpr (sizeof(hn::TFromD<D>) == sizeof(int32_t)) {
    hn::StoreU(CompressLanes(di, key, hn::RebindMask(di, mask)), di, key_out);
  } else {
    // No vector has more than eight lanes of as many bytes as double.
    uint8_t bits[8] = {};
    hn::StoreMaskBits(d, mask, bits);
    hn::StoreU(CompressBits(di, key, bits[0]), di, key_out);
  }
  return hn::CountTrue(d, mask);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#endif  // FLASH_ENTMAX_SRC_CPU_COMPRESS_INL_H_
