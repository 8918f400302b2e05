// Tiles in shared memory, plan and sizes of the sweeping short forward kernel.
// forward_short_sweeps.cuh has the algorithm.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_SHAPE_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_SHAPE_CUH_

#include "general/forward_common.cuh"

namespace flash_entmax::cuda::forward {

// Rows of 32 or 64 elements of 16 bits in shared memory without padding. The 16-byte pieces of a
// row are permuted, so that eight rows of ldmatrix, and accumulators stored by a warp, meet no bank
// conflicts. Rows and pieces that differ by an exclusive or have addresses that differ by one, if
// the tile starts at a multiple of 128 bytes.
template <class Element, int kColumns>
struct SwizzledTile {
  static_assert(sizeof(Element) == 2 && (kColumns == 32 || kColumns == 64));
  static constexpr int kPieces = kColumns / 8;
  static constexpr int kRowBytes = 2 * kColumns;

  Element* data;

  // Unsigned: quotients and remainders are then shifts and masks.
  __device__ __forceinline__ Element* At(unsigned row, unsigned column) const {
    const unsigned piece = (column / 8) ^ (row / (8 / kPieces) % kPieces);
    return data + row * kColumns + piece * 8 + column % 8;
  }
};

// How a launch of the sweeping kernel covers the problem.
struct SweepPlan {
  int warps = 0;       // of a block
  int turns = 1;       // strips for each warp, on average
  int strip_rows = 0;  // queries of a strip
  int key_rows = 0;    // keys in shared memory, at most
  int tiles = 0;       // blocks a head

  FLASH_ENTMAX_HOST_DEVICE int BlockRows() const { return strip_rows * warps * turns; }
};

template <int kHeadDim>
struct SweepShape {
  // Of 16 queries, that a warp works on together. Two halve what is read from shared memory; one
  // leaves room for more warps: 24 of 80 registers a thread, where two took 128.
  static constexpr int kStrips = kHeadDim == 32 ? 1 : 2;
  static constexpr int kQueries = kStripRows * kStrips;
  static constexpr int kMostBlocks = 32;  // of 16 keys that a strip sees: the bits of a word
  // Registers of a thread: 80, or 168.
  static constexpr int kMaxThreads = 384;
  static constexpr int kMinBlocks = kHeadDim == 32 ? 2 : 1;
  // Entries of one row that a thread can list, and slots for two rows together.
  static constexpr int kHeld = 16;
  static constexpr int kSlots = 2 * kHeld;
  // Of a warp: its lists.
  static constexpr int kWarpBytes = kStrips * kSlots * 32 * static_cast<int>(sizeof(float));

  // Keys, values, the warps' lists, and the number of the next strip.
  static constexpr size_t Bytes(const SweepPlan& plan) {
    return static_cast<size_t>(2 * plan.key_rows) * kHeadDim * 2 +
           static_cast<size_t>(plan.warps) * kWarpBytes + 16;
  }
};

}  // namespace flash_entmax::cuda::forward

#endif  // FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SWEEPS_SHAPE_CUH_
