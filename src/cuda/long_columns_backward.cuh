// Backward of the list path, key side, for keys kept by very many queries.
//
// A block sums one piece of a column: the entries whose queries lie in one of `pieces` equal
// ranges. Their order comes from a bitmap of the queries, kRange of them at a time: the rank of an
// entry is the number of bits before its own. 32 groups of eight lanes sum every 32nd entry. Sums
// of a column with several pieces go to memory; the block that finishes the last piece adds them in
// the order of the pieces, whichever block that is, so the result is the same in every run.
// Traffic: as in support_columns_backward.cuh, and the queries of a column's entries twice a piece.
#ifndef FLASH_ENTMAX_CUDA_LONG_COLUMNS_BACKWARD_CUH_
#define FLASH_ENTMAX_CUDA_LONG_COLUMNS_BACKWARD_CUH_

#include "launch_order.cuh"
#include "support_columns_backward.cuh"

namespace flash_entmax::cuda {

constexpr int kLongColumnsThreads = 256;

struct QueryBitmap {
  static constexpr int kWordsPerThread = 4;
  static constexpr int kWords = kWordsPerThread * kLongColumnsThreads;
  static constexpr int kRange = kWords * 32;  // queries ranked at a time
  unsigned word[kWords];
  int before[kWords];  // bits set in the words before
  int warp_total[kLongColumnsThreads / kWarpSize];
  int earlier;  // entries of queries before the piece
};

// Writes to `order` the positions of the entries with queries in [low, high), by query, after those
// of earlier queries. Returns where they begin and end. By all threads of the block.
__device__ __forceinline__ int2 OrderPiece(const ColumnEntry* entries, int count, int64_t low,
                                           int64_t high, QueryBitmap& bitmap, int* order) {
  constexpr int kWarps = kLongColumnsThreads / kWarpSize;
  constexpr int kWordsPerThread = QueryBitmap::kWordsPerThread;
  const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
  if (thread == 0) bitmap.earlier = 0;
  __syncthreads();
  if (low > 0) {
    int earlier = 0;
    for (int i = thread; i < count; i += kLongColumnsThreads) {
      earlier += __ldg(&entries[i].query) < low;
    }
    earlier = __reduce_add_sync(kFullWarp, earlier);
    if (lane == 0) atomicAdd(&bitmap.earlier, earlier);
    __syncthreads();
  }
  const int begin = bitmap.earlier;
  int ranked = begin;
  for (int64_t base = low; base < high; base += QueryBitmap::kRange) {
    const int range = static_cast<int>(min(high - base, static_cast<int64_t>(QueryBitmap::kRange)));
    for (int i = thread; i < QueryBitmap::kWords; i += kLongColumnsThreads) bitmap.word[i] = 0;
    __syncthreads();
    for (int i = thread; i < count; i += kLongColumnsThreads) {
      const int64_t bit = __ldg(&entries[i].query) - base;
      if (bit >= 0 && bit < range) atomicOr(&bitmap.word[bit / 32], 1u << (bit % 32));
    }
    __syncthreads();
    int own[kWordsPerThread], sum = 0;
#pragma unroll
    for (int i = 0; i < kWordsPerThread; ++i) {
      own[i] = sum;
      sum += __popc(bitmap.word[thread * kWordsPerThread + i]);
    }
    int inclusive = sum;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int other = __shfl_up_sync(kFullWarp, inclusive, offset);
      if (lane >= offset) inclusive += other;
    }
    if (lane == kWarpSize - 1) bitmap.warp_total[warp] = inclusive;
    __syncthreads();
    int first = ranked, total = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) first += bitmap.warp_total[i];
      total += bitmap.warp_total[i];
    }
#pragma unroll
    for (int i = 0; i < kWordsPerThread; ++i) {
      bitmap.before[thread * kWordsPerThread + i] = first + inclusive - sum + own[i];
    }
    __syncthreads();
    for (int i = thread; i < count; i += kLongColumnsThreads) {
      const int64_t bit = __ldg(&entries[i].query) - base;
      if (bit >= 0 && bit < range) {
        const unsigned smaller = bitmap.word[bit / 32] & ((1u << (bit % 32)) - 1);
        order[bitmap.before[bit / 32] + __popc(smaller)] = i;
      }
    }
    ranked += total;
    __syncthreads();
  }
  return make_int2(begin, ranked);
}

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kLongColumnsThreads, kHeadDim <= 64 ? 3 : 2)
    LongColumnsBackwardKernel(const __grid_constant__ SupportColumnsParams<Element> params) {
  WaitForEarlierKernels();
  constexpr int kWarps = kLongColumnsThreads / kWarpSize;
  constexpr int kPart = kHeadDim / kLanesPerRow;
  constexpr int kGroups = kLongColumnsThreads / kLanesPerRow;
  __shared__ QueryBitmap bitmap;
  __shared__ float shared_sums[kWarps][2][kHeadDim];
  __shared__ bool shared_last;

  const Shape& shape = params.shape;
  const int thread = threadIdx.x, warp = thread / kWarpSize, warp_lane = thread % kWarpSize;
  const int part = warp_lane / kLanesPerRow, lane = warp_lane % kLanesPerRow;
  const int64_t queries_seen = static_cast<int64_t>(shape.group) * shape.queries;
  const int tasks = params.control->long_column_count;
  for (int turn = blockIdx.x; turn < tasks; turn += gridDim.x) {
    const LongColumnTask task = params.long_tasks[turn];
    const int kv = task.column / shape.keys, column = task.column % shape.keys;
    const int count = params.column_count[task.column];
    const int offset = params.column_offset[task.column];
    const ColumnEntry* const entries = params.column_entries + offset;
    const int64_t range = (queries_seen + task.pieces - 1) / task.pieces;
    const int64_t low = task.piece * range;
    int* const order = params.order + offset;
    const int2 ranks =
        OrderPiece(entries, count, low, min(low + range, queries_seen), bitmap, order);

    const int batch = kv / shape.kv_heads, first_head = kv % shape.kv_heads * shape.group;
    const Element* const queries = params.query.Row(batch, first_head, 0) + lane * kPart;
    const Element* const gradients =
        params.output_gradient.Row(batch, first_head, 0) + lane * kPart;
    ColumnSums<kPart> sums;
    sums.AddAll(queries, gradients, ranks.x + thread / kLanesPerRow, kGroups, ranks.y,
                [&](int i) { return MakeTerm(params, entries + order[i]); });
    __syncwarp();
    float total[kPart / 2];
    sums.Reduce(part, total);
#pragma unroll
    for (int i = 0; i < kPart / 2; ++i) {
      shared_sums[warp][part / 2][lane * kPart + (part & 1) * (kPart / 2) + i] = total[i];
    }
    __syncthreads();

    // Two dimensions of one gradient a thread.
    const bool is_value = thread >= kHeadDim / 2;
    const int first = thread % (kHeadDim / 2) * 2;
    float sum[2] = {0, 0};
    if (thread < kHeadDim) {
      for (int w = 0; w < kWarps; ++w) {
        sum[0] += shared_sums[w][is_value][first];
        sum[1] += shared_sums[w][is_value][first + 1];
      }
    }
    bool last = true;
    if (task.pieces > 1) {
      // A piece has at least kLongSumEntries entries' worth of room, so columns share no slot.
      float2* const slots = reinterpret_cast<float2*>(params.long_sums) +
                            static_cast<int64_t>(offset / kLongSumEntries) * kHeadDim + thread;
      if (thread < kHeadDim) slots[task.piece * kHeadDim] = make_float2(sum[0], sum[1]);
      __threadfence();
      __syncthreads();
      if (thread == 0) {
        int* const arrived = &params.long_tasks[turn - task.piece].arrived;
        shared_last = atomicAdd(arrived, 1) == task.pieces - 1;
        __threadfence();
      }
      __syncthreads();
      last = shared_last;
      if (last && thread < kHeadDim) {
        sum[0] = sum[1] = 0;
        for (int piece = 0; piece < task.pieces; ++piece) {
          const float2 x = __ldcg(slots + piece * kHeadDim);
          sum[0] += x.x;
          sum[1] += x.y;
        }
      }
    }
    if (last && thread < kHeadDim) {
      StoreColumn<Element, kHeadDim, 2>(params, is_value, kv, column, first, sum);
    }
    __syncthreads();
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_LONG_COLUMNS_BACKWARD_CUH_
