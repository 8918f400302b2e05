// Where the lanes of a vector come from when those of set bits move to its beginning, for
// instruction sets that cannot do so by themselves; see compress-inl.h.

#ifndef FLASH_ENTMAX_SRC_CPU_COMPRESS_TABLES_H_
#define FLASH_ENTMAX_SRC_CPU_COMPRESS_TABLES_H_

#include <array>
#include <cstddef>
#include <cstdint>

namespace flash_entmax::cpu {

// For every set of bits of a vector of kLanes lanes: which lane goes to each place, those of set
// bits first, in order. A lane is kParts words or bytes, whichever the instruction moves, and the
// table numbers these.
template <size_t kLanes, size_t kParts>
constexpr std::array<uint8_t, (size_t{1} << kLanes) * kLanes * kParts> CompressTable() {
  std::array<uint8_t, (size_t{1} << kLanes)* kLanes* kParts> table = {};
  for (size_t bits = 0; bits < size_t{1} << kLanes; ++bits) {
    size_t place = bits * kLanes * kParts;
    for (const size_t wanted : {size_t{1}, size_t{0}}) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        if ((bits >> lane & 1) != wanted) continue;
        for (size_t part = 0; part < kParts; ++part) {
          table[place++] = static_cast<uint8_t>(lane * kParts + part);
        }
      }
    }
  }
  return table;
}

// Words of four bytes of a vector of 32 bytes, and bytes of one of 16; lanes of kBytes bytes.
template <size_t kBytes>
alignas(64) inline constexpr auto kWordsOf = CompressTable<32 / kBytes, kBytes / 4>();
template <size_t kBytes>
alignas(64) inline constexpr auto kBytesOf = CompressTable<16 / kBytes, kBytes>();

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_COMPRESS_TABLES_H_
