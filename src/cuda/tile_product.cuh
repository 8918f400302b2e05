// Tensor-core products of one warp group: 64 rows, operand A in registers, B in shared memory.
//
// An accumulator of a 64 x N product gives thread t of the group rows 16 * (t / 32) + t % 32 / 4 (+
// 8) and, in element e, column 8 * (e / 4) + 2 * (t % 4) + (e & 1) of row (e & 2) ? +8 : +0. Four
// consecutive A registers hold the same two rows for 16 columns, so an accumulator converts to an A
// operand in place.
#ifndef FLASH_ENTMAX_CUDA_TILE_PRODUCT_CUH_
#define FLASH_ENTMAX_CUDA_TILE_PRODUCT_CUH_

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#include <utility>

#include "element.cuh"
#include "pipeline.cuh"

namespace flash_entmax::cuda {

using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;

// The instruction for element type, N columns and the order of B in memory.
template <class Element, int kColumns, Major kOrder>
struct Instruction;

#define FLASH_ENTMAX_INSTRUCTION(columns)                                                        \
  template <Major kOrder>                                                                        \
  struct Instruction<__nv_bfloat16, columns, kOrder> {                                           \
    using Type = cute::SM90::GMMA::MMA_64x##columns##x16_F32BF16BF16_RS<Major::K, kOrder>;       \
    using SharedType = cute::SM90::GMMA::MMA_64x##columns##x16_F32BF16BF16_SS<Major::K, kOrder>; \
  };                                                                                             \
  template <Major kOrder>                                                                        \
  struct Instruction<__half, columns, kOrder> {                                                  \
    using Type = cute::SM90::GMMA::MMA_64x##columns##x16_F32F16F16_RS<Major::K, kOrder>;         \
    using SharedType = cute::SM90::GMMA::MMA_64x##columns##x16_F32F16F16_SS<Major::K, kOrder>;   \
  };
FLASH_ENTMAX_INSTRUCTION(32)
FLASH_ENTMAX_INSTRUCTION(64)
FLASH_ENTMAX_INSTRUCTION(128)
#undef FLASH_ENTMAX_INSTRUCTION

// Shared-memory descriptors (units of 16 bytes). Both describe tiles of `box rows` of 128 or 64
// bytes, swizzled by the tensor copy; groups of 8 rows follow each other.
template <int kHeadDim>
struct OperandLayout {
  static constexpr int kRowBytes = kBoxColumns<kHeadDim> * 2;
  static constexpr uint64_t kSwizzle = (kRowBytes == 128 ? 1ull : 2ull) << 62;
  static constexpr uint64_t kGroupStride = static_cast<uint64_t>(8 * kRowBytes / 16) << 32;

  static __device__ __forceinline__ uint64_t Address(const void* tile) {
    return (static_cast<uint64_t>(__cvta_generic_to_shared(tile)) & 0x3ffff) >> 4;
  }

  // B = tile^T: the sum runs over the head dimension (contiguous). Columns = tile rows.
  static __device__ __forceinline__ uint64_t RowsAsColumns(const void* tile) {
    return Address(tile) | (1ull << 16) | kGroupStride | kSwizzle;
  }

  // B = tile: the sum runs over tile rows. Columns = head dimension; `box_rows` rows in each box.
  static __device__ __forceinline__ uint64_t RowsAsSum(const void* tile, int box_rows) {
    return Address(tile) | (static_cast<uint64_t>(box_rows * kRowBytes / 16) << 16) | kGroupStride |
           kSwizzle;
  }

  // Offset of the `step`-th 16 elements of the sum.
  static __device__ __forceinline__ uint64_t HeadStep(int step, int box_rows) {
    constexpr int kStepsPerBox = kBoxColumns<kHeadDim> / 16;
    return step / kStepsPerBox * (box_rows * kRowBytes / 16) + step % kStepsPerBox * 2;
  }
  static __device__ __forceinline__ uint64_t RowStep(int step) {
    return static_cast<uint64_t>(step) * (16 * kRowBytes / 16);
  }
};

// Keeps the compiler from moving accumulator accesses across an asynchronous product.
template <class Register, int kCount>
__device__ __forceinline__ void Fence(Register (&accumulator)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(accumulator[i]);
}

template <class Type, class Register, int kCount, size_t... kIndex>
__device__ __forceinline__ void IssueInstruction(const uint32_t* a, uint64_t b,
                                                 Register (&accumulator)[kCount], ScaleOut scale,
                                                 std::index_sequence<kIndex...>) {
  Type::fma(a[0], a[1], a[2], a[3], b, accumulator[kIndex]..., scale);
}

template <class Type, int kCount, size_t... kIndex>
__device__ __forceinline__ void IssueSharedInstruction(uint64_t a, uint64_t b,
                                                       float (&accumulator)[kCount], ScaleOut scale,
                                                       std::index_sequence<kIndex...>) {
  Type::fma(a, b, accumulator[kIndex]..., scale);
}

// accumulator = A . tile^T over the head dimension, for the 64 tile rows from `first_row`.
// Asynchronous: the caller commits and waits.
template <class Element, int kHeadDim>
__device__ __forceinline__ void IssueScores(const uint32_t (&a)[kHeadDim / 4], const char* tile,
                                            int box_rows, int first_row, float (&accumulator)[32]) {
  using Layout = OperandLayout<kHeadDim>;
  using Type = typename Instruction<Element, 64, Major::K>::Type;
  const uint64_t b = Layout::RowsAsColumns(tile + first_row * Layout::kRowBytes);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    IssueInstruction<Type>(a + 4 * step, b + Layout::HeadStep(step, box_rows), accumulator,
                           step ? ScaleOut::One : ScaleOut::Zero, std::make_index_sequence<32>{});
  }
}

// The same with operand A in shared memory: 64 rows of `a_tile` from `a_row`.
template <class Element, int kHeadDim>
__device__ __forceinline__ void IssueSharedScores(const char* a_tile, int a_box_rows, int a_row,
                                                  const char* tile, int box_rows, int first_row,
                                                  float (&accumulator)[32]) {
  using Layout = OperandLayout<kHeadDim>;
  using Type = typename Instruction<Element, 64, Major::K>::SharedType;
  const uint64_t a = Layout::RowsAsColumns(a_tile + a_row * Layout::kRowBytes);
  const uint64_t b = Layout::RowsAsColumns(tile + first_row * Layout::kRowBytes);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    IssueSharedInstruction<Type>(
        a + Layout::HeadStep(step, a_box_rows), b + Layout::HeadStep(step, box_rows), accumulator,
        step ? ScaleOut::One : ScaleOut::Zero, std::make_index_sequence<32>{});
  }
}

// The same for 128 tile rows with fp16 inputs and fp16 sums: half the registers, and two scores in
// each. Register 2 i + r holds columns 8 i + 2 * (t % 4) and the next one of row r.
template <int kHeadDim>
__device__ __forceinline__ void IssueHalfScores(const uint32_t (&a)[kHeadDim / 4], const char* tile,
                                                int box_rows, int first_row,
                                                uint32_t (&accumulator)[32]) {
  using Layout = OperandLayout<kHeadDim>;
  using Type = cute::SM90::GMMA::MMA_64x128x16_F16F16F16_RS<Major::K, Major::K>;
  const uint64_t b = Layout::RowsAsColumns(tile + first_row * Layout::kRowBytes);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    IssueInstruction<Type>(a + 4 * step, b + Layout::HeadStep(step, box_rows), accumulator,
                           step ? ScaleOut::One : ScaleOut::Zero, std::make_index_sequence<32>{});
  }
}

// accumulator += A . tile over 64 tile rows from `first_row`; columns are the head dimension.
template <class Element, int kHeadDim>
__device__ __forceinline__ void IssueWeightedRows(const uint32_t (&a)[16], const char* tile,
                                                  int box_rows, int first_row,
                                                  float (&accumulator)[kHeadDim / 2]) {
  using Layout = OperandLayout<kHeadDim>;
  using Type = typename Instruction<Element, kHeadDim, Major::MN>::Type;
  const uint64_t b = Layout::RowsAsSum(tile + first_row * Layout::kRowBytes, box_rows);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    IssueInstruction<Type>(a + 4 * step, b + Layout::RowStep(step), accumulator, ScaleOut::One,
                           std::make_index_sequence<kHeadDim / 2>{});
  }
}

// Loads a thread's part of 64 rows as operand A. Rows outside [0, row_count) read as zero.
template <class Element, int kHeadDim>
__device__ __forceinline__ void LoadOperand(const Element* head, int64_t row_stride, int row,
                                            int row_count, int lane, uint32_t (&a)[kHeadDim / 4]) {
  const bool valid0 = row < row_count, valid1 = row + 8 < row_count;
  const auto* first = reinterpret_cast<const uint32_t*>(head + row * row_stride) + lane % 4;
  const auto* second = reinterpret_cast<const uint32_t*>(head + (row + 8) * row_stride) + lane % 4;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    a[4 * step] = valid0 ? __ldg(first + 8 * step) : 0;
    a[4 * step + 1] = valid1 ? __ldg(second + 8 * step) : 0;
    a[4 * step + 2] = valid0 ? __ldg(first + 8 * step + 4) : 0;
    a[4 * step + 3] = valid1 ? __ldg(second + 8 * step + 4) : 0;
  }
}

// Copies rows [row, row + 64) to the rows from `tile_row` of a tile in shared memory, in the layout
// of a tensor copy: boxes of 64 columns, the eight 16-byte chunks of a row exchanged by row number.
// Rows at or past `row_count` become zero. By all threads of a warp group, which must meet at a
// barrier before the tile is used as operand A (IssueSharedScores).
template <class Element, int kHeadDim>
__device__ __forceinline__ void LoadSharedOperand(const Element* head, int64_t row_stride, int row,
                                                  int row_count, char* tile, int box_rows,
                                                  int tile_row) {
  static_assert(kBoxColumns<kHeadDim> == 64);
  constexpr int kChunks = kHeadDim / 8;
  for (int i = threadIdx.x % kWarpGroupThreads; i < 64 * kChunks; i += kWarpGroupThreads) {
    const int r = i / kChunks, chunk = i % kChunks;
    const bool valid = row + r < row_count;
    const Element* const source = head + (valid ? row + r : 0) * row_stride + chunk * 8;
    const uint4 words =
        valid ? __ldg(reinterpret_cast<const uint4*>(source)) : make_uint4(0, 0, 0, 0);
    char* const destination = tile + (chunk / 8 * box_rows + tile_row + r) * 128;
    reinterpret_cast<uint4*>(destination)[chunk % 8 ^ (tile_row + r) % 8] = words;
  }
  cutlass::arch::fence_view_async_shared();
}

// Where the 16 queries of a warp lie that takes part in a unit of 128.
struct UnitRows {
  int head;  // batch * heads + query_head
  int batch;
  int query_head;
  int warp_row;

  __device__ __forceinline__ UnitRows(const Shape& shape, int unit)
      : head(unit / shape.Units()),
        batch(head / shape.heads),
        query_head(head - batch * shape.heads),
        warp_row((unit - head * shape.Units()) * Shape::kUnitRows +
                 static_cast<int>(threadIdx.x) / kWarpSize * kStripRows) {}

  __device__ __forceinline__ int64_t PaddedRow(const Shape& shape, int row) const {
    return static_cast<int64_t>(head) * shape.padded_queries + row;
  }
};

// For the factors of rows that have no distribution: nothing of them may reach the keys' gradients.
__device__ __forceinline__ float FiniteOrZero(float x) { return fabsf(x) < INFINITY ? x : 0.0f; }

// The factors (query_scale) of a unit's queries, in shared memory: the consumers have no registers
// for them. A warp writes and reads its own rows only.
struct UnitFactors {
  float of_row[Shape::kUnitRows];

  // `factors`: of the head's rows.
  __device__ __forceinline__ void Load(const float* factors, int warp_row) {
    const int lane = threadIdx.x % kWarpSize, strip = FirstOfWarp();
    __syncwarp();
    if (lane < kStripRows) of_row[strip + lane] = __ldg(factors + warp_row + lane);
    __syncwarp();
  }
  // Of row `i` (0 or 1) of the two that an accumulator gives a thread.
  __device__ __forceinline__ float Of(int i) const {
    return of_row[FirstOfWarp() + threadIdx.x % kWarpSize / 4 + 8 * i];
  }
  // Scores as they come from a product.
  __device__ __forceinline__ void Scale(float (&scores)[32]) const {
    const float factor[2] = {Of(0), Of(1)};
#pragma unroll
    for (int e = 0; e < 32; ++e) scores[e] *= factor[(e >> 1) & 1];
  }

 private:
  static __device__ __forceinline__ int FirstOfWarp() {
    return static_cast<int>(threadIdx.x) / kWarpSize * kStripRows;
  }
};

// Writes a 64 x head_dim accumulator times a factor as fp32 rows of head_dim.
template <int kHeadDim>
__device__ __forceinline__ void StoreSums(const float (&accumulator)[kHeadDim / 2], float factor,
                                          float* rows, int row, int lane) {
  float* const first = rows + static_cast<int64_t>(row) * kHeadDim + 2 * (lane % 4);
  float* const second = first + 8 * kHeadDim;
#pragma unroll
  for (int block = 0; block < kHeadDim / 8; ++block) {
    const float* x = accumulator + 4 * block;
    *reinterpret_cast<float2*>(first + 8 * block) = make_float2(factor * x[0], factor * x[1]);
    *reinterpret_cast<float2*>(second + 8 * block) = make_float2(factor * x[2], factor * x[3]);
  }
}

// Writes a 64 x head_dim accumulator, one factor a row. Rows at or past `row_count` are skipped.
template <class Element, int kHeadDim>
__device__ __forceinline__ void StoreRows(const float (&accumulator)[kHeadDim / 2], float factor0,
                                          float factor1, Element* head, int64_t row_stride, int row,
                                          int row_count, int lane) {
  auto* first = reinterpret_cast<uint32_t*>(head + row * row_stride) + lane % 4;
  auto* second = reinterpret_cast<uint32_t*>(head + (row + 8) * row_stride) + lane % 4;
#pragma unroll
  for (int block = 0; block < kHeadDim / 8; ++block) {
    const float* x = accumulator + 4 * block;
    if (row < row_count) {
      first[4 * block] = ElementTraits<Element>::Pack(factor0 * x[0], factor0 * x[1]);
    }
    if (row + 8 < row_count) {
      second[4 * block] = ElementTraits<Element>::Pack(factor1 * x[2], factor1 * x[3]);
    }
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_TILE_PRODUCT_CUH_
