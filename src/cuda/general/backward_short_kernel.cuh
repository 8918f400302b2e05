// The kernel of the backward of short rows, and what it does where numbers are not finite.
// backward_short.cuh has the algorithm.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_SHORT_KERNEL_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_SHORT_KERNEL_CUH_

#include "general/backward_short.cuh"

namespace flash_entmax::cuda {

// One pair at a time: a thread has a query, then a key. Same meaning, no overflow on the way.
// General alpha serves all.
template <class ElementType, int kColumns>
struct ShortBackwardByPairs : ShortBackward<ElementType, kColumns, Alpha::kGeneral> {
  using Base = ShortBackward<ElementType, kColumns, Alpha::kGeneral>;
  using Base::band, Base::call, Base::curve, Base::deltas, Base::drop, Base::fused, Base::head;
  using Base::gradient, Base::key, Base::kHeadDim, Base::part, Base::query, Base::value;
  using Base::ProbabilityOf, Base::PutRowResults, Base::Threshold;
  using typename Base::Element;

  using Base::Base;

  struct OnePair {
    float dot;
    float w;  // zero: leave it out
    float p, u;
    float dp;
    float distance;
  };
  __device__ __forceinline__ OnePair PairOf(int row, int key_row, float factor,
                                            float threshold) const {
    OnePair pair = {};
    pair.distance = fabsf(static_cast<float>(row + part.keys - part.queries - key_row));
#pragma unroll 1
    for (int c = 0; c < kHeadDim; ++c) {
      pair.dot = fmaf(static_cast<float>(*query.At(row, c)),
                      static_cast<float>(*key.At(key_row, c)), pair.dot);
      pair.dp = fmaf(static_cast<float>(*gradient.At(row, c)),
                     static_cast<float>(*value.At(key_row, c)), pair.dp);
    }
    float excess;
    if (fused) {
      excess = fmaf(curve.order * factor, pair.dot, -threshold);
    } else {
      excess = __fmul_rn(curve.order * factor, pair.dot);
      if (drop != 0.0f) excess = fmaf(drop, pair.distance, excess);
      excess -= threshold;
    }
    pair.w = PositivePart(excess);
    const auto [p, u] = ProbabilityOf(pair.w);
    pair.p = p;
    pair.u = u;
    return pair;
  }
  __device__ __forceinline__ void PutRow(const StridedTensor& tensor, int row, int columns,
                                         const float (&sum)[kHeadDim]) const {
    Element* const target = tensor.Row<Element>(part.batch, head, row);
#pragma unroll
    for (int c = 0; c < kHeadDim; ++c) {
      if (c < columns) target[c * tensor.column] = Element(sum[c]);
    }
  }

  __device__ __forceinline__ void Run() const {
    const GeneralProblem& problem = call.problem;
    const int thread = static_cast<int>(threadIdx.x);
    for (int row = thread; row < part.queries; row += blockDim.x) {
      const RowRange seen = band.SeenByAny(row, 1);
      const float factor = FactorOf(problem, part, head, row), threshold = Threshold(row);
      float u_sum = 0.0f, u_gradient = 0.0f;
#pragma unroll 1
      for (int j = seen.first; j < seen.end; ++j) {
        const OnePair pair = PairOf(row, j, factor, threshold);
        if (pair.w == 0.0f) continue;
        u_sum += pair.u;
        u_gradient = fmaf(pair.u, pair.dp, u_gradient);
      }
      const float delta = u_sum == 0.0f ? 0.0f : u_gradient / u_sum;
      deltas[row] = delta;
      float sum[kHeadDim] = {}, product = 0.0f, distance = 0.0f;
#pragma unroll 1
      for (int j = seen.first; j < seen.end; ++j) {
        const OnePair pair = PairOf(row, j, factor, threshold);
        if (pair.w == 0.0f) continue;
        const float ds = pair.u * (pair.dp - delta);
        product = fmaf(ds, pair.dot, product);
        distance = fmaf(-ds, pair.distance, distance);
#pragma unroll
        for (int c = 0; c < kHeadDim; ++c) {
          sum[c] = fmaf(factor * ds, static_cast<float>(*key.At(j, c)), sum[c]);
        }
      }
      PutRow(call.query_gradient, row, problem.head_dim, sum);
      PutRowResults(row, product, distance);
    }
    __syncthreads();
    const Band of_keys = Band::OfKeys(problem, part);
    for (int j = thread; j < problem.keys; j += blockDim.x) {
      const RowRange seen = of_keys.SeenByAny(j, 1);
      float key_sum[kHeadDim] = {}, value_sum[kHeadDim] = {};
#pragma unroll 1
      for (int row = seen.first; row < seen.end; ++row) {
        const float factor = FactorOf(problem, part, head, row);
        const OnePair pair = PairOf(row, j, factor, Threshold(row));
        if (pair.w == 0.0f) continue;
        const float ds = factor * pair.u * (pair.dp - deltas[row]);
#pragma unroll
        for (int c = 0; c < kHeadDim; ++c) {
          key_sum[c] = fmaf(ds, static_cast<float>(*query.At(row, c)), key_sum[c]);
          value_sum[c] = fmaf(pair.p, static_cast<float>(*gradient.At(row, c)), value_sum[c]);
        }
      }
      PutRow(call.key_gradient, j, problem.head_dim, key_sum);
      PutRow(call.value_gradient, j, problem.value_dim, value_sum);
    }
  }
};

// A function of its own, so that its registers are none of the kernel's.
template <class Element, int kHeadDim>
__device__ __noinline__ void RedoShortBackward(const GeneralBackward& call,
                                               const ShortBackwardPlan& plan, void* shared) {
  ShortBackwardByPairs<Element, kHeadDim>(call, plan, shared).Run();
}

constexpr int kMostShortThreads = 256;

template <class Element, int kHeadDim, Alpha kMode>
__global__ void __launch_bounds__(kMostShortThreads, 2)
    ShortBackwardKernel(const __grid_constant__ GeneralBackward call,
                        const __grid_constant__ ShortBackwardPlan plan) {
  extern __shared__ __align__(16) char shared_bytes[];
  const ShortBackward<Element, kHeadDim, kMode> block(call, plan, shared_bytes);
  block.Load();
  bool finite = block.QueryHalf();
  __syncthreads();  // All pairs are there.
  finite &= block.KeyHalf();
  if (__syncthreads_or(!finite)) RedoShortBackward<Element, kHeadDim>(call, plan, shared_bytes);
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_SHORT_KERNEL_CUH_
