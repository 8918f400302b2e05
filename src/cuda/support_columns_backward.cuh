// Backward of the list path, key side: dK = scale sum dS Q, dV = sum p dO over the queries that
// keep a key.
//
// The entries of a key arrive in an arbitrary order; they are put in the order of their queries
// before they are summed, so that the result is the same in every run. A warp takes one key with up
// to MaxWarpColumn entries: it sorts runs of 32 or 128 (query, position) pairs in registers, merges
// up to four runs by binary searches, then four groups of eight lanes sum every fourth entry.
//
// Longer columns (popular keys) are cut into pieces of equal ranges of queries, a block a piece
// (long_columns_backward.cuh). What the tile path contributed to a block of keys is added from its
// fp32 sums.
// Traffic an entry: 16 bytes, one query row and one output-gradient row (mostly from L2).
#ifndef FLASH_ENTMAX_CUDA_SUPPORT_COLUMNS_BACKWARD_CUH_
#define FLASH_ENTMAX_CUDA_SUPPORT_COLUMNS_BACKWARD_CUH_

#include "gather.cuh"
#include "launch_order.cuh"

namespace flash_entmax::cuda {

template <class Element>
struct SupportColumnsParams {
  Shape shape;
  Tensor<const Element> query, output_gradient;
  Tensor<Element> key_gradient, value_gradient;
  const int* column_count;
  const int* column_offset;
  const ColumnEntry* column_entries;
  int* order;  // like column_entries: positions of a long column's entries by query
  LongColumnTask* long_tasks;
  float* long_sums;  // sums of the pieces of long columns
  Control* control;
  // Sums of the tile path, (batch * kv_heads) x padded_keys x head_dim, where a block of 128 keys
  // has its flag set.
  const float* tile_key_gradient;
  const float* tile_value_gradient;
  const int* tile_block_flag;
  int padded_keys;
};

constexpr int kSupportColumnsThreads = 128;
constexpr int kColumnsPerWarp = 4;
constexpr int kKeyBlock = 128;
constexpr int kSortRun = 128;  // pairs that a warp sorts in registers, four a lane

// An entry ready to be summed: where its rows lie (in units of 8 elements) and its weights.
struct alignas(16) ColumnTerm {
  int query_offset;
  int gradient_offset;
  float probability;
  float score_gradient;
};

template <class Element>
__device__ __forceinline__ ColumnTerm MakeTerm(const SupportColumnsParams<Element>& params,
                                               const ColumnEntry* entry) {
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(entry));
  int member = 0, row = static_cast<int>(words.x);
  if (params.shape.group > 1) {
    member = row / params.shape.queries;
    row -= member * params.shape.queries;
  }
  const auto offset = [&](const Strides& strides) {
    return static_cast<int>((member * strides.head + row * strides.row) / 8);
  };
  return {offset(params.query.strides), offset(params.output_gradient.strides),
          __uint_as_float(words.y), __uint_as_float(words.z)};
}

// Sums of one lane: its part of the head dimension of dK and dV.
template <int kPart>
struct ColumnSums {
  float key[kPart] = {};
  float value[kPart] = {};

  // Adds entries first, first + step, ... below `count`, several in flight. term(i): the i-th one.
  template <class Element, class Term>
  __device__ __forceinline__ void AddAll(const Element* query_rows, const Element* gradient_rows,
                                         int first, int step, int count, Term term) {
    constexpr int kInFlight = 2;
#pragma unroll 1
    for (; first < count; first += kInFlight * step) {
      Chunk<kPart> query[kInFlight], gradient[kInFlight];
      float probability[kInFlight], score_gradient[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        // Past the end the last entry is loaded again.
        const ColumnTerm entry = term(min(first + i * step, count - 1));
        query[i].Load(query_rows + static_cast<int64_t>(entry.query_offset) * 8);
        gradient[i].Load(gradient_rows + static_cast<int64_t>(entry.gradient_offset) * 8);
        probability[i] = entry.probability;
        score_gradient[i] = entry.score_gradient;
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (i == 0 || first + i * step < count) {
          Accumulate<Element, kPart>(score_gradient[i], query[i], key);
          Accumulate<Element, kPart>(probability[i], gradient[i], value);
        }
      }
    }
  }

  // Totals over the warp's four groups of lanes. Groups 0 and 1 get the lower and the upper half of
  // their lanes' dimensions of dK, groups 2 and 3 those of dV.
  __device__ __forceinline__ void Reduce(int part, float (&total)[kPart / 2]) const {
    const bool takes_value = part & 2, takes_upper = part & 1;
    float half[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, takes_value ? key[i] : value[i], 16);
      half[i] = (takes_value ? value[i] : key[i]) + other;
    }
#pragma unroll
    for (int i = 0; i < kPart / 2; ++i) {
      const float other =
          __shfl_xor_sync(kFullWarp, takes_upper ? half[i] : half[i + kPart / 2], 8);
      total[i] = (takes_upper ? half[i + kPart / 2] : half[i]) + other;
    }
  }
};

// Writes kCount dimensions from `first` of one gradient of a key, the tile path's part added.
template <class Element, int kHeadDim, int kCount>
__device__ __forceinline__ void StoreColumn(const SupportColumnsParams<Element>& params,
                                            bool is_value, int kv, int column, int first,
                                            float (&sum)[kCount]) {
  const Shape& shape = params.shape;
  if (params.tile_block_flag[kv * (params.padded_keys / kKeyBlock) + column / kKeyBlock]) {
    const float* const tile = (is_value ? params.tile_value_gradient : params.tile_key_gradient) +
                              (static_cast<int64_t>(kv) * params.padded_keys + column) * kHeadDim +
                              first;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const float2 pair = *reinterpret_cast<const float2*>(tile + i);
      sum[i] += pair.x;
      sum[i + 1] += pair.y;
    }
  }
  const Tensor<Element>& gradient = is_value ? params.value_gradient : params.key_gradient;
  Element* const destination =
      gradient.Row(kv / shape.kv_heads, kv % shape.kv_heads, column) + first;
  const float factor = is_value ? 1.0f : shape.scale;
  uint32_t words[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    words[i] = ElementTraits<Element>::Pack(factor * sum[2 * i], factor * sum[2 * i + 1]);
  }
  if constexpr (kCount == 2) {
    *reinterpret_cast<uint32_t*>(destination) = words[0];
  } else if constexpr (kCount == 4) {
    *reinterpret_cast<uint2*>(destination) = make_uint2(words[0], words[1]);
  } else {
    static_assert(kCount == 8);
    *reinterpret_cast<uint4*>(destination) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Bitonic sort of the warp's 32 * kCount numbers in ascending order: the number of rank
// lane * kCount + i ends in x[i] of that lane.
template <int kCount>
__device__ __forceinline__ void SortWarp(uint32_t (&x)[kCount], int lane) {
#pragma unroll
  for (int size = 2; size <= kWarpSize * kCount; size *= 2) {
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
      if (stride >= kCount) {
        const bool ascending = ((lane * kCount) & size) == 0;
        const bool keeps_smaller = ((lane & (stride / kCount)) == 0) == ascending;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const uint32_t other = __shfl_xor_sync(kFullWarp, x[i], stride / kCount);
          x[i] = keeps_smaller ? min(x[i], other) : max(x[i], other);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if ((i & stride) == 0) {
            const bool ascending = ((lane * kCount + i) & size) == 0;
            const uint32_t low = min(x[i], x[i + stride]), high = max(x[i], x[i + stride]);
            x[i] = ascending ? low : high;
            x[i + stride] = ascending ? high : low;
          }
        }
      }
    }
  }
}

struct ColumnSortBuffer {
  // Runs of kSortRun sorted pairs, the last one filled up with the largest number.
  alignas(16) uint32_t runs[kMaxWarpColumn];
  uint32_t merged[kMaxWarpColumn];
};

// Sorts the entries of a column by query. Returns pairs (query << kColumnIndexBits | position among
// `entries`) in shared memory.
__device__ __forceinline__ const uint32_t* SortColumn(const ColumnEntry* entries, int count,
                                                      ColumnSortBuffer& buffer, int lane) {
  const auto pair = [&](int i) {
    return i < count ? static_cast<uint32_t>(__ldg(&entries[i].query)) << kColumnIndexBits | i
                     : UINT32_MAX;
  };
  if (count <= kWarpSize) {
    uint32_t x[1] = {pair(lane)};
    SortWarp(x, lane);
    buffer.runs[lane] = x[0];
    __syncwarp();
    return buffer.runs;
  }
  constexpr int kPerLane = kSortRun / kWarpSize;
#pragma unroll 1
  for (int first = 0; first < count; first += kSortRun) {
    uint32_t x[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = pair(first + i * kWarpSize + lane);
    SortWarp(x, lane);
    reinterpret_cast<uint4*>(buffer.runs + first)[lane] = make_uint4(x[0], x[1], x[2], x[3]);
  }
  __syncwarp();
  if (count <= kSortRun) return buffer.runs;
  // The rank of a pair is the number of smaller ones in all runs; the other runs are searched at
  // the same time.
  constexpr int kRuns = kMaxWarpColumn / kSortRun;
#pragma unroll 1
  for (int i = lane; i < count; i += kWarpSize) {
    const uint32_t own = buffer.runs[i];
    int place[kRuns - 1];  // first of the pairs of a run that may not be smaller
#pragma unroll
    for (int x = 1; x < kRuns; ++x) place[x - 1] = (i / kSortRun ^ x) * kSortRun;
#pragma unroll
    for (int step = kSortRun / 2; step > 0; step /= 2) {
#pragma unroll
      for (int x = 1; x < kRuns; ++x) {
        if (buffer.runs[place[x - 1] + step - 1] < own) place[x - 1] += step;
      }
    }
    int rank = i % kSortRun;
#pragma unroll
    for (int x = 1; x < kRuns; ++x) {
      const int first = (i / kSortRun ^ x) * kSortRun;
      const int smaller = place[x - 1] - first + (buffer.runs[place[x - 1]] < own);
      rank += first < count ? smaller : 0;
    }
    buffer.merged[rank] = own;
  }
  __syncwarp();
  return buffer.merged;
}

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kSupportColumnsThreads, kHeadDim <= 64 ? 7 : 5)
    SupportColumnsBackwardKernel(const __grid_constant__ SupportColumnsParams<Element> params) {
  WaitForEarlierKernels();
  constexpr int kWarps = kSupportColumnsThreads / kWarpSize;
  constexpr int kPart = kHeadDim / kLanesPerRow;
  __shared__ ColumnSortBuffer shared_sort[kWarps];
  __shared__ ColumnTerm shared_term[kWarps][kWarpSize];

  const Shape& shape = params.shape;
  const int warp = threadIdx.x / kWarpSize, warp_lane = threadIdx.x % kWarpSize;
  const int part = warp_lane / kLanesPerRow, lane = warp_lane % kLanesPerRow;
  const int columns = shape.KeyHeads() * shape.keys;
  const int first_index = static_cast<int>(blockIdx.x) * kWarps * kColumnsPerWarp + warp;
  const int longest = MaxWarpColumn(shape);
  ColumnTerm* const term = shared_term[warp];

  // Lane i holds what is known of the warp's i-th column.
  int own_count = 0, own_offset = 0;
  if (const int index = first_index + warp_lane * kWarps;
      warp_lane < kColumnsPerWarp && index < columns) {
    own_count = __ldg(params.column_count + index);
    own_offset = own_count > 0 ? __ldg(params.column_offset + index) : 0;
  }
#pragma unroll 1
  for (int turn = 0; turn < kColumnsPerWarp; ++turn) {
    const int index = first_index + turn * kWarps;
    if (index >= columns) return;
    const int count = __shfl_sync(kFullWarp, own_count, turn);
    const ColumnEntry* const entries =
        params.column_entries + __shfl_sync(kFullWarp, own_offset, turn);
    if (count > longest) {
      const int pieces = LongColumnPieces(count);
      int place = 0;
      if (warp_lane == 0) place = atomicAdd(&params.control->long_column_count, pieces);
      place = __shfl_sync(kFullWarp, place, 0);
      for (int i = warp_lane; i < pieces; i += kWarpSize) {
        params.long_tasks[place + i] = LongColumnTask{index, i, pieces, 0};
      }
      continue;
    }
    const int kv = index / shape.keys, column = index - kv * shape.keys;
    ColumnSums<kPart> sums;
    if (count > 0) {
      const int batch = kv / shape.kv_heads, first_head = kv % shape.kv_heads * shape.group;
      const Element* const queries = params.query.Row(batch, first_head, 0) + lane * kPart;
      const Element* const gradients =
          params.output_gradient.Row(batch, first_head, 0) + lane * kPart;
      const uint32_t* const sorted = SortColumn(entries, count, shared_sort[warp], warp_lane);
#pragma unroll 1
      for (int first = 0; first < count; first += kWarpSize) {
        if (first + warp_lane < count) {
          const uint32_t position = sorted[first + warp_lane] & (kMaxWarpColumn - 1);
          term[warp_lane] = MakeTerm(params, entries + position);
        }
        __syncwarp();
        const int terms = min(count - first, kWarpSize);
        sums.AddAll(queries, gradients, part, kRowsPerWarp, terms, [&](int i) { return term[i]; });
        __syncwarp();
      }
    }
    float total[kPart / 2];
    sums.Reduce(part, total);
    StoreColumn<Element, kHeadDim, kPart / 2>(params, part & 2, kv, column,
                                              lane * kPart + (part & 1) * (kPart / 2), total);
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_SUPPORT_COLUMNS_BACKWARD_CUH_
