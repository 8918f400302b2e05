#ifndef FLASH_ENTMAX_CUDA_GENERAL_SHORT_BACKWARD_PLAN_H_
#define FLASH_ENTMAX_CUDA_GENERAL_SHORT_BACKWARD_PLAN_H_

#include "general/problem.h"

namespace flash_entmax::cuda {

// What the backward of short rows (backward_short.cuh) has in shared memory: a whole head of up to
// 32 columns of a 16-bit type. Without rows: it cannot do the problem. It needs no mean of V, and
// the saved one is null.
struct ShortBackwardPlan {
  static constexpr int kRowBytes = 2 * (32 + 8);
  static constexpr int kPairs = 256;  // of 16 queries and 16 keys

  int query_rows = 0;  // multiples of 16
  int key_rows = 0;
  int pair_tiles = 0;  // such pairs of tiles that see each other, at most

  static ShortBackwardPlan Of(const GeneralProblem& problem, int element_bytes,
                              bool alpha_gradient);

  int Bytes() const {
    // Inputs, two matrices of pairs, a number a query and a number a tile of queries.
    return 2 * kRowBytes * (query_rows + key_rows) + 2 * 2 * kPairs * pair_tiles + 4 * query_rows +
           4 * (query_rows / 16);
  }
};

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_SHORT_BACKWARD_PLAN_H_
