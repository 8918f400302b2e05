// The host's plan: checked shape, kernel limits, and where everything lies in the caller's buffers.
#ifndef FLASH_ENTMAX_CUDA_PLAN_H_
#define FLASH_ENTMAX_CUDA_PLAN_H_

#include "c_interface.h"
#include "problem.h"

namespace flash_entmax::cuda {

struct ForwardScratch {
  CandidateEntry* lists;
  int* list_count;
  RowBound* bound;
  __half* half_keys;  // null for fp16 inputs
};

struct BackwardScratch {
  int* column_offset;
  ColumnEntry* column_entries;
  int* order;
  LongColumnTask* long_tasks;
  float* long_sums;
  float* tile_key_gradient;
  float* tile_value_gradient;
  int* tile_block_flag;
  float* delta;
  void* scan;
  size_t scan_bytes;
};

// Buffers at given base addresses (null bases give offsets).
struct SavedBuffers {
  Control* control;     // first of the part that is zeroed by every forward
  uint32_t* key_norms;  // (batch * kv_heads) x kKeyNorms
  SavedState state;
  size_t zeroed_bytes;
  size_t bytes;
};

struct Plan {
  Shape shape;
  AlphaMode alpha_mode;
  int head_dim;
  int padded_keys;
  int heads_per_launch;  // screening and finish run in slices that bound the lists' memory
  int deferred_keys;
  bool tiles_only;
  bool is_fp16;
  bool save;
  bool scaled;
  int64_t support_capacity;

  SavedBuffers Saved(void* base) const;
  ForwardScratch Forward(void* base, size_t* bytes) const;
  BackwardScratch Backward(void* base, size_t* bytes) const;
};

// Returns an error code of c_interface.h.
int MakePlan(const FlashEntmaxProblem& problem, Plan* plan);

// Temporary bytes of an exclusive sum over `count` integers, and the sum itself.
size_t ExclusiveSumBytes(int64_t count);
cudaError_t ExclusiveSum(void* scratch, size_t bytes, const int* input, int* output, int64_t count,
                         cudaStream_t stream);

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_PLAN_H_
