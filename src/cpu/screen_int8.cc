#include "cpu/screen_int8.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FLASH_ENTMAX_HAS_SCREENING 1
#else
#define FLASH_ENTMAX_HAS_SCREENING 0
#endif

#if FLASH_ENTMAX_HAS_SCREENING

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own header leaves variables uninitialised on purpose, and then warns of them.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>

// Highway 1.0 has no integer dot product, so these few functions are written with intrinsics.
#define FLASH_ENTMAX_VNNI \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")))
#define FLASH_ENTMAX_AMX \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,amx-tile,amx-int8")))

namespace flash_entmax::cpu {
namespace {

// Adds the products of four unsigned and four signed bytes. Not the intrinsic, because GCC 12 then
// copies every accumulator at every step, which costs four times the products.
FLASH_ENTMAX_VNNI inline __attribute__((always_inline)) void MultiplyAdd(__m512i keys,
                                                                         __m512i query,
                                                                         __m512i* sum) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(keys), "v"(query));
}

}  // namespace

bool CanScreenInt8() {
  static const bool can = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512vnni");
  return can;
}

FLASH_ENTMAX_VNNI bool RoundQueriesInt8(const float* query, size_t stride, size_t depth,
                                        bool matrix_unit, int8_t* rounded, ScreenRows* rows) {
  rows->matrix_unit = matrix_unit;
  const auto padded =
      static_cast<size_t>(ScreenDepth(Screening::kInt8, static_cast<int64_t>(depth)));
  for (int r = kInt8Rows; r < 16; ++r) {
    rows->norm[r] = rows->rounding[r] = 0.0f;
    rows->inverse_scale[r] = 0.0f;
    rows->offset[r] = 0;
  }
  const __m512 sign = _mm512_set1_ps(-0.0f);
  for (int r = 0; r < kInt8Rows; ++r) {
    const float* row = query + static_cast<size_t>(r) * stride;
    __m512 largest = _mm512_setzero_ps();
    __m512 square = _mm512_setzero_ps();
    for (size_t e = 0; e < depth; e += 16) {
      const auto mask = static_cast<__mmask16>(depth - e >= 16 ? 0xFFFF : (1u << (depth - e)) - 1);
      const __m512 x = _mm512_maskz_loadu_ps(mask, row + e);
      largest = _mm512_max_ps(largest, _mm512_andnot_ps(sign, x));
      square = _mm512_fmadd_ps(x, x, square);
    }
    rows->norm[r] = RoundUpNorm(_mm512_reduce_add_ps(square), depth);
    if (!(rows->norm[r] < kLargestScreenNorm)) return false;
    const float top = _mm512_reduce_max_ps(largest);
    const float inverse = top < kSmallestScreened ? 0.0f : 127.0f / top;
    const float scale = top / 127.0f;
    const __m512 vinverse = _mm512_set1_ps(inverse);
    const __m512 vscale = _mm512_set1_ps(scale);
    __m512 error = _mm512_setzero_ps();
    __m512i sum = _mm512_setzero_si512();
    for (size_t e = 0; e < depth; e += 16) {
      const auto mask = static_cast<__mmask16>(depth - e >= 16 ? 0xFFFF : (1u << (depth - e)) - 1);
      const __m512 x = _mm512_maskz_loadu_ps(mask, row + e);
      const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(x, vinverse));
      const __m512 rest = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(n), vscale, x);
      error = _mm512_fmadd_ps(rest, rest, error);
      sum = _mm512_add_epi32(sum, n);
      alignas(16) int8_t bytes[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtsepi32_epi8(n));
      if (matrix_unit) {  // 64 elements of a row stand together.
        std::memcpy(rounded + e / 64 * 64 * kInt8Rows + static_cast<size_t>(r) * 64 + e % 64, bytes,
                    16);
        continue;
      }
      // Four elements of every row stand together.
      for (size_t k = 0; k < 16 && e + k < padded; k += 4) {
        std::memcpy(rounded + ((e + k) * kInt8Rows + static_cast<size_t>(r) * 4), bytes + k, 4);
      }
    }
    // The limits are divided by the scale that this number stands for; see ScreenTileInt8().
    rows->inverse_scale[r] = inverse;
    // The rest is itself rounded: an error of half an ulp of each element.
    rows->rounding[r] = RoundUpNorm(_mm512_reduce_add_ps(error), depth) + 1.2e-7f * rows->norm[r];
    rows->offset[r] = 128 * _mm512_reduce_add_epi32(sum);
  }
  return true;
}

FLASH_ENTMAX_VNNI void RoundKeysInt8(const float* block, size_t depth, uint8_t* rounded,
                                     KeyBlockBound* bound) {
  if (ProvesNothing(bound)) return;
  const __m512 sign = _mm512_set1_ps(-0.0f);
  __m512 largest = _mm512_setzero_ps();
  for (size_t i = 0; i < depth * kInt8Keys; i += 16) {
    largest = _mm512_max_ps(largest, _mm512_andnot_ps(sign, _mm512_loadu_ps(block + i)));
  }
  const float top = _mm512_reduce_max_ps(largest);
  const float inverse = top < kSmallestScreened ? 0.0f : 127.0f / top;
  const __m512 vinverse = _mm512_set1_ps(inverse);
  const __m512 vscale = _mm512_set1_ps(top / 127.0f);
  float rounding = 0.0f;
  float rounded_norm = 0.0f;
  for (size_t half = 0; half < kInt8Keys; half += 16) {
    __m512 error = _mm512_setzero_ps();
    __m512 square = _mm512_setzero_ps();
    for (size_t e = 0; e < depth; e += 4) {
      __m512i packed = _mm512_setzero_si512();
      for (size_t k = 0; k < 4; ++k) {
        __m512i n = _mm512_setzero_si512();
        if (e + k < depth) {
          const __m512 x = _mm512_loadu_ps(block + (e + k) * kInt8Keys + half);
          n = _mm512_cvtps_epi32(_mm512_mul_ps(x, vinverse));
          const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(n), vscale);
          const __m512 rest = _mm512_sub_ps(x, y);
          error = _mm512_fmadd_ps(rest, rest, error);
          square = _mm512_fmadd_ps(y, y, square);
        }
        n = _mm512_add_epi32(n, _mm512_set1_epi32(128));
        packed = _mm512_or_si512(packed, _mm512_sllv_epi32(n, _mm512_set1_epi32(int(8 * k))));
      }
      _mm512_storeu_si512(rounded + (e * kInt8Keys + half * 4), packed);
    }
    rounding = std::max(rounding, _mm512_reduce_max_ps(error));
    rounded_norm = std::max(rounded_norm, _mm512_reduce_max_ps(square));
  }
  bound->inverse_scale = inverse;
  bound->rounding = RoundUpNorm(rounding, depth) + 2.4e-7f * bound->norm;
  bound->rounded_norm = RoundUpNorm(rounded_norm, depth);
}

namespace {

// Where the sums of a tile start, so that those at or above zero are perhaps above the limit: minus
// the limits in units of the integers. False if norms alone leave the tile out.
FLASH_ENTMAX_VNNI inline __attribute__((always_inline)) bool StartOfSums(const ScreenRows& rows,
                                                                         const KeyBlockBound& bound,
                                                                         const float* limit,
                                                                         float slack,
                                                                         int32_t* start) {
  const __m512 norm = _mm512_load_ps(rows.norm);
  const __m512 raw = _mm512_loadu_ps(limit);
  // No product of the block can be above the limits of all rows. Rounding: the norms have room.
  const __m512 largest = _mm512_mul_ps(norm, _mm512_set1_ps(bound.norm));
  const __mmask16 rows_mask = (1u << kInt8Rows) - 1;
  const __m512 margin = _mm512_fnmadd_ps(largest, _mm512_set1_ps(slack), raw);
  const __mmask16 open = _mm512_mask_cmp_ps_mask(rows_mask, largest, margin, _CMP_NLE_UQ);
  if (open == 0) return false;
  __m512 low = _mm512_fnmadd_ps(norm, _mm512_set1_ps(bound.rounding), margin);
  low = _mm512_fnmadd_ps(_mm512_load_ps(rows.rounding), _mm512_set1_ps(bound.rounded_norm), low);
  // In units of the integers, with the roundings of these few operations: 2⁻²⁰ of all that was
  // added, and one unit.
  const __m512 size = _mm512_add_ps(_mm512_abs_ps(raw), largest);
  low = _mm512_fnmadd_ps(size, _mm512_set1_ps(1e-6f), low);
  // One scale after the other, because their product may be infinite. Where the tile is open, low
  // is at most `largest`, and stays finite.
  low = _mm512_mul_ps(_mm512_mul_ps(low, _mm512_load_ps(rows.inverse_scale)),
                      _mm512_set1_ps(bound.inverse_scale));
  low = _mm512_sub_ps(low, _mm512_set1_ps(1.0f));
  // Not beyond ±2²⁸: no product is. For NaN, of zero scales, the maximum takes its second operand.
  low = _mm512_max_ps(low, _mm512_set1_ps(-kLargestSum));
  low = _mm512_min_ps(low, _mm512_set1_ps(kLargestSum));
  low = _mm512_mask_mov_ps(_mm512_set1_ps(kLargestSum), open, low);
  const __m512i integer =
      _mm512_add_epi32(_mm512_cvt_roundps_epi32(low, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC),
                       _mm512_load_si512(rows.offset));
  _mm512_store_si512(start, _mm512_sub_epi32(_mm512_setzero_si512(), integer));
  return true;
}

// Appends the rows of which a sum is at or above zero.
FLASH_ENTMAX_VNNI inline __attribute__((always_inline)) void AppendHits(
    const __m512i (&sum)[kInt8Rows][2], uint32_t tag, ScreenHits* hits) {
  // Sums at or above zero are perhaps above; in most tiles every sign bit is set.
  __m512i all = _mm512_and_si512(sum[0][0], sum[0][1]);
#pragma GCC unroll 12
  for (int r = 1; r < kInt8Rows; ++r) {
    all = _mm512_ternarylogic_epi32(all, sum[r][0], sum[r][1], 0x80);
  }
  if (_mm512_movepi32_mask(all) == 0xFFFF) return;
  alignas(64) uint32_t above[16] = {};
#pragma GCC unroll 12
  for (int r = 0; r < kInt8Rows; ++r) {
    const __mmask32 below =
        _mm512_kunpackw(_mm512_movepi32_mask(sum[r][1]), _mm512_movepi32_mask(sum[r][0]));
    _store_mask32(&above[r], _knot_mask32(below));
  }
  // Without a branch for each row, since which rows have a hit cannot be predicted.
  const __m512i bits = _mm512_load_si512(above);
  const __mmask16 hit = _mm512_test_epi32_mask(bits, bits);
  const __m512i where =
      _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(tag)),
                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  _mm512_storeu_si512(hits->above + hits->count, _mm512_maskz_compress_epi32(hit, bits));
  _mm512_storeu_si512(hits->where + hits->count, _mm512_maskz_compress_epi32(hit, where));
  hits->count += static_cast<size_t>(__builtin_popcount(hit));
}

FLASH_ENTMAX_VNNI void ScreenByVectors(const int8_t* query, const uint8_t* keys, size_t depth,
                                       const int32_t* start, uint32_t tag, ScreenHits* hits) {
  __m512i sum[kInt8Rows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kInt8Rows; ++r) sum[r][0] = sum[r][1] = _mm512_set1_epi32(start[r]);
  for (size_t e = 0; e < depth; e += 4) {
    const __m512i k0 = _mm512_loadu_si512(keys + e * kInt8Keys);
    const __m512i k1 = _mm512_loadu_si512(keys + e * kInt8Keys + 64);
#pragma GCC unroll 12
    for (int r = 0; r < kInt8Rows; ++r) {
      int32_t four;
      std::memcpy(&four, query + e * kInt8Rows + static_cast<size_t>(r) * 4, 4);
      const __m512i q = _mm512_set1_epi32(four);
      MultiplyAdd(k0, q, &sum[r][0]);
      MultiplyAdd(k1, q, &sum[r][1]);
    }
  }
  AppendHits(sum, tag, hits);
}

FLASH_ENTMAX_VNNI void LookAtPending(ScreenHits* hits) {
  const int32_t* start = hits->start[hits->slot];
  const auto& sums = hits->sums[hits->slot];
  __m512i sum[kInt8Rows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kInt8Rows; ++r) {
    const __m512i first = _mm512_set1_epi32(start[r]);
    sum[r][0] = _mm512_add_epi32(first, _mm512_load_si512(&sums[r][0]));
    sum[r][1] = _mm512_add_epi32(first, _mm512_load_si512(&sums[r][16]));
  }
  AppendHits(sum, hits->tag, hits);
}

// The block that is visited next, most often the one before: into the first-level cache, a part for
// every tile of this one.
inline __attribute__((always_inline)) void PrefetchKeys(size_t depth, ScreenHits* hits) {
  constexpr size_t kTiles = 8;
  const size_t bytes = depth * kInt8Keys / kTiles;
  for (size_t i = 0; i < bytes; i += 64) {
    // A number because it may lie before the keys, where no pointer may point.
    // NOLINTNEXTLINE(performance-no-int-to-ptr)
    _mm_prefetch(reinterpret_cast<const char*>(hits->ahead + i), _MM_HINT_T0);
  }
  hits->ahead += bytes;
}

// Registers: 0 and 1 sums of 12 rows and 16 keys, 2 queries, 3 to 6 keys. Those of a block of up to
// 128 elements stay there for all groups of a panel.
FLASH_ENTMAX_AMX void ScreenByMatrixUnit(const int8_t* query, const uint8_t* keys, size_t depth,
                                         const int32_t* start, uint32_t tag, ScreenHits* hits) {
  const int slot = 1 - hits->slot;
  _tile_zero(0);
  _tile_zero(1);
  if (depth <= 128) {
    const uint8_t* more = keys + size_t{64} * kInt8Keys;
    if (hits->loaded != keys) {
      _tile_loadd(3, keys, 4 * kInt8Keys);
      _tile_loadd(4, keys + 64, 4 * kInt8Keys);
      if (depth == 128) {
        _tile_loadd(5, more, 4 * kInt8Keys);
        _tile_loadd(6, more + 64, 4 * kInt8Keys);
      }
      hits->loaded = keys;
      hits->ahead = reinterpret_cast<uintptr_t>(keys) - depth * kInt8Keys;
    }
    PrefetchKeys(depth, hits);
    _tile_loadd(2, query, 64);
    _tile_dpbsud(0, 2, 3);
    _tile_dpbsud(1, 2, 4);
    if (depth == 128) {
      _tile_loadd(2, query + size_t{64} * kInt8Rows, 64);
      _tile_dpbsud(0, 2, 5);
      _tile_dpbsud(1, 2, 6);
    }
  } else {
    for (size_t e = 0; e < depth; e += 64) {
      _tile_loadd(2, query + e * kInt8Rows, 64);
      _tile_loadd(3, keys + e * kInt8Keys, 4 * kInt8Keys);
      _tile_loadd(4, keys + e * kInt8Keys + 64, 4 * kInt8Keys);
      _tile_dpbsud(0, 2, 3);
      _tile_dpbsud(1, 2, 4);
    }
  }
  _tile_stored(0, hits->sums[slot], sizeof(hits->sums[slot][0]));
  _tile_stored(1, &hits->sums[slot][0][16], sizeof(hits->sums[slot][0]));
  _mm512_store_si512(hits->start[slot], _mm512_load_si512(start));
  if (hits->pending) LookAtPending(hits);
  hits->slot = slot;
  hits->tag = tag;
  hits->pending = true;
}

// What LDTILECFG reads: palette 1, bytes a row and rows of each register.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kInt8Rows, kInt8Rows, kInt8Rows, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);

// The processor has it (leaf 7, bits 24 and 25), and Linux lets this process use it.
bool HasMatrixUnit() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!CanScreenInt8() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kTilesAndInt8 = 3u << 24;
  if ((d & kTilesAndInt8) != kTilesAndInt8) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

FLASH_ENTMAX_AMX void SetShapes(const void* shapes, void* before) {
  _tile_storeconfig(before);
  _tile_loadconfig(shapes);
}
FLASH_ENTMAX_AMX void RestoreShapes(const void* shapes) { _tile_loadconfig(shapes); }

}  // namespace

MatrixUnit::MatrixUnit() {
  static const bool has = HasMatrixUnit();
  if (!has) return;
  static const TileShapes shapes;
  SetShapes(&shapes, before_);
  ready_ = true;
}

MatrixUnit::~MatrixUnit() {
  if (ready_) RestoreShapes(before_);
}

void FinishHits(ScreenHits* hits) {
  if (hits->pending) LookAtPending(hits);
  hits->pending = false;
  hits->loaded = nullptr;
}

FLASH_ENTMAX_VNNI void ScreenTileInt8(const ScreenRows& rows, const int8_t* query,
                                      const KeyBlockBound& bound, const uint8_t* keys, size_t depth,
                                      const float* limit, float slack, uint32_t tag,
                                      ScreenHits* hits) {
  alignas(64) int32_t start[16];
  if (!StartOfSums(rows, bound, limit, slack, start)) return;
  if (rows.matrix_unit) {
    ScreenByMatrixUnit(query, keys, depth, start, tag, hits);
  } else {
    FinishHits(hits);
    ScreenByVectors(query, keys, depth, start, tag, hits);
  }
}

}  // namespace flash_entmax::cpu

#else

namespace flash_entmax::cpu {

bool CanScreenInt8() { return false; }
void FinishHits(ScreenHits*) {}
MatrixUnit::MatrixUnit() = default;
MatrixUnit::~MatrixUnit() = default;
bool RoundQueriesInt8(const float*, size_t, size_t, bool, int8_t*, ScreenRows*) { return false; }
void RoundKeysInt8(const float*, size_t, uint8_t*, KeyBlockBound*) {}
void ScreenTileInt8(const ScreenRows&, const int8_t*, const KeyBlockBound&, const uint8_t*, size_t,
                    const float*, float, uint32_t, ScreenHits*) {}

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_HAS_SCREENING
