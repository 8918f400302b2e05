// fp32 scores of gathered keys on the tensor cores: eight queries a warp, four lanes a query.
//
// mma.m16n8k16 multiplies 16 rows of operand A with 8 columns of operand B. A thread's four
// registers of A belong to the rows g, g + 8, g, g + 8 (g = lane / 4). Loaded as they are, the four
// words of a 16-byte piece of a key put the words 0 and 2 into row g and the words 1 and 3 into row
// g + 8. If columns 0 to 3 of B are the words 0 and 2 of four queries and columns 4 to 7 the words
// 1 and 3 of the same queries, the score of key g and query c is
//   D[g][c] + D[g + 8][c + 4].
// A product thus takes eight keys, two for each of four queries. Most of its sums are not needed;
// products are plenty, and no operand has to be unpacked or moved: this takes a fifth of the
// instructions of multiplying and reducing in fp32. The order of the head dimension inside a
// product is free as long as both operands agree: lane q of a row loads its pieces q, q + 4, ...,
// so that a load touches whole 32-byte sectors.
#ifndef FLASH_ENTMAX_CUDA_CANDIDATE_SCORES_CUH_
#define FLASH_ENTMAX_CUDA_CANDIDATE_SCORES_CUH_

#include "element.cuh"
#include "pipeline.cuh"

namespace flash_entmax::cuda {

constexpr int kLanesPerQuery = 4;
constexpr int kQueriesPerWarp = kWarpSize / kLanesPerQuery;

// Rows of one head, addressed by 32-bit row numbers and a row size in bytes below 4 GiB. Each lane
// sees its own pieces of 8 elements.
template <int kHeadDim>
struct PieceRows {
  static constexpr int kPieces = kHeadDim / (8 * kLanesPerQuery);
  const char* data;
  uint32_t row_bytes;

  template <class Element>
  static __device__ __forceinline__ PieceRows Of(const Tensor<const Element>& tensor, int batch,
                                                 int head, int quarter, uint32_t row_bytes) {
    return {reinterpret_cast<const char*>(tensor.Row(batch, head, 0) + 8 * quarter), row_bytes};
  }
  __device__ __forceinline__ void Load(int row, uint4 (&piece)[kPieces]) const {
    // In one instruction: left to itself the compiler takes several.
    const uint4* source;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(source) : "r"(row), "r"(row_bytes), "l"(data));
#pragma unroll
    for (int i = 0; i < kPieces; ++i) piece[i] = __ldg(source + kLanesPerQuery * i);
  }
};

// A 32-bit shared-memory address. Pointers would have their base computed again at every access.
class SharedAddress {
 public:
  explicit __device__ __forceinline__ SharedAddress(const void* pointer)
      : bytes_(static_cast<uint32_t>(__cvta_generic_to_shared(pointer))) {
    Keep();
  }
  // From here on the compiler has to keep the address instead of computing it again.
  __device__ __forceinline__ void Keep() { asm volatile("" : "+r"(bytes_)); }
  __device__ __forceinline__ SharedAddress operator+(int words) const {
    SharedAddress sum = *this;
    sum.bytes_ += 4 * words;
    return sum;
  }
  // `first` is not above this address.
  __device__ __forceinline__ unsigned WordsFrom(SharedAddress first) const {
    return (bytes_ - first.bytes_) / 4;
  }
  __device__ __forceinline__ bool operator<(SharedAddress other) const {
    return bytes_ < other.bytes_;
  }

  __device__ __forceinline__ int Int() const {
    int x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(bytes_) : "memory");
    return x;
  }
  __device__ __forceinline__ float Float() const { return __int_as_float(Int()); }
  __device__ __forceinline__ int2 TwoInts() const {
    int2 x;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(x.x), "=r"(x.y)
                 : "r"(bytes_)
                 : "memory");
    return x;
  }
  __device__ __forceinline__ int4 FourInts() const {
    int4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(bytes_)
                 : "memory");
    return x;
  }
  __device__ __forceinline__ void Set(int x) const {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(bytes_), "r"(x) : "memory");
  }
  __device__ __forceinline__ void Set(float x) const { Set(__float_as_int(x)); }
  __device__ __forceinline__ void SetTwo(float x, float y) const {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(bytes_), "f"(x), "f"(y) : "memory");
  }

 private:
  uint32_t bytes_;
};

// sum += A . B for 16 x 16 times 16 x 8.
template <class Element>
__device__ __forceinline__ void MultiplyAdd(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                            uint32_t b0, uint32_t b1, float (&sum)[4]);

#define FLASH_ENTMAX_MULTIPLY_ADD(element, type)                                              \
  template <>                                                                                 \
  __device__ __forceinline__ void MultiplyAdd<element>(uint32_t a0, uint32_t a1, uint32_t a2, \
                                                       uint32_t a3, uint32_t b0, uint32_t b1, \
                                                       float(&sum)[4]) {                      \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                       \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"       \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                     \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                     \
  }
FLASH_ENTMAX_MULTIPLY_ADD(__nv_bfloat16, "bf16")
FLASH_ENTMAX_MULTIPLY_ADD(__half, "f16")
#undef FLASH_ENTMAX_MULTIPLY_ADD

// Four queries as operand B: lane 4 c + q holds the words 0 and 2 of its pieces of query c, lane 16
// + 4 c + q the words 1 and 3.
template <int kPieces>
struct QueryOperand {
  uint32_t word[kPieces][2];

  // `piece`: of query lane / 4 % 4.
  __device__ __forceinline__ void Set(const uint4 (&piece)[kPieces], int lane) {
    const bool upper = lane >= kWarpSize / 2;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      word[i][0] = upper ? piece[i].y : piece[i].x;
      word[i][1] = upper ? piece[i].w : piece[i].z;
    }
  }
};

// The product of query lane / 8 of the four with the key whose pieces the lane and its three
// neighbours hold. Valid where lane % 4 == lane / 16. All lanes take part; the pieces of a missing
// key may hold anything.
template <class Element, int kPieces>
__device__ __forceinline__ float Score(const uint4 (&key)[kPieces],
                                       const QueryOperand<kPieces>& query, int lane) {
  float sum[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    MultiplyAdd<Element>(key[i].x, key[i].y, key[i].z, key[i].w, query.word[i][0], query.word[i][1],
                         sum);
  }
  const bool odd = lane / 8 & 1;  // the column is one of a pair
  const float lower = odd ? sum[1] : sum[0], upper = odd ? sum[3] : sum[2];
  return lower + __shfl_xor_sync(kFullWarp, upper, 2);
}

// sum += weight * piece, 8 elements a piece.
template <class Element, int kPieces>
__device__ __forceinline__ void AddPieces(float weight, const uint4 (&piece)[kPieces],
                                          float (&sum)[8 * kPieces]) {
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const uint32_t words[4] = {piece[i].x, piece[i].y, piece[i].z, piece[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = ElementTraits<Element>::Unpack(words[j]);
      float* const place = sum + 8 * i + 2 * j;
      place[0] = fmaf(weight, pair.x, place[0]);
      place[1] = fmaf(weight, pair.y, place[1]);
    }
  }
}

// Writes a lane's pieces of a row. `row` points to the lane's first piece.
template <class Element, int kCount>
__device__ __forceinline__ void StorePieces(const float (&sum)[kCount], Element* row) {
#pragma unroll
  for (int i = 0; i < kCount / 8; ++i) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      words[j] = ElementTraits<Element>::Pack(sum[8 * i + 2 * j], sum[8 * i + 2 * j + 1]);
    }
    reinterpret_cast<uint4*>(row)[kLanesPerQuery * i] =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_CANDIDATE_SCORES_CUH_
