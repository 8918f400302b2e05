#include <algorithm>

#include "cuda/kernels.h"

namespace flash_entmax::lab::cuda {
namespace {

constexpr int kWarps = 8;  // of a block
constexpr int kThreads = 32 * kWarps;
constexpr float kNormEpsilon = 1e-6f;

__device__ float SumOfWarp(float value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  }
  return value;
}

struct Four {
  float x[4];
};

__device__ Four Load(const float* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ Four Load(const __nv_bfloat16* from) {
  const uint2 bits = *reinterpret_cast<const uint2*>(from);
  const float2 low = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits.x));
  const float2 high = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits.y));
  return {{low.x, low.y, high.x, high.y}};
}
__device__ void Store(float* to, const Four& v) {
  *reinterpret_cast<float4*>(to) = make_float4(v.x[0], v.x[1], v.x[2], v.x[3]);
}
__device__ void Store(__nv_bfloat16* to, const Four& v) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(v.x[0], v.x[1]);
  const __nv_bfloat162 high = __floats2bfloat162_rn(v.x[2], v.x[3]);
  uint2 bits;
  bits.x = reinterpret_cast<const unsigned&>(low);
  bits.y = reinterpret_cast<const unsigned&>(high);
  *reinterpret_cast<uint2*>(to) = bits;
}

// Lane l of a warp has columns 128·c + 4·l … + 3 of its row, c < kChunks.
template <int kChunks>
__global__ void AddAndNormForwardKernel(AddAndNormForward a) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= a.rows) return;
  constexpr float kInverseWidth = 1.0f / (128 * kChunks);
  const int64_t base = row * a.width + 4 * lane;
  Four update[kChunks], stream[kChunks];
  float sum = 0.0f;
  for (int c = 0; c < kChunks; ++c) {
    update[c] = Load(a.update + base + 128 * c);
    stream[c] = Load(a.stream + base + 128 * c);
    for (int i = 0; i < 4; ++i) sum += update[c].x[i] * update[c].x[i];
  }
  const float inverse_update = rsqrtf(SumOfWarp(sum) * kInverseWidth + kNormEpsilon);
  sum = 0.0f;
  for (int c = 0; c < kChunks; ++c) {
    const Four weight = Load(a.post + 4 * lane + 128 * c);
    for (int i = 0; i < 4; ++i) {
      stream[c].x[i] += update[c].x[i] * inverse_update * (1.0f + weight.x[i]);
      sum += stream[c].x[i] * stream[c].x[i];
    }
    Store(a.new_stream + base + 128 * c, stream[c]);
  }
  const float inverse_stream = rsqrtf(SumOfWarp(sum) * kInverseWidth + kNormEpsilon);
  for (int c = 0; c < kChunks; ++c) {
    const Four weight = Load(a.pre + 4 * lane + 128 * c);
    Four normed;
    for (int i = 0; i < 4; ++i) {
      normed.x[i] = stream[c].x[i] * inverse_stream * (1.0f + weight.x[i]);
    }
    Store(a.normed + base + 128 * c, normed);
  }
  if (lane == 0) {
    a.inverse[2 * row] = inverse_update;
    a.inverse[2 * row + 1] = inverse_stream;
  }
}

// The block's warps add up their columns, 128 at a time, into row blockIdx.x of `partial`.
template <int kSums, int kChunks>
__device__ void StoreColumnSums(const Four (&of_lane)[kSums][kChunks], float* partial,
                                int64_t width) {
  __shared__ float sums[kWarps][128];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int which = 0; which < kSums; ++which) {
    for (int c = 0; c < kChunks; ++c) {
      __syncthreads();
      Store(&sums[warp][4 * lane], of_lane[which][c]);
      __syncthreads();
      if (threadIdx.x < 128) {
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w) sum += sums[w][threadIdx.x];
        partial[(static_cast<int64_t>(blockIdx.x) * kSums + which) * width + 128 * c +
                threadIdx.x] = sum;
      }
    }
  }
}

// With s' the new stream and n = s'·r·(1 + pre): ds' += r·g − (r³/width)·(g·s')·s' for g = dn·(1 +
// pre), and the same once more through the norm of the update.
template <int kChunks>
__global__ void AddAndNormBackwardKernel(AddAndNormBackward a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr float kInverseWidth = 1.0f / (128 * kChunks);
  Four column_sums[2][kChunks] = {};  // post, pre
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp; row < a.rows;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t base = row * a.width + 4 * lane;
    const float inverse_update = a.inverse[2 * row], inverse_stream = a.inverse[2 * row + 1];
    Four stream[kChunks], gradient[kChunks];
    float dot = 0.0f;
    for (int c = 0; c < kChunks; ++c) {
      stream[c] = Load(a.new_stream + base + 128 * c);
      gradient[c] = Load(a.normed_gradient + base + 128 * c);
      const Four weight = Load(a.pre + 4 * lane + 128 * c);
      for (int i = 0; i < 4; ++i) {
        column_sums[1][c].x[i] += gradient[c].x[i] * stream[c].x[i] * inverse_stream;
        gradient[c].x[i] *= 1.0f + weight.x[i];
        dot += gradient[c].x[i] * stream[c].x[i];
      }
    }
    float factor = SumOfWarp(dot) * kInverseWidth * inverse_stream * inverse_stream;
    dot = 0.0f;
    Four update[kChunks], through[kChunks];
    for (int c = 0; c < kChunks; ++c) {
      const Four direct = Load(a.new_stream_gradient + base + 128 * c);
      const Four weight = Load(a.post + 4 * lane + 128 * c);
      update[c] = Load(a.update + base + 128 * c);
      for (int i = 0; i < 4; ++i) {
        const float total =
            direct.x[i] + inverse_stream * (gradient[c].x[i] - factor * stream[c].x[i]);
        gradient[c].x[i] = total;
        column_sums[0][c].x[i] += total * update[c].x[i] * inverse_update;
        through[c].x[i] = total * (1.0f + weight.x[i]);
        dot += through[c].x[i] * update[c].x[i];
      }
      Store(a.stream_gradient + base + 128 * c, gradient[c]);
    }
    factor = SumOfWarp(dot) * kInverseWidth * inverse_update * inverse_update;
    for (int c = 0; c < kChunks; ++c) {
      Four result;
      for (int i = 0; i < 4; ++i) {
        result.x[i] = inverse_update * (through[c].x[i] - factor * update[c].x[i]);
      }
      Store(a.update_gradient + base + 128 * c, result);
    }
  }
  StoreColumnSums<2, kChunks>(column_sums, a.partial, a.width);
}

// A block has 32 columns, a warp every kWarps-th row of them.
__global__ void SumOfPartialsKernel(SumOfPartials a) {
  __shared__ float sums[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = 32 * static_cast<int64_t>(blockIdx.x) + lane;
  float sum = 0.0f;
  if (column < a.columns) {
    static_assert(kPartialRows % kWarps == 0);
#pragma unroll 11
    for (int row = warp; row < kPartialRows; row += kWarps) {
      sum += a.partial[row * a.columns + column];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= a.columns) return;
  sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += sums[w][lane];
  a.result[column] = __float2bfloat16(sum);
}

template <int kChunks>
__global__ void EmbedAndNormForwardKernel(EmbedAndNormForward a) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= a.rows) return;
  constexpr float kInverseWidth = 1.0f / (128 * kChunks);
  const int64_t base = row * a.width + 4 * lane;
  const __nv_bfloat16* entry = a.embedding + a.tokens[row] * a.width + 4 * lane;
  Four stream[kChunks];
  float sum = 0.0f;
  for (int c = 0; c < kChunks; ++c) {
    stream[c] = Load(entry + 128 * c);
    for (int i = 0; i < 4; ++i) {
      stream[c].x[i] *= a.scale;
      sum += stream[c].x[i] * stream[c].x[i];
    }
    Store(a.stream + base + 128 * c, stream[c]);
  }
  const float inverse = rsqrtf(SumOfWarp(sum) * kInverseWidth + kNormEpsilon);
  for (int c = 0; c < kChunks; ++c) {
    const Four weight = Load(a.weight + 4 * lane + 128 * c);
    for (int i = 0; i < 4; ++i) stream[c].x[i] *= inverse * (1.0f + weight.x[i]);
    Store(a.normed + base + 128 * c, stream[c]);
  }
  if (lane == 0) a.inverse[row] = inverse;
}

template <int kChunks>
__global__ void EmbedAndNormBackwardKernel(EmbedAndNormBackward a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr float kInverseWidth = 1.0f / (128 * kChunks);
  Four sums[1][kChunks] = {};
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp; row < a.rows;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t base = row * a.width + 4 * lane;
    const float inverse = a.inverse[row];
    Four stream[kChunks], gradient[kChunks];
    float dot = 0.0f;
    for (int c = 0; c < kChunks; ++c) {
      stream[c] = Load(a.stream + base + 128 * c);
      gradient[c] = Load(a.normed_gradient + base + 128 * c);
      const Four weight = Load(a.weight + 4 * lane + 128 * c);
      for (int i = 0; i < 4; ++i) {
        sums[0][c].x[i] += gradient[c].x[i] * stream[c].x[i] * inverse;
        gradient[c].x[i] *= 1.0f + weight.x[i];
        dot += gradient[c].x[i] * stream[c].x[i];
      }
    }
    const float factor = SumOfWarp(dot) * kInverseWidth * inverse * inverse;
    for (int c = 0; c < kChunks; ++c) {
      const Four direct = Load(a.stream_gradient + base + 128 * c);
      Four result;
      for (int i = 0; i < 4; ++i) {
        result.x[i] =
            a.scale * (direct.x[i] + inverse * (gradient[c].x[i] - factor * stream[c].x[i]));
      }
      Store(a.row_gradient + base + 128 * c, result);
    }
  }
  StoreColumnSums<1, kChunks>(sums, a.partial, a.width);
}

// gelu(x) ≈ x·(1 + tanh(√(2/π)(x + 0.044715x³)))/2 (Hendrycks & Gimpel 2016), and its derivative.
__device__ float Gelu(float x, float* derivative) {
  constexpr float kRoot = 0.7978845608f, kCubic = 0.044715f;
  const float t = tanhf(kRoot * (x + kCubic * x * x * x));
  *derivative =
      0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * kRoot * (1.0f + 3.0f * kCubic * x * x);
  return 0.5f * x * (1.0f + t);
}

__global__ void GatedUnitKernel(GatedUnitCall a) {
  const int64_t per_row = a.mlp / 4;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (number >= a.rows * per_row) return;
  const int64_t row = number / per_row, column = number % per_row * 4;
  const int64_t gate_at = row * 2 * a.mlp + column;
  const Four gate = Load(a.gate_up + gate_at), up = Load(a.gate_up + gate_at + a.mlp);
  Four first, second;
  if (a.output_gradient == nullptr) {
    for (int i = 0; i < 4; ++i) {
      float derivative;
      first.x[i] = Gelu(gate.x[i], &derivative) * up.x[i];
    }
    Store(a.result + row * a.mlp + column, first);
    return;
  }
  const Four gradient = Load(a.output_gradient + row * a.mlp + column);
  for (int i = 0; i < 4; ++i) {
    float derivative;
    second.x[i] = gradient.x[i] * Gelu(gate.x[i], &derivative);
    first.x[i] = gradient.x[i] * up.x[i] * derivative;
  }
  Store(a.result + gate_at, first);
  Store(a.result + gate_at + a.mlp, second);
}

__device__ float Value(const float* from, int64_t at) { return from[at]; }
__device__ float Value(const __nv_bfloat16* from, int64_t at) { return __bfloat162float(from[at]); }

template <typename T>
__global__ void AdaptiveScaleKernel(AdaptiveScaleCall a) {
  const int64_t heads = a.plain + a.scaled;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (number >= a.rows * heads) return;
  const int64_t row = number / heads, head = number % heads - a.plain;
  const bool backward = a.factor_gradient != nullptr;
  if (head < 0) {
    if (!backward) a.result[number] = 1.0f;
    return;
  }
  const T* projected = static_cast<const T*>(a.projected) + row * 2 * a.scaled;
  const T* bias = static_cast<const T*>(a.bias);
  const float b = Value(projected, head) + Value(bias, head);
  const float g = Value(projected, a.scaled + head) + Value(bias, a.scaled + head);
  const float beta = b > 20.0f ? b : log1pf(expf(b));
  const float tanh_g = tanhf(g);
  const float log_log = logf(logf(static_cast<float>(row % a.length + 2)));
  const float power = expf(2.0f * tanh_g * log_log);
  if (!backward) {
    a.result[number] = 1.0f + beta * power;
    return;
  }
  const float gradient = a.factor_gradient[number];
  float* result = a.result + row * 2 * a.scaled;
  result[head] = gradient * power / (1.0f + expf(-b));
  result[a.scaled + head] = gradient * beta * power * 2.0f * (1.0f - tanh_g * tanh_g) * log_log;
}

__device__ float Rounded(float value) { return __bfloat162float(__float2bfloat16(value)); }

template <typename T>
__global__ void AdamKernel(AdamCall a) {
  const float* rates = a.rates + 4 * *a.step;
  const float rate = rates[0], second = rates[1], decay = rates[2];
  const float norm = *a.norm;
  const float shrink = norm > a.clip ? a.clip / norm : 1.0f;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.size;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const float g = Value(static_cast<const T*>(a.gradient), i) * shrink;
    const auto kept = [&](float value) { return a.rounded ? Rounded(value) : value; };
    const float m = kept(a.beta1 * a.first_moment[i] + (1.0f - a.beta1) * g);
    const float v = kept(a.beta2 * a.second_moment[i] + (1.0f - a.beta2) * g * g);
    const float w =
        kept(a.parameters[i] * (1.0f - decay) - rate * m / (sqrtf(v * second) + a.epsilon));
    a.first_moment[i] = m;
    a.second_moment[i] = v;
    a.parameters[i] = w;
    if (a.copy != nullptr) a.copy[i] = __float2bfloat16(w);
  }
}

unsigned Blocks(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

template <int kChunks>
void LaunchNorm(const AddAndNormForward& a, cudaStream_t stream) {
  AddAndNormForwardKernel<kChunks><<<Blocks(a.rows, kWarps), kThreads, 0, stream>>>(a);
}
template <int kChunks>
void LaunchNorm(const AddAndNormBackward& a, cudaStream_t stream) {
  AddAndNormBackwardKernel<kChunks>
      <<<static_cast<unsigned>(kPartialRows), kThreads, 0, stream>>>(a);
}

template <int kChunks>
void LaunchNorm(const EmbedAndNormForward& a, cudaStream_t stream) {
  EmbedAndNormForwardKernel<kChunks><<<Blocks(a.rows, kWarps), kThreads, 0, stream>>>(a);
}
template <int kChunks>
void LaunchNorm(const EmbedAndNormBackward& a, cudaStream_t stream) {
  EmbedAndNormBackwardKernel<kChunks>
      <<<static_cast<unsigned>(kPartialRows), kThreads, 0, stream>>>(a);
}

template <typename Call>
cudaError_t DispatchWidth(const Call& a, cudaStream_t stream) {
  if (a.width % 128 != 0) return cudaErrorInvalidValue;
  switch (a.width / 128) {
    case 1:
      LaunchNorm<1>(a, stream);
      break;
    case 2:
      LaunchNorm<2>(a, stream);
      break;
    case 3:
      LaunchNorm<3>(a, stream);
      break;
    case 4:
      LaunchNorm<4>(a, stream);
      break;
    case 6:
      LaunchNorm<6>(a, stream);
      break;
    case 8:
      LaunchNorm<8>(a, stream);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t Launch(const AddAndNormForward& a, cudaStream_t stream) {
  return DispatchWidth(a, stream);
}
cudaError_t Launch(const AddAndNormBackward& a, cudaStream_t stream) {
  return DispatchWidth(a, stream);
}

cudaError_t Launch(const SumOfPartials& a, cudaStream_t stream) {
  SumOfPartialsKernel<<<Blocks(a.columns, 32), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t Launch(const EmbedAndNormForward& a, cudaStream_t stream) {
  return DispatchWidth(a, stream);
}
cudaError_t Launch(const EmbedAndNormBackward& a, cudaStream_t stream) {
  return DispatchWidth(a, stream);
}

cudaError_t Launch(const GatedUnitCall& a, cudaStream_t stream) {
  GatedUnitKernel<<<Blocks(a.rows * a.mlp / 4, kThreads), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t Launch(const AdaptiveScaleCall& a, cudaStream_t stream) {
  const unsigned blocks = Blocks(a.rows * (a.plain + a.scaled), kThreads);
  if (a.bfloat16) {
    AdaptiveScaleKernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(a);
  } else {
    AdaptiveScaleKernel<float><<<blocks, kThreads, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

cudaError_t Launch(const AdamCall& a, cudaStream_t stream) {
  const unsigned blocks = std::min(Blocks(a.size, 4 * kThreads), 132u * 8u);
  if (a.bfloat16) {
    AdamKernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(a);
  } else {
    AdamKernel<float><<<blocks, kThreads, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

}  // namespace flash_entmax::lab::cuda
