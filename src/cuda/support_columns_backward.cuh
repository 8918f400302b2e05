// Backward of the list path, key side: dK = scale sum dS Q, dV = sum p dO over the queries that
// keep a key.
//
// The entries of a key arrive in an arbitrary order; they are put in the order of their queries
// before they are summed, so that the result is the same in every run. A warp takes four keys with
// up to kMaxShortColumn entries, eight lanes a key (rank by counting); longer ones (popular keys)
// are left to a second kernel, a CTA each, that ranks through a bitmap of the queries. What the
// tile path contributed to a block of keys is added from its fp32 sums. Traffic: 16 bytes, one
// query row and one output-gradient row an entry.
#ifndef FLASH_ENTMAX_CUDA_SUPPORT_COLUMNS_BACKWARD_CUH_
#define FLASH_ENTMAX_CUDA_SUPPORT_COLUMNS_BACKWARD_CUH_

#include <climits>

#include "gather.cuh"

namespace flash_entmax::cuda {

template <class Element>
struct SupportColumnsParams {
  Shape shape;
  Tensor<const Element> query, output_gradient;
  Tensor<Element> key_gradient, value_gradient;
  const int* column_count;
  const int* column_offset;
  const ColumnEntry* column_entries;
  int* order;         // like column_entries: positions of a long column's entries by query
  int* long_columns;  // (batch * kv_heads) x keys
  Control* control;
  // Sums of the tile path, (batch * kv_heads) x padded_keys x head_dim, where a block of 128 keys
  // has its flag set.
  const float* tile_key_gradient;
  const float* tile_value_gradient;
  const int* tile_block_flag;
  int padded_keys;
};

constexpr int kSupportColumnsThreads = 128;
constexpr int kLongColumnsThreads = 256;
constexpr int kMaxShortColumn = 128;
constexpr int kKeyBlock = 128;

// An entry ready to be summed: where its rows lie (in units of 8 elements) and its weights.
struct alignas(16) ColumnTerm {
  int query_offset;
  int gradient_offset;
  float probability;
  float score_gradient;
};

template <class Element>
__device__ __forceinline__ ColumnTerm MakeTerm(const SupportColumnsParams<Element>& params,
                                               const uint4& entry) {
  const int id = static_cast<int>(entry.x);
  const int member = id / params.shape.queries, row = id - member * params.shape.queries;
  const auto offset = [&](const Strides& strides) {
    return static_cast<int>((member * strides.head + row * strides.row) / 8);
  };
  return {offset(params.query.strides), offset(params.output_gradient.strides),
          __uint_as_float(entry.y), __uint_as_float(entry.z)};
}

// Sums of one lane: its part of the head dimension of dK and dV.
template <int kPart>
struct ColumnSums {
  float key[kPart] = {};
  float value[kPart] = {};

  template <class Element>
  __device__ __forceinline__ void Add(const Element* query_rows, const Element* gradient_rows,
                                      const ColumnTerm& term) {
    Chunk<kPart> query, gradient;
    query.Load(query_rows + static_cast<int64_t>(term.query_offset) * 8);
    gradient.Load(gradient_rows + static_cast<int64_t>(term.gradient_offset) * 8);
    Accumulate<Element, kPart>(term.score_gradient, query, key);
    Accumulate<Element, kPart>(term.probability, gradient, value);
  }

  // Total over the four lanes that own the same part.
  __device__ __forceinline__ void ReduceWarp() {
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      key[i] += __shfl_xor_sync(kFullWarp, key[i], 8);
      key[i] += __shfl_xor_sync(kFullWarp, key[i], 16);
      value[i] += __shfl_xor_sync(kFullWarp, value[i], 8);
      value[i] += __shfl_xor_sync(kFullWarp, value[i], 16);
    }
  }

  template <class Element>
  __device__ __forceinline__ void Store(const SupportColumnsParams<Element>& params, int kv,
                                        int column, int lane) {
    const Shape& shape = params.shape;
    constexpr int kHeadDim = kPart * kLanesPerRow;
    const int blocks = params.padded_keys / kKeyBlock;
    if (params.tile_block_flag && params.tile_block_flag[kv * blocks + column / kKeyBlock]) {
      const int64_t offset =
          (static_cast<int64_t>(kv) * params.padded_keys + column) * kHeadDim + lane * kPart;
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        key[i] += params.tile_key_gradient[offset + i];
        value[i] += params.tile_value_gradient[offset + i];
      }
    }
    const int batch = kv / shape.kv_heads, head = kv % shape.kv_heads;
    StoreVector<Element, kPart>(key, shape.scale,
                                params.key_gradient.Row(batch, head, column) + lane * kPart);
    StoreVector<Element, kPart>(value, 1.0f,
                                params.value_gradient.Row(batch, head, column) + lane * kPart);
  }
};

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kSupportColumnsThreads)
    SupportColumnsBackwardKernel(const __grid_constant__ SupportColumnsParams<Element> params) {
  constexpr int kWarps = kSupportColumnsThreads / kWarpSize;
  constexpr int kPart = kHeadDim / kLanesPerRow;
  __shared__ alignas(16) int shared_query[kWarps][kRowsPerWarp][kMaxShortColumn + kListPadding];
  __shared__ ColumnTerm shared_term[kWarps][kRowsPerWarp][kMaxShortColumn + kListPadding / 4];

  const Shape& shape = params.shape;
  const int warp = threadIdx.x / kWarpSize, warp_lane = threadIdx.x % kWarpSize;
  const int part = warp_lane / kLanesPerRow, lane = warp_lane % kLanesPerRow;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kRowsPerWarp + part;
  const bool valid = index < static_cast<int64_t>(shape.KeyHeads()) * shape.keys;
  int count = valid ? params.column_count[index] : 0;
  const bool is_long = count > kMaxShortColumn;
  if (is_long) {
    if (lane == 0) {
      params.long_columns[atomicAdd(&params.control->long_column_count, 1)] =
          static_cast<int>(index);
    }
    count = 0;
  }
  const ColumnEntry* const entries =
      params.column_entries + (count ? params.column_offset[index] : 0);
  int* const query = shared_query[warp][part];
  ColumnTerm* const term = shared_term[warp][part];
  for (int i = lane; i < (count + 3) / 4 * 4; i += kLanesPerRow) {
    query[i] = i < count ? entries[i].query : INT_MAX;
  }
  __syncwarp();
  // Two entries of a lane at a time: rank = number of smaller queries, from the sign bits of
  // differences of non-negative numbers.
  for (int i = lane; i < count; i += 2 * kLanesPerRow) {
    const int second = min(i + kLanesPerRow, count - 1);
    const int own[2] = {query[i], query[second]};
    int rank[2] = {0, 0};
#pragma unroll 1
    for (int j = 0; j < count; j += 4) {
      const int4 other = *reinterpret_cast<const int4*>(query + j);
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        rank[x] -= ((other.x - own[x]) >> 31) + ((other.y - own[x]) >> 31) +
                   ((other.z - own[x]) >> 31) + ((other.w - own[x]) >> 31);
      }
    }
    term[rank[0]] = MakeTerm(params, __ldg(reinterpret_cast<const uint4*>(entries + i)));
    if (i + kLanesPerRow < count) {
      term[rank[1]] = MakeTerm(params, __ldg(reinterpret_cast<const uint4*>(entries + second)));
    }
  }
  __syncwarp();
  if (!valid || is_long) return;

  const int kv = static_cast<int>(index / shape.keys),
            column = static_cast<int>(index % shape.keys);
  const int batch = kv / shape.kv_heads, first_head = kv % shape.kv_heads * shape.group;
  const Element* const queries = params.query.Row(batch, first_head, 0) + lane * kPart;
  const Element* const gradients = params.output_gradient.Row(batch, first_head, 0) + lane * kPart;
  ColumnSums<kPart> sums;
#pragma unroll 4
  for (int i = 0; i < count; ++i) sums.Add(queries, gradients, term[i]);
  sums.Store(params, kv, column, lane);
}

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kLongColumnsThreads, kHeadDim <= 64 ? 3 : 2)
    LongColumnsBackwardKernel(const __grid_constant__ SupportColumnsParams<Element> params) {
  constexpr int kWarps = kLongColumnsThreads / kWarpSize;
  constexpr int kPart = kHeadDim / kLanesPerRow;
  constexpr int kWordsPerThread = 4;
  constexpr int kWords = kWordsPerThread * kLongColumnsThreads;
  constexpr int kRange = kWords * 32;  // queries ranked at a time
  __shared__ unsigned bitmap[kWords];
  __shared__ int before[kWords];
  __shared__ int warp_total[kWarps];
  __shared__ float shared_sums[kWarps][2][kHeadDim];

  const Shape& shape = params.shape;
  const int thread = threadIdx.x, warp = thread / kWarpSize, warp_lane = thread % kWarpSize;
  const int columns = params.control->long_column_count;
  for (int turn = blockIdx.x; turn < columns; turn += gridDim.x) {
    const int index = params.long_columns[turn];
    const int kv = index / shape.keys, column = index % shape.keys;
    const int count = params.column_count[index];
    const ColumnEntry* const entries = params.column_entries + params.column_offset[index];
    int* const order = params.order + params.column_offset[index];

    int ranked = 0;
    for (int64_t low = 0; low < static_cast<int64_t>(shape.group) * shape.queries; low += kRange) {
      for (int i = thread; i < kWords; i += kLongColumnsThreads) bitmap[i] = 0;
      __syncthreads();
      for (int i = thread; i < count; i += kLongColumnsThreads) {
        const int64_t id = entries[i].query - low;
        if (id >= 0 && id < kRange) atomicOr(&bitmap[id / 32], 1u << (id % 32));
      }
      __syncthreads();
      int own[kWordsPerThread], sum = 0;
#pragma unroll
      for (int i = 0; i < kWordsPerThread; ++i) {
        own[i] = sum;
        sum += __popc(bitmap[thread * kWordsPerThread + i]);
      }
      int inclusive = sum;
#pragma unroll
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int other = __shfl_up_sync(kFullWarp, inclusive, offset);
        if (warp_lane >= offset) inclusive += other;
      }
      if (warp_lane == kWarpSize - 1) warp_total[warp] = inclusive;
      __syncthreads();
      int base = ranked, total = 0;
      for (int i = 0; i < kWarps; ++i) {
        if (i < warp) base += warp_total[i];
        total += warp_total[i];
      }
#pragma unroll
      for (int i = 0; i < kWordsPerThread; ++i) {
        before[thread * kWordsPerThread + i] = base + inclusive - sum + own[i];
      }
      __syncthreads();
      for (int i = thread; i < count; i += kLongColumnsThreads) {
        const int64_t id = entries[i].query - low;
        if (id >= 0 && id < kRange) {
          order[before[id / 32] + __popc(bitmap[id / 32] & ((1u << (id % 32)) - 1))] = i;
        }
      }
      ranked += total;
      __syncthreads();
    }

    const int stream = thread / kLanesPerRow, lane = thread % kLanesPerRow;
    constexpr int kStreams = kLongColumnsThreads / kLanesPerRow;
    const int batch = kv / shape.kv_heads, first_head = kv % shape.kv_heads * shape.group;
    const Element* const queries = params.query.Row(batch, first_head, 0) + lane * kPart;
    const Element* const gradients =
        params.output_gradient.Row(batch, first_head, 0) + lane * kPart;
    ColumnSums<kPart> sums;
#pragma unroll 4
    for (int i = stream; i < count; i += kStreams) {
      const auto* entry = reinterpret_cast<const uint4*>(entries + order[i]);
      sums.Add(queries, gradients, MakeTerm(params, __ldg(entry)));
    }
    __syncwarp();
    sums.ReduceWarp();
    if (warp_lane < kLanesPerRow) {
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        shared_sums[warp][0][lane * kPart + i] = sums.key[i];
        shared_sums[warp][1][lane * kPart + i] = sums.value[i];
      }
    }
    __syncthreads();
    if (thread < kLanesPerRow) {
      ColumnSums<kPart> all;
      for (int w = 0; w < kWarps; ++w) {
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
          all.key[i] += shared_sums[w][0][lane * kPart + i];
          all.value[i] += shared_sums[w][1][lane * kPart + i];
        }
      }
      all.Store(params, kv, column, lane);
    }
    __syncthreads();
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_SUPPORT_COLUMNS_BACKWARD_CUH_
