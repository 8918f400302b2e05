// Screening with keys of 7 bits (screening.h) with the instruction set in use, for code that is not
// compiled for each of them. The kernels themselves are in screen_int7-inl.h.

#ifndef FLASH_ENTMAX_SRC_CPU_SCREEN_INT7_H_
#define FLASH_ENTMAX_SRC_CPU_SCREEN_INT7_H_

#include <cstddef>
#include <cstdint>

#include "cpu/screening.h"

namespace flash_entmax::cpu {

// Whether the instruction set in use has them. The other functions do nothing where it has not.
bool CanScreenInt7();

// query: a tile's rows of `stride` floats, a multiple of its width; zeros behind `depth`. rounded:
// [depth/4][rows][4] int8, depth up to a multiple of eight.
// False if a row is not finite or too large: it must not be screened.
bool RoundQueriesInt7(const float* query, size_t stride, size_t depth, uint8_t* rounded,
                      ScreenRows* rows);

// block: [depth][tile's width]. rounded: [depth/4][tile's width][4] bytes, depth up to a multiple
// of eight. Fills all of `bound` but the norm.
void RoundKeysInt7(const float* block, size_t depth, uint8_t* rounded, KeyBlockBound* bound);

// Tests one tile. limit[r], 16 numbers: raw products at or below it need not be found; products of
// floats that are summed in any order may exceed exact ones by slack·‖q‖·‖k‖. Appends the rows with
// a hit to `hits`, which has room.
void ScreenTileInt7(const ScreenRows& rows, const uint8_t* query, const KeyBlockBound& bound,
                    const uint8_t* keys, size_t depth, const float* limit, float slack,
                    uint32_t tag, ScreenHits* hits);

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_SCREEN_INT7_H_
