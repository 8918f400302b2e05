/* Plain C interface of the GPU engine: device pointers, sizes, strides, workspaces, a stream.
 *
 * Call order: flash_entmax_cuda_plan -> allocate the three buffers it reports -> forward ->
 * (optionally) backward with the same problem and the saved buffer untouched in between.
 * Nothing synchronises, allocates or prints. Functions return 0 or an error code;
 * flash_entmax_cuda_error_text explains it. */
#ifndef FLASH_ENTMAX_CUDA_C_INTERFACE_H_
#define FLASH_ENTMAX_CUDA_C_INTERFACE_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  FLASH_ENTMAX_OK = 0,
  FLASH_ENTMAX_BAD_SHAPE = 1,       /* a size is < 1, or heads is not a multiple of kv_heads */
  FLASH_ENTMAX_BAD_HEAD_DIM = 2,    /* allowed: 32, 64, 128 */
  FLASH_ENTMAX_BAD_ALPHA = 3,       /* allowed: 1 < alpha <= 2 */
  FLASH_ENTMAX_BAD_SCALE = 4,       /* allowed: finite and > 0 */
  FLASH_ENTMAX_BAD_ELEMENT = 5,     /* allowed: 0 (bf16), 1 (fp16) */
  FLASH_ENTMAX_BAD_ALIGNMENT = 6,   /* pointers: 16 bytes; strides: multiples of 8 elements */
  FLASH_ENTMAX_SMALL_WORKSPACE = 7, /* a buffer is smaller than the plan says */
  FLASH_ENTMAX_BAD_DEVICE = 8,      /* compute capability 9.0 is needed */
  FLASH_ENTMAX_CUDA_FAILURE = 9,    /* a launch or the tensor-map encoder failed */
  FLASH_ENTMAX_TOO_LARGE = 10,      /* batch * heads * rows, padded, does not fit 31 bits */
  FLASH_ENTMAX_BAD_STRIDE = 11      /* must be positive; rows below 4 GiB, others below 1 TiB */
};

enum { FLASH_ENTMAX_PATH_AUTO = 0, FLASH_ENTMAX_PATH_TILES = 1, FLASH_ENTMAX_PATH_LISTS = 2 };

/* Strides in elements: batch, head, row. The head dimension is contiguous. */
typedef struct {
  void* data;
  int64_t stride[3];
} FlashEntmaxTensor;

typedef struct {
  int32_t element, batch, heads, kv_heads, queries, keys, head_dim, causal;
  float alpha, scale;
  int32_t path;
  int32_t save_for_backward; /* 0: forward only, no support is kept */
  int32_t deferred_keys;     /* screening: newest keys whose hits are taken last; <= 0: automatic */
  int64_t
      support_capacity; /* entries of the support pool; rows that do not fit take the tile path */
  int32_t scaled;       /* 1: a factor a row, FlashEntmaxForwardTensors::query_scale */
} FlashEntmaxProblem;

typedef struct {
  int64_t saved_bytes, forward_bytes, backward_bytes;
} FlashEntmaxPlan;

typedef struct {
  FlashEntmaxTensor query, key, value, output;
  /* float32 (batch, heads, queries): z = (alpha - 1) scale query_scale q.k; any finite factors.
   * Rows of others are NaN. Any strides. Read only if the problem is `scaled`. */
  FlashEntmaxTensor query_scale;
} FlashEntmaxForwardTensors;

typedef struct {
  FlashEntmaxTensor query, key, value, output_gradient;
  FlashEntmaxTensor query_gradient, key_gradient, value_gradient;
  float* query_scale_gradient; /* (batch, heads, queries), contiguous, or null */
} FlashEntmaxBackwardTensors;

/* Where results lie in the saved buffer (offsets in bytes). Rows are padded per head. */
typedef struct {
  int64_t threshold, support_offset, support_count, support_key, support_excess, unit_flag;
  int32_t padded_queries, unit_rows;
} FlashEntmaxSavedLayout;

int flash_entmax_cuda_plan(const FlashEntmaxProblem* problem, FlashEntmaxPlan* plan);
int flash_entmax_cuda_saved_layout(const FlashEntmaxProblem* problem,
                                   FlashEntmaxSavedLayout* layout);
int flash_entmax_cuda_forward(const FlashEntmaxProblem* problem,
                              const FlashEntmaxForwardTensors* tensors, void* saved,
                              int64_t saved_bytes, void* workspace, int64_t workspace_bytes,
                              void* stream);
int flash_entmax_cuda_backward(const FlashEntmaxProblem* problem,
                               const FlashEntmaxBackwardTensors* tensors, void* saved,
                               int64_t saved_bytes, void* workspace, int64_t workspace_bytes,
                               void* stream);
const char* flash_entmax_cuda_error_text(int code);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_ENTMAX_CUDA_C_INTERFACE_H_ */
