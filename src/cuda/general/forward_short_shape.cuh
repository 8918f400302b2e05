// Sizes of the short forward kernel: how a launch covers the problem, what a block keeps in shared
// memory. forward_short.cuh has the algorithm and the kernel.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SHAPE_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SHAPE_CUH_

#include "general/forward_common.cuh"

namespace flash_entmax::cuda::forward {

// How a launch of the short kernel covers the problem.
struct ShortPlan {
  int teams = 0;       // warp groups a block, each with one strip at a time
  int stages = 1;      // a block's queries: stages * stage_rows
  int stage_rows = 0;  // kTurns strips for every team
  int key_rows = 0;    // keys in shared memory, at most
  int tiles = 0;       // blocks a head

  FLASH_ENTMAX_HOST_DEVICE int BlockRows() const { return stages * stage_rows; }
};

// kSplit: warps that share a strip. kHeldBlocks: of 16 keys, that one warp holds.
template <class Element, int kHeadDim, int kSplit, int kHeldBlocks = 8>
struct ShortShape {
  static constexpr int kBlocks = kHeldBlocks;
  static constexpr int kCapacity = 16 * kBlocks * kSplit;
  static constexpr int kTurns = 2;  // strips a team has in a stage
  // Threads of a block, at most: sets the registers of a thread, 96, 128 or 168.
  static constexpr int MaxThreads(bool fast) {
    if (kBlocks < 8) return fast ? 640 : 512;
    return kSplit > 1 || (fast && sizeof(Element) == 2) ? 512 : 384;
  }
  // Output columns whose sums a warp has at a time.
  static constexpr int kColumns = kSplit == 1 && kHeadDim >= 64 && sizeof(Element) == 2 ? 64 : 32;
  // Floats between rows of these sums in shared memory: free of bank conflicts.
  static constexpr int kColumnStride = kColumns + 8;
  static constexpr int kGroups = 8 * kSplit;  // of a row's keys, if split; for each a maximum
  static constexpr int kGroupStride = kGroups + 8;
  // Keys that a thread can list for its two rows together; as many as fit where the sums go later.
  static constexpr int kSlots = kColumnStride / 2;

  // What the warps of a team exchange.
  struct Team {
    union {
      alignas(16) float sums[kSplit][kStripRows][kColumnStride];  // over each warp's keys
      float maxima[kStripRows][kGroupStride];
      float list[kSlots][kSplit][32];  // each thread's keys above the bound: score - maximum
    };
    union {
      float2 newton[kSplit > 1 ? 2 : 1][kSplit][kStripRows];  // mass, slope; two slots
      alignas(8) int listed[kSplit > 1 ? 2 : 1][kSplit][32];  // lengths of each thread's lists
    };
    float2 start[kSplit > 1 ? kStripRows : 1];  // maximum, threshold; later threshold, failure
    float slope[kSplit][kStripRows];            // sum of u over each warp's keys
    float invalid[kStripRows];  // NaN for rows that must come out as NaN, otherwise 0
  };

  static constexpr size_t Bytes(const ShortPlan& plan) {
    using Tile = SharedTile<Element, kHeadDim>;
    const int query_rows = (plan.stages > 1 ? 2 : 1) * plan.stage_rows;
    return Tile::Bytes(2 * plan.key_rows + query_rows) + plan.teams * sizeof(Team);
  }
};

}  // namespace flash_entmax::cuda::forward

#endif  // FLASH_ENTMAX_CUDA_GENERAL_FORWARD_SHORT_SHAPE_CUH_
