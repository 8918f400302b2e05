// GPU kernels of the layers between matrix products and of the optimizer; no LibTorch here.
//
// Every one reads its inputs once and writes its outputs once, so that its time is that of moving
// them. A warp has a row in the norms; sums over rows (gradients of norm weights) are left as one
// partial sum a block, for the caller to add up.

#ifndef FLASH_ENTMAX_LAB_CUDA_KERNELS_H_
#define FLASH_ENTMAX_LAB_CUDA_KERNELS_H_

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace flash_entmax::lab::cuda {

// Norms: width must be a multiple of 128 and at most kMostWidth.
inline constexpr int64_t kMostWidth = 1024;
// Rows of the partial sums that AddAndNormBackward writes.
inline constexpr int64_t kPartialRows = 264;

// layers.h, AddAndNorm. inverse: [rows, 2], the reciprocal root mean squares for the backward pass.
struct AddAndNormForward {
  const float* stream;
  const __nv_bfloat16* update;
  const __nv_bfloat16* post;
  const __nv_bfloat16* pre;
  float* new_stream;
  __nv_bfloat16* normed;
  float* inverse;
  int64_t rows;
  int64_t width;
};
cudaError_t Launch(const AddAndNormForward& arguments, cudaStream_t stream);

struct AddAndNormBackward {
  const float* new_stream;
  const __nv_bfloat16* update;
  const __nv_bfloat16* post;
  const __nv_bfloat16* pre;
  const float* inverse;
  const float* new_stream_gradient;
  const __nv_bfloat16* normed_gradient;
  float* stream_gradient;
  __nv_bfloat16* update_gradient;
  float* partial;  // [kPartialRows, 2, width]: post, pre
  int64_t rows;
  int64_t width;
};
cudaError_t Launch(const AddAndNormBackward& arguments, cudaStream_t stream);

// Adds such partial sums up, in a fixed order.
struct SumOfPartials {
  const float* partial;  // [kPartialRows, columns]
  __nv_bfloat16* result;
  int64_t columns;
};
cudaError_t Launch(const SumOfPartials& arguments, cudaStream_t stream);

// layers.h, EmbedAndNorm. inverse: [rows], the reciprocal root mean square for the backward pass.
struct EmbedAndNormForward {
  const int64_t* tokens;
  const __nv_bfloat16* embedding;
  const __nv_bfloat16* weight;
  float* stream;
  __nv_bfloat16* normed;
  float* inverse;
  float scale;
  int64_t rows;
  int64_t width;
};
cudaError_t Launch(const EmbedAndNormForward& arguments, cudaStream_t stream);

struct EmbedAndNormBackward {
  const float* stream;
  const __nv_bfloat16* weight;
  const float* inverse;
  const float* stream_gradient;
  const __nv_bfloat16* normed_gradient;
  __nv_bfloat16* row_gradient;  // of each row's entry of the embedding
  float* partial;               // [kPartialRows, 1, width]
  float scale;
  int64_t rows;
  int64_t width;
};
cudaError_t Launch(const EmbedAndNormBackward& arguments, cudaStream_t stream);

// layers.h, GatedUnit; mlp a multiple of 8. Backward if output_gradient is not null.
struct GatedUnitCall {
  const __nv_bfloat16* gate_up;          // [rows, 2·mlp]
  const __nv_bfloat16* output_gradient;  // [rows, mlp], or null
  __nv_bfloat16* result;                 // the output, or the gradient of gate_up
  int64_t rows;
  int64_t mlp;
};
cudaError_t Launch(const GatedUnitCall& arguments, cudaStream_t stream);

// layers.h, AdaptiveScale. Backward if factor_gradient is not null.
struct AdaptiveScaleCall {
  const void* projected;  // [rows, 2·scaled], bfloat16 or float32
  const void* bias;       // [2·scaled], of the same type
  bool bfloat16;
  const float* factor_gradient;  // [rows, plain + scaled], or null
  float* result;                 // the factor, or the gradient of projected + bias, float32
  int64_t rows;
  int64_t length;  // rows of a sequence: position = row mod length
  int64_t plain;
  int64_t scaled;
};
cudaError_t Launch(const AdaptiveScaleCall& arguments, cudaStream_t stream);

// optimizer.h, one step; the numbers that change with the step are read on the device.
struct AdamCall {
  float* parameters;
  float* first_moment;
  float* second_moment;
  const void* gradient;  // bfloat16 or float32
  __nv_bfloat16* copy;   // the new parameters rounded, or null
  bool bfloat16;         // type of the gradient
  bool rounded;          // parameters and moments are rounded to bfloat16
  const float* norm;     // of the gradient
  const float* rates;    // [steps, 4]: rate, second, decay, and one that is not read
  const int64_t* step;   // which row of `rates`
  float beta1, beta2, clip, epsilon;
  int64_t size;
};
cudaError_t Launch(const AdamCall& arguments, cudaStream_t stream);

}  // namespace flash_entmax::lab::cuda

#endif  // FLASH_ENTMAX_LAB_CUDA_KERNELS_H_
