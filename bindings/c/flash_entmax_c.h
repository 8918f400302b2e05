/* A plain C interface to gpu.h: the same structs with numbers only. Functions return 0, or a
 * positive StatusCode; flash_entmax_last_error() then gives the message of this thread's last
 * failure. See gpu.h and attention.h for shapes, units and what may be left out. */
#ifndef FLASH_ENTMAX_BINDINGS_C_FLASH_ENTMAX_C_H_
#define FLASH_ENTMAX_BINDINGS_C_FLASH_ENTMAX_C_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* data null: not given. dtype: 0 float64, 1 float32, 2 bfloat16, 3 float16, 4 uint8, 5 int32,
 * 6 int64. Strides in elements. */
typedef struct {
  void* data;
  int32_t dtype;
  int32_t rank;
  int64_t shape[4];
  int64_t strides[4];
} FlashEntmaxCTensor;

typedef struct {
  FlashEntmaxCTensor query, key, value;
  FlashEntmaxCTensor alpha_per_head, query_scale, key_lengths, key_mask, bias, alibi_slopes;
  FlashEntmaxCTensor cu_query, cu_key;
  double alpha;
  double scale; /* NaN: 1/sqrt(head_size) */
  double softcap;
  int64_t window_left, window_right; /* negative: unlimited */
  int32_t causal;
} FlashEntmaxCProblem;

typedef struct {
  void* stream;
  int32_t save_for_backward, alpha_gradient;
  int64_t max_query_length, max_key_length;
  int64_t support_capacity; /* -1: automatic */
  int32_t engine;           /* 0 automatic, 1 screening, 2 tiles, 3 general */
  int32_t visit_all_tiles;  /* for tests; see gpu.h */
} FlashEntmaxCOptions;

typedef struct {
  int32_t engine;
  int64_t saved_bytes, forward_bytes, backward_bytes, support_capacity;
} FlashEntmaxCPlan;

typedef struct {
  void* data;
  int64_t bytes;
} FlashEntmaxCBuffer;

typedef struct {
  FlashEntmaxCTensor output, query, key, value, alpha, alibi_slopes, query_scale;
} FlashEntmaxCGradients;

const char* flash_entmax_last_error(void);

int flash_entmax_gpu_describe(char* text, int64_t size);
int flash_entmax_gpu_plan(const FlashEntmaxCProblem* problem, const FlashEntmaxCOptions* options,
                          FlashEntmaxCPlan* plan);
int flash_entmax_gpu_forward(const FlashEntmaxCProblem* problem, const FlashEntmaxCOptions* options,
                             const FlashEntmaxCTensor* output, const FlashEntmaxCTensor* threshold,
                             FlashEntmaxCBuffer saved, FlashEntmaxCBuffer workspace);
int flash_entmax_gpu_backward(const FlashEntmaxCProblem* problem,
                              const FlashEntmaxCOptions* options,
                              const FlashEntmaxCGradients* gradients, FlashEntmaxCBuffer saved,
                              FlashEntmaxCBuffer workspace);
int flash_entmax_gpu_support_workspace(const FlashEntmaxCProblem* problem, int64_t* bytes);
int flash_entmax_gpu_support_offsets(const FlashEntmaxCProblem* problem,
                                     const FlashEntmaxCOptions* options,
                                     const FlashEntmaxCTensor* threshold,
                                     const FlashEntmaxCTensor* row_offsets,
                                     FlashEntmaxCBuffer workspace);
int flash_entmax_gpu_support_entries(const FlashEntmaxCProblem* problem,
                                     const FlashEntmaxCOptions* options,
                                     const FlashEntmaxCTensor* threshold,
                                     const FlashEntmaxCTensor* row_offsets,
                                     const FlashEntmaxCTensor* key_index,
                                     const FlashEntmaxCTensor* probability);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_ENTMAX_BINDINGS_C_FLASH_ENTMAX_C_H_ */
