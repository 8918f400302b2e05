// Screening in 8-bit integers (screening.h), q' and k' in [−127, 127].
//
// The integer dot product of AVX-512 VNNI does four multiplications where a float lane does one, so
// a screened tile costs about a quarter of the float one, and reads a quarter of the bytes. Where
// the processor has a matrix unit for bytes (AMX) and the head size is a multiple of 64, it makes
// the same sums.

#ifndef FLASH_ENTMAX_SRC_CPU_SCREEN_INT8_H_
#define FLASH_ENTMAX_SRC_CPU_SCREEN_INT8_H_

#include <cstddef>
#include <cstdint>

#include "cpu/screening.h"

namespace flash_entmax::cpu {

// A screened tile has the shape of the float tile of AVX-512.
inline constexpr int kInt8Rows = 12;
inline constexpr int kInt8Keys = 32;

// The matrix unit of some processors (AMX) multiplies 12 x 64 by 64 x 16 bytes in 16 cycles. Its
// registers have a shape that belongs to the thread, and others in the process may rely on theirs:
// an object of this class sets the shape that ScreenTileInt8 needs and, at its end, puts back what
// was there. To be made and ended on the thread that screens.
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
bool CanScreenInt8();

// query: kInt8Rows rows of `depth` floats, `stride` apart. rounded:
// [depth/4][kInt8Rows][4], depth up to a multiple of four; for the matrix unit, which has to serve
// `depth` as long as the rows are used, [depth/64][kInt8Rows][64]. False if a row is not finite or
// too large: it must not be screened.
bool RoundQueriesInt8(const float* query, size_t stride, size_t depth, bool matrix_unit,
                      int8_t* rounded, ScreenRows* rows);

// block: [depth][kInt8Keys]. rounded: [depth/4][kInt8Keys][4]. Fills all of `bound` but
// the norm.
void RoundKeysInt8(const float* block, size_t depth, uint8_t* rounded, KeyBlockBound* bound);

// Looks at what is pending: to be called before the hits are read.
void FinishHits(ScreenHits* hits);

// Tests one tile. limit[r], 16 numbers: raw products at or below it need not be found; products of
// floats that are summed in any order may exceed exact ones by slack·‖q‖·‖k‖. Appends the rows with
// a hit to `hits`, which has room. The keys must stay as they are until FinishHits(), because the
// matrix unit does not load those of the tile before again.
void ScreenTileInt8(const ScreenRows& rows, const int8_t* query, const KeyBlockBound& bound,
                    const uint8_t* keys, size_t depth, const float* limit, float slack,
                    uint32_t tag, ScreenHits* hits);

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_SCREEN_INT8_H_
