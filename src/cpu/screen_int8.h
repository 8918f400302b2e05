// Certified screening: products of queries and keys in 8-bit integers, with a bound on their error.
//
// A query row is q = a·q' + δq and a key k = b·k' + δk with integers q' in [−127, 127] and k' in
// [−127, 127], one scale a for each query row and one b for each key block. Then
//     |q·k − a·b·(q'·k')| ≤ ‖q‖·‖δk‖ + ‖δq‖·‖b·k'‖,
// (q·δk + δq·(b·k'), Cauchy–Schwarz), and q'·k' is exact. A key whose integer product is below the
// row's limit less this error cannot be above the limit. All norms are rounded up, and all limits
// down, so the answer "not above" is a proof; "perhaps above" costs an exact product.
//
// The integer dot product of AVX-512 VNNI does four multiplications where a float lane does one, so
// a screened tile costs about a quarter of the float one, and reads a quarter of the bytes. Where
// the processor has a matrix unit for bytes (AMX) and the head size is a multiple of 64, it makes
// the same sums.

#ifndef FLASH_ENTMAX_SRC_CPU_SCREEN_INT8_H_
#define FLASH_ENTMAX_SRC_CPU_SCREEN_INT8_H_

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace flash_entmax::cpu {

// What is known of the keys of one block. Infinite or NaN norms prove nothing.
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

// A screened tile has the shape of the float tile of AVX-512.
inline constexpr int kScreenRows = 12;
inline constexpr int kScreenKeys = 32;
// Larger head sizes might overflow the 32-bit sums.
inline constexpr int64_t kMaxScreenDepth = 8192;

// Rows and blocks of larger norms are not screened: their products come near the end of float.
inline constexpr float kLargestScreenNorm = 1e18f;

inline constexpr int64_t ScreenDepth(int64_t head_size) { return (head_size + 3) / 4 * 4; }

// The rows of one tile, rounded; arrays as long as a vector.
struct ScreenRows {
  alignas(64) float norm[16];           // ‖q‖, rounded up; 0 behind the last row.
  alignas(64) float rounding[16];       // ‖δq‖, rounded up.
  alignas(64) float inverse_scale[16];  // 1/a.
  alignas(64) int32_t offset[16];       // 128·Σ q', since keys are stored as k' + 128.
  bool matrix_unit = false;             // The rounded rows are laid out for it; see MatrixUnit.
};

// The matrix unit of some processors (AMX) multiplies 12 x 64 by 64 x 16 bytes in 16 cycles. Its
// registers have a shape that belongs to the thread, and others in the process may rely on theirs:
// an object of this class sets the shape that ScreenTile needs and, at its end, puts back what was
// there. To be made and ended on the thread that screens.
class MatrixUnit {
 public:
  MatrixUnit();
  ~MatrixUnit();
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

  // Whether this build, machine and operating system have it, for this head size.
  bool Serves(size_t depth) const { return ready_ && depth % 64 == 0; }

 private:
  bool ready_ = false;
  alignas(64) uint8_t before_[64] = {};
};

// Whether this build and this machine have the instructions.
bool CanScreen();

// query: kScreenRows rows of `depth` floats, `stride` apart. rounded:
// [ScreenDepth/4][kScreenRows][4]; for the matrix unit, which has to serve `depth` as long as the
// rows are used, [depth/64][kScreenRows][64].
// False if a row is not finite or too large: it must not be screened.
bool RoundQueries(const float* query, size_t stride, size_t depth, bool matrix_unit,
                  int8_t* rounded, ScreenRows* rows);

// block: [depth][kScreenKeys]. rounded: [ScreenDepth/4][kScreenKeys][4]. Fills all of `bound` but
// the norm. Blocks whose norm is not finite are left alone.
void RoundKeys(const float* block, size_t depth, uint8_t* rounded, KeyBlockBound* bound);

// Keys that a screened tile lets through: entry i says that the keys of the bits of above[i] may be
// above the limit of row `where[i] − tag`.
struct ScreenHits {
  static constexpr size_t kCapacity = 2048;
  // Sums of the last two tiles and where they start. What the matrix unit stores takes a while to
  // arrive, so a tile is looked at when the next one is on its way.
  alignas(64) int32_t start[2][16];
  alignas(64) int32_t sums[2][kScreenRows][kScreenKeys];
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
  bool HasRoom() const { return count + 2 * size_t{kScreenRows} <= kCapacity; }
  bool IsEmpty() const { return count == 0 && !pending; }
};

// Looks at what is pending: to be called before the hits are read.
void FinishHits(ScreenHits* hits);

// Tests one tile. limit[r], 16 numbers: raw products at or below it need not be found; products of
// floats that are summed in any order may exceed exact ones by slack·‖q‖·‖k‖. Appends the rows with
// a hit to `hits`, which has room. The keys must stay as they are until FinishHits(), because the
// matrix unit does not load those of the tile before again.
void ScreenTile(const ScreenRows& rows, const int8_t* query, const KeyBlockBound& bound,
                const uint8_t* keys, size_t depth, const float* limit, float slack, uint32_t tag,
                ScreenHits* hits);

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_SCREEN_INT8_H_
