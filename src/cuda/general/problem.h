// What the general GPU kernels work on: every feature of the public API, any device from compute
// capability 8.0 on. Plain structs shared by the host plan and the kernels.
//
// A row is one query position of one head. With packed sequences (cu_query, cu_key) the batch is 1
// and `queries`, `keys` count the rows of all sequences together.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_PROBLEM_H_
#define FLASH_ENTMAX_CUDA_GENERAL_PROBLEM_H_

#include <cstdint>

#include "math/host_device.h"

namespace flash_entmax::cuda {

// A (batch, head, row, column) tensor on the device; strides count elements.
struct StridedTensor {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 1;
  // Every row starts at a multiple of 16 bytes and its columns are contiguous.
  bool vectors = false;

  template <class Element>
  FLASH_ENTMAX_HOST_DEVICE Element* Row(int b, int h, int64_t r) const {
    return static_cast<Element*>(data) + b * batch + h * head + r * row;
  }
};

struct GeneralProblem {
  static constexpr int kUnlimited = 1 << 30;

  int batch = 1;
  int heads = 1;
  int kv_heads = 1;
  int group = 1;      // heads / kv_heads
  int queries = 1;    // rows of the query tensor
  int keys = 1;       // rows of the key tensor
  int head_dim = 1;   // columns of query and key
  int value_dim = 1;  // columns of value and output

  float alpha = 1.5f;                     // in (1, 2]
  const float* alpha_per_head = nullptr;  // [heads] or null; replaces alpha
  float scale = 1.0f;
  const float* query_scale = nullptr;  // factor per row, or null
  int64_t query_scale_stride[3] = {};  // batch, head, row
  const float* slopes = nullptr;       // [heads]: ALiBi, or null
  float softcap = 0.0f;                // 0: none

  bool causal = false;
  int window_left = kUnlimited;
  int window_right = kUnlimited;
  const int* key_lengths = nullptr;  // [batch] or null
  const int* cu_query = nullptr;     // [sequences + 1] or null
  const int* cu_key = nullptr;
  int sequences = 1;  // packed sequences; `batch` without packing
  // The longest sequence: bounds that the host knows. Without packing: queries and keys.
  int longest_query = 1;
  int longest_key = 1;

  // Query tiles of `rows` rows that a launch must cover for one head. With packed sequences some of
  // them may turn out to be empty (QueryTile::count == 0).
  FLASH_ENTMAX_HOST_DEVICE int64_t QueryTiles(int rows) const {
    return Tiles(cu_query != nullptr, queries, rows);
  }
  FLASH_ENTMAX_HOST_DEVICE int64_t KeyTiles(int rows) const {
    return Tiles(cu_key != nullptr, keys, rows);
  }

 private:
  FLASH_ENTMAX_HOST_DEVICE int64_t Tiles(bool packed, int64_t length, int rows) const {
    return packed ? length / rows + sequences : batch * ((length + rows - 1) / rows);
  }
};

// The part of the problem that a tile lies in: one sequence.
struct SequencePart {
  int batch = 0;
  int sequence = 0;     // its number; `batch` without packing
  int first_query = 0;  // row of the query tensor
  int first_key = 0;
  int queries = 0;
  int keys = 0;  // visible ones: key_lengths applied
};

// Numbers from which the kernels prove tiles zero before their product (tile_bounds.cuh), one for
// each group of kRows rows, counted within a sequence.
struct BoundGroups {
  static constexpr int kRows = 64;

  // Of the rows of one head. Where a sequence's groups start: at Of(...), see there.
  static FLASH_ENTMAX_HOST_DEVICE int64_t PerHead(const GeneralProblem& problem, bool keys) {
    return keys ? problem.KeyTiles(kRows) : problem.QueryTiles(kRows);
  }
  // The first group of a sequence for a head (keys: a key head). Packed sequences start at group
  // row / kRows + number: each is at least as far from the one before as that one has groups.
  static FLASH_ENTMAX_HOST_DEVICE int64_t Of(const GeneralProblem& problem,
                                             const SequencePart& part, int head, bool keys) {
    const int64_t groups = PerHead(problem, keys);
    if (problem.cu_query != nullptr) {
      return head * groups + (keys ? part.first_key : part.first_query) / kRows + part.sequence;
    }
    const int heads = keys ? problem.kv_heads : problem.heads;
    return (static_cast<int64_t>(part.batch) * heads + head) * (groups / problem.batch);
  }
};

// What the forward keeps for the backward. Rows are (batch * heads) x queries.
struct GeneralSaved {
  float* threshold = nullptr;  // tau in z = (alpha - 1) s; NaN for rows that see no key
  // Mean of V under u = p^(2 - alpha), contiguous rows of value_dim, in the element type. Only with
  // a backward to come that needs it (ShortBackwardPlan).
  void* weighted_value = nullptr;
};

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_PROBLEM_H_
