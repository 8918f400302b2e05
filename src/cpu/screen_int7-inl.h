// Screening in bytes (screening.h) for x86 without the 8-bit dot product: k' in [−63, 63].
//
// One instruction multiplies unsigned bytes of keys, k' + 64, and signed ones of queries and adds
// each pair of products in 16 bits (pmaddubsw); it saturates beyond them. Two such sums are added
// before they are widened to 32 bits (pmaddwd with ones), which takes 5 instructions for what 16
// bits without saturation would take 8. So that no sum of four products saturates, the keys have 7
// bits, and a query row is scaled so that the sizes of any four integers that meet in a sum add up
// to no more than 32767 / 127 = 258.

#if defined(FLASH_ENTMAX_SRC_CPU_SCREEN_INT7_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_ENTMAX_SRC_CPU_SCREEN_INT7_INL_H_
#undef FLASH_ENTMAX_SRC_CPU_SCREEN_INT7_INL_H_
#else
#define FLASH_ENTMAX_SRC_CPU_SCREEN_INT7_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cpu/screening.h"
#include "cpu/tile-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_SSE4

constexpr bool kScreensInt7 = true;

constexpr int32_t kKeyOffset = 64;
constexpr float kLargestKey = 63.0f;
constexpr float kLargestQuery = 127.0f;
// Of 258, since each of the four may be rounded up by a half.
constexpr float kLargestFour = 256.0f;

// The products of the bytes of keys and query, added in pairs.
template <class V>
HWY_INLINE V MultiplyBytes(V keys, V query) {
#if HWY_TARGET == HWY_SSE4
  return V{_mm_maddubs_epi16(keys.raw, query.raw)};
#elif HWY_TARGET == HWY_AVX2
  return V{_mm256_maddubs_epi16(keys.raw, query.raw)};
#else
  return V{_mm512_maddubs_epi16(keys.raw, query.raw)};
#endif
}

// Norm of differences from rounded elements. A difference is itself rounded, as is the scale: an
// error of two ulps of each element, of which `norm` is the norm.
inline float RoundingNorm(float square, size_t depth, float norm) {
  return RoundUpNorm(square, depth) + 2.4e-7f * norm;
}

// What multiplies a row to make it integers.
inline float QueryInverseScale(const float* HWY_RESTRICT row, size_t stride, float top) {
  if (top < kSmallestScreened) return 0.0f;
  float four = 0.0f;
  for (size_t e = 0; e + 8 <= stride; e += 8) {
    for (size_t i = 0; i < 4; i += 2) {
      four = std::max(four, std::abs(row[e + i]) + std::abs(row[e + i + 1]) +
                                std::abs(row[e + i + 4]) + std::abs(row[e + i + 5]));
    }
  }
  return std::min(kLargestQuery / top, kLargestFour / four);
}

// query: kTileRows rows of `stride` floats, a multiple of the tile's width; zeros behind `depth`.
// rounded: [depth/4][kTileRows][4] int8, depth up to a multiple of eight.
// False if a row is not finite or too large: it must not be screened.
inline bool RoundQueriesInt7Impl(const float* HWY_RESTRICT query, size_t stride, size_t depth,
                                 uint8_t* HWY_RESTRICT rounded, ScreenRows* HWY_RESTRICT rows) {
  const hn::ScalableTag<float> d;
  const hn::ScalableTag<int32_t> di;
  const auto padded =
      static_cast<size_t>(ScreenDepth(Screening::kInt7, static_cast<int64_t>(depth)));
  std::fill_n(rows->norm, 16, 0.0f);
  std::fill_n(rows->rounding, 16, 0.0f);
  std::fill_n(rows->inverse_scale, 16, 0.0f);
  std::fill_n(rows->offset, 16, 0);
  for (size_t r = 0; r < kTileRows; ++r) {
    const float* row = query + r * stride;
    auto largest = hn::Zero(d);
    auto square = hn::Zero(d);
    for (size_t e = 0; e < stride; e += hn::Lanes(d)) {
      const auto x = hn::LoadU(d, row + e);
      largest = hn::Max(largest, hn::Abs(x));
      square = hn::MulAdd(x, x, square);
    }
    // NaN is in the norm, whatever it does to a maximum.
    rows->norm[r] = RoundUpNorm(hn::GetLane(hn::SumOfLanes(d, square)), depth);
    if (!(rows->norm[r] < kLargestScreenNorm)) return false;
    const float top = hn::GetLane(hn::MaxOfLanes(d, largest));
    const float inverse = QueryInverseScale(row, stride, top);
    const auto scale = hn::Set(d, inverse > 0.0f ? 1.0f / inverse : 0.0f);
    auto error = hn::Zero(d);
    int32_t total = 0;
    HWY_ALIGN int32_t integer[HWY_MAX_BYTES / sizeof(int32_t)];
    for (size_t e = 0; e < stride; e += hn::Lanes(d)) {
      const auto x = hn::LoadU(d, row + e);
      const auto n = hn::NearestInt(hn::Mul(x, hn::Set(d, inverse)));
      const auto rest = hn::NegMulAdd(hn::ConvertTo(d, n), scale, x);
      error = hn::MulAdd(rest, rest, error);
      hn::Store(n, di, integer);
      for (size_t k = 0; k < hn::Lanes(d) && e + k < padded; k += 4) {
        uint32_t four = 0;
        for (size_t i = 0; i < 4; ++i) {
          four |= (static_cast<uint32_t>(integer[k + i]) & 0xFFu) << (8 * i);
          total += integer[k + i];
        }
        hwy::CopyBytes<4>(&four, rounded + ((e + k) * kTileRows + 4 * r));
      }
    }
    rows->offset[r] = kKeyOffset * total;
    rows->inverse_scale[r] = inverse;
    rows->rounding[r] = RoundingNorm(hn::GetLane(hn::SumOfLanes(d, error)), depth, rows->norm[r]);
  }
  return true;
}

// block: [depth][tile's width]. rounded: [depth/4][tile's width][4] bytes, depth up to a multiple
// of eight. Fills all of `bound` but the norm.
inline void RoundKeysInt7Impl(const float* HWY_RESTRICT block, size_t depth,
                              uint8_t* HWY_RESTRICT rounded, KeyBlockBound* HWY_RESTRICT bound) {
  if (ProvesNothing(bound)) return;
  constexpr size_t kWidth = TileWidth<float>();
  const hn::ScalableTag<float> d;
  const hn::ScalableTag<int32_t> di;
  const hn::ScalableTag<uint8_t> du8;
  const auto padded =
      static_cast<size_t>(ScreenDepth(Screening::kInt7, static_cast<int64_t>(depth)));
  auto largest = hn::Zero(d);
  for (size_t i = 0; i < depth * kWidth; i += hn::Lanes(d)) {
    largest = hn::Max(largest, hn::Abs(hn::LoadU(d, block + i)));
  }
  const float top = hn::GetLane(hn::MaxOfLanes(d, largest));
  const auto inverse = hn::Set(d, top < kSmallestScreened ? 0.0f : kLargestKey / top);
  const auto scale = hn::Set(d, top / kLargestKey);
  auto most_error = hn::Zero(d);
  auto most_square = hn::Zero(d);
  for (size_t j = 0; j < kWidth; j += hn::Lanes(d)) {
    auto error = hn::Zero(d);
    auto square = hn::Zero(d);
    for (size_t e = 0; e < padded; e += 4) {
      auto four = hn::Zero(di);
      for (size_t i = 4; i-- > 0;) {
        auto n = hn::Zero(di);
        if (e + i < depth) {
          const auto x = hn::LoadU(d, block + (e + i) * kWidth + j);
          n = hn::NearestInt(hn::Mul(x, inverse));
          const auto y = hn::Mul(hn::ConvertTo(d, n), scale);
          const auto rest = hn::Sub(x, y);
          error = hn::MulAdd(rest, rest, error);
          square = hn::MulAdd(y, y, square);
        }
        four = hn::Or(hn::ShiftLeft<8>(four), hn::Add(n, hn::Set(di, kKeyOffset)));
      }
      hn::StoreU(hn::BitCast(du8, four), du8, rounded + e * kWidth + 4 * j);
    }
    most_error = hn::Max(most_error, error);
    most_square = hn::Max(most_square, square);
  }
  bound->inverse_scale = hn::GetLane(inverse);
  bound->rounding = RoundingNorm(hn::GetLane(hn::MaxOfLanes(d, most_error)), depth, bound->norm);
  bound->rounded_norm = RoundUpNorm(hn::GetLane(hn::MaxOfLanes(d, most_square)), depth);
}

// Where the sums of a tile start, so that those at or above zero are perhaps above the limit: minus
// the limits in units of the integers. False if norms alone leave the tile out.
HWY_INLINE bool StartOfSumsInt7(const ScreenRows& rows, const KeyBlockBound& bound,
                                const float* HWY_RESTRICT limit, float slack,
                                int32_t* HWY_RESTRICT start) {
  const hn::ScalableTag<float> d;
  const hn::ScalableTag<int32_t> di;
  const auto most = hn::Set(d, kLargestSum);
  const auto least = hn::Set(d, -kLargestSum);
  bool open = false;
  for (size_t i = 0; i < kTileRows; i += hn::Lanes(d)) {
    const auto norm = hn::Load(d, rows.norm + i);
    const auto raw = hn::LoadU(d, limit + i);
    // No product of the block can be above the limit. Rounding: the norms have room.
    const auto largest = hn::Mul(norm, hn::Set(d, bound.norm));
    const auto margin = hn::NegMulAdd(largest, hn::Set(d, slack), raw);
    const auto closed = hn::Le(largest, margin);
    open = open || !hn::AllTrue(d, closed);
    auto low = hn::NegMulAdd(norm, hn::Set(d, bound.rounding), margin);
    low = hn::NegMulAdd(hn::Load(d, rows.rounding + i), hn::Set(d, bound.rounded_norm), low);
    // In units of the integers, with the roundings of these few operations: 2⁻²⁰ of all that was
    // added, and one unit.
    low = hn::NegMulAdd(hn::Add(hn::Abs(raw), largest), hn::Set(d, 1e-6f), low);
    // One scale after the other, because their product may be infinite. Where the tile is open,
    // low is at most `largest`, and stays finite.
    low =
        hn::Mul(hn::Mul(low, hn::Load(d, rows.inverse_scale + i)), hn::Set(d, bound.inverse_scale));
    low = hn::Sub(low, hn::Set(d, 1.0f));
    // NaN, of zero scales, is not above the least either.
    low = hn::IfThenElse(hn::Gt(low, least), hn::Min(low, most), least);
    low = hn::IfThenElse(closed, most, low);
    const auto integer = hn::Add(hn::ConvertTo(di, hn::Floor(low)), hn::Load(di, rows.offset + i));
    hn::Store(hn::Neg(integer), di, start + i);
  }
  return open;
}

// Tests one tile, as ScreenTileInt8() does.
HWY_INLINE void ScreenTileInt7Impl(const ScreenRows& rows, const uint8_t* HWY_RESTRICT query,
                                   const KeyBlockBound& bound, const uint8_t* HWY_RESTRICT keys,
                                   size_t depth, const float* HWY_RESTRICT limit, float slack,
                                   uint32_t tag, ScreenHits* HWY_RESTRICT hits) {
  const hn::ScalableTag<int32_t> d;
  const hn::ScalableTag<int16_t> d16;
  const hn::ScalableTag<uint8_t> du8;
  const size_t lanes = hn::Lanes(d);
  HWY_ALIGN int32_t start[16];
  if (!StartOfSumsInt7(rows, bound, limit, slack, start)) return;
  Tile<int32_t> sum;
  HWY_UNROLL(kTileRows)
  for (int r = 0; r < kTileRows; ++r) sum.row[r][0] = sum.row[r][1] = hn::Set(d, start[r]);
  auto unused = hn::Zero(d);
  const auto ones = hn::Set(d16, 1);
  const auto load = [&](const uint8_t* at)
                        HWY_ATTR { return hn::BitCast(d16, hn::LoadU(du8, at)); };
  const auto four = [&](const uint8_t* at) HWY_ATTR {
    int32_t bytes;
    hwy::CopyBytes<4>(at, &bytes);
    return hn::BitCast(d16, hn::Set(d, bytes));
  };
  constexpr size_t kFourKeys = 4 * TileWidth<float>();
  for (size_t e = 0; e < depth; e += 8) {
    HWY_UNROLL(kTileVectors)
    for (int v = 0; v < kTileVectors; ++v) {
      // Both vectors of keys take the same bytes of the query: without a fence GCC keeps those of
      // all rows in registers, for which there is no room.
      HWY_FENCE;
      const uint8_t* at = keys + e * TileWidth<float>() + static_cast<size_t>(v) * 4 * lanes;
      const auto k0 = load(at);
      const auto k1 = load(at + kFourKeys);
      HWY_UNROLL(kTileRows)
      for (int r = 0; r < kTileRows; ++r) {
        const uint8_t* q = query + e * kTileRows + 4 * static_cast<size_t>(r);
        const auto products =
            hn::Add(MultiplyBytes(k0, four(q)), MultiplyBytes(k1, four(q + 4 * kTileRows)));
        sum.row[r][v] = hn::ReorderWidenMulAccumulate(d, products, ones, sum.row[r][v], unused);
      }
    }
  }
  // In most tiles every sum is negative.
  auto all = hn::And(sum.row[0][0], sum.row[0][1]);
  HWY_UNROLL(kTileRows)
  for (int r = 1; r < kTileRows; ++r) all = hn::And(all, hn::And(sum.row[r][0], sum.row[r][1]));
  const auto zero = hn::Zero(d);
  if (hn::AllTrue(d, hn::Lt(all, zero))) return;
  size_t count = hits->count;
  HWY_UNROLL(kTileRows)
  for (int r = 0; r < kTileRows; ++r) {
    uint8_t bits[2][8] = {};
    hn::StoreMaskBits(d, hn::Lt(sum.row[r][0], zero), bits[0]);
    hn::StoreMaskBits(d, hn::Lt(sum.row[r][1], zero), bits[1]);
    const uint32_t half = (uint32_t{1} << lanes) - 1;
    const auto word = [](const uint8_t* b) { return uint32_t{b[0]} | uint32_t{b[1]} << 8; };
    const uint32_t above = (~word(bits[0]) & half) | (~word(bits[1]) & half) << lanes;
    // Without a branch, since which rows have a hit cannot be predicted.
    hits->above[count] = above;
    hits->where[count] = tag + static_cast<uint32_t>(r);
    count += above != 0 ? 1 : 0;
  }
  hits->count = count;
}

#else

constexpr bool kScreensInt7 = false;

inline bool RoundQueriesInt7Impl(const float*, size_t, size_t, uint8_t*, ScreenRows*) {
  return false;
}
inline void RoundKeysInt7Impl(const float*, size_t, uint8_t*, KeyBlockBound*) {}
inline void ScreenTileInt7Impl(const ScreenRows&, const uint8_t*, const KeyBlockBound&,
                               const uint8_t*, size_t, const float*, float, uint32_t, ScreenHits*) {
}

#endif

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#endif  // FLASH_ENTMAX_SRC_CPU_SCREEN_INT7_INL_H_
