// Certified screening: products of queries and keys in small integers, with a bound on their error.
//
// A query row is q = a·q' + δq and a key k = b·k' + δk with small integers q' and k', one scale a
// for each query row and one b for each key block. Then
//     |q·k − a·b·(q'·k')| ≤ ‖q‖·‖δk‖ + ‖δq‖·‖b·k'‖,
// (q·δk + δq·(b·k'), Cauchy–Schwarz), and q'·k' is exact. A key whose integer product is below the
// row's limit less this error cannot be above the limit. All norms are rounded up, and all limits
// down, so the answer "not above" is a proof; "perhaps above" costs an exact product.
//
// Integers of 8 bits (screen_int8.h, AVX-512 VNNI and AMX), or of 7 in the keys (screen_int7-inl.h,
// other x86 from SSE4 on).

#ifndef FLASH_ENTMAX_SRC_CPU_SCREENING_H_
#define FLASH_ENTMAX_SRC_CPU_SCREENING_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace flash_entmax::cpu {

enum class Screening { kNone, kInt7, kInt8 };

// What is known of the keys of one block. With an infinite `rounding` it proves nothing.
struct KeyBlockBound {
  float norm = 0.0f;           // Largest ‖k‖, rounded up.
  float rounding = 0.0f;       // Largest ‖δk‖, rounded up.
  float rounded_norm = 0.0f;   // Largest ‖b·k'‖, rounded up.
  float inverse_scale = 1.0f;  // 1/b.
};

// A norm rounded up, from a sum of `size` squares in float or double: its relative error is below
// size·2⁻²⁴, and squares below the smallest normal float may be lost.
inline float NormFromSquare(double square, int64_t size) {
  const auto count = static_cast<double>(size);
  return static_cast<float>(std::sqrt(square) * (1.0 + 2e-7 * (count + 8.0)) +
                            2e-19 * std::sqrt(count));
}

// The same from a sum in float.
inline float RoundUpNorm(float square, size_t size) {
  return NormFromSquare(static_cast<double>(square), static_cast<int64_t>(size));
}

// Sums and what they are compared with stay within ±2²⁸, far inside an int32.
inline constexpr float kLargestSum = 0x1p28f;
// Larger head sizes might overflow the 32-bit sums.
inline constexpr int64_t kMaxScreenDepth = 8192;

// Rows and blocks of larger norms are not screened: their products come near the end of float.
inline constexpr float kLargestScreenNorm = 1e18f;

// For a block that is not rounded, because its norm is too large or NaN: makes it prove nothing.
inline bool ProvesNothing(KeyBlockBound* bound) {
  if (bound->norm < kLargestScreenNorm) return false;
  bound->rounding = std::numeric_limits<float>::infinity();
  return true;
}

// Rows and blocks whose largest element is below it are rounded to zeros, so that no scale
// overflows.
inline constexpr float kSmallestScreened = 1e-30f;

// Bytes of a rounded row: the head size up to a whole step of the tile.
inline constexpr int64_t ScreenDepth(Screening screening, int64_t head_size) {
  const int64_t step = screening == Screening::kInt8 ? 4 : 8;
  return (head_size + step - 1) / step * step;
}

// Bytes of `count` rounded rows or keys.
inline constexpr int64_t ScreenBytes(Screening screening, int64_t count, int64_t head_size) {
  return screening == Screening::kNone ? 0 : count * ScreenDepth(screening, head_size);
}

// A hit names its block in 25 bits beside a group and a row of 7.
inline constexpr int64_t kMaxScreenBlocks = int64_t{1} << 25;

// The rows of one tile, rounded; arrays as long as the longest vector.
struct ScreenRows {
  alignas(64) float norm[16];           // ‖q‖, rounded up; 0 behind the tile's rows.
  alignas(64) float rounding[16];       // ‖δq‖, rounded up.
  alignas(64) float inverse_scale[16];  // 1/a.
  alignas(64) int32_t offset[16];       // 128·Σ q' or 64·Σ q': keys are stored as k' + that.
  bool matrix_unit = false;             // The rounded rows are laid out for it; see MatrixUnit.
};

// Keys that a screened tile lets through: entry i says that the keys of the bits of above[i] may be
// above the limit of row `where[i] − tag`.
struct ScreenHits {
  static constexpr size_t kCapacity = 2048;
  static constexpr size_t kMostRows = 12;  // Of a tile.
  // Sums of the last two tiles and where they start. What the matrix unit stores takes a while to
  // arrive, so a tile is looked at when the next one is on its way.
  alignas(64) int32_t start[2][16];
  alignas(64) int32_t sums[2][kMostRows][32];
  // A tile writes whole vectors.
  alignas(64) uint32_t above[kCapacity + 16];
  alignas(64) uint32_t where[kCapacity + 16];
  size_t count = 0;
  uint32_t tag = 0;  // Of the tile that is not looked at yet, if there is one.
  int slot = 0;
  bool pending = false;
  // The keys in the matrix unit's registers, and those to be fetched; no longer than until
  // FinishHits().
  const uint8_t* loaded = nullptr;
  uintptr_t ahead = 0;

  // For the tile that is pending and one more.
  bool HasRoom() const { return count + 2 * kMostRows <= kCapacity; }
  bool IsEmpty() const { return count == 0 && !pending; }
  // Forgets what an earlier panel may have left when it ran out of memory.
  void Clear() {
    count = 0;
    pending = false;
    loaded = nullptr;
  }
};

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_SCREENING_H_
