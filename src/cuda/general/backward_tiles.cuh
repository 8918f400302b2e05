// What the two halves of the general backward share: tile sizes, the band of visible pairs, the
// tensor-core verbs, loads and stores of tiles. backward_rows.cuh has the algorithm.
//
// A block owns a tile of rows (queries or keys) whose gradients it sums in registers, and streams
// tiles of the other kind past them. "Own" and "streamed" mean that everywhere here.
#ifndef FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_TILES_CUH_
#define FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_TILES_CUH_

#include "general/launch.h"
#include "general/mma.cuh"
#include "general/problem.h"
#include "general/score.cuh"
#include "general/tile_bounds.cuh"

namespace flash_entmax::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// Tile sizes. They depend on the bytes of a row only, because shared memory is what limits them:
// at most 83 KB a block, as devices of compute capability 8.6 have 99 KB.
template <class Element, int kHeadDim>
struct BackwardShape {
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(Element));
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  // A warp owns kRowTiles times 16 rows. Two make every fragment of a streamed tile serve twice,
  // where the sums of so many rows fit in registers.
  static constexpr int kRowTiles = kRowBytes == 64 ? 2 : 1;
  // Warps that own the same rows, each with its part of the gradient columns; the scores are then
  // made once a part. Keeps the sums of long rows in registers.
  static constexpr int kParts = kRowBytes <= 256 ? 1 : kRowBytes / 256;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kOwnRows = kWarpRows * kWarps / kParts;
  static constexpr int kStreamedRows = kRowBytes == 64 ? 64 : kRowBytes <= 256 ? 32 : 16;
  static constexpr int kStages = kRowBytes == 1024 ? 1 : 2;
  // Streamed rows whose scores a warp has in registers at a time; what it skips as a whole.
  static constexpr int kChunk = kRowBytes == 256 ? 32 : 16;
  static constexpr int kColumnTiles = kHeadDim / kParts / 8;
  // Own rows stay in registers as fragments.
  static constexpr bool kKeepOwn = sizeof(Element) == 2 && kHeadDim <= 64;
};

// Rows [first, end); empty if end <= first.
struct RowRange {
  int first = 0;
  int end = 0;
};

// Which pairs of rows of a sequence see each other: own row r and streamed row s if
// low <= s - r <= high. The same mask as KeyRange, from either side.
struct Band {
  int low;
  int high;
  int own;  // rows of the sequence
  int streamed;

  static __device__ __forceinline__ Band OfQueries(const GeneralProblem& problem,
                                                   const SequencePart& part) {
    const int shift = part.keys - part.queries;
    const int right = problem.causal ? 0 : problem.window_right;
    return {max(shift - problem.window_left, -part.queries), min(shift + right, part.keys),
            part.queries, part.keys};
  }
  static __device__ __forceinline__ Band OfKeys(const GeneralProblem& problem,
                                                const SequencePart& part) {
    const Band band = OfQueries(problem, part);
    return {-band.high, -band.low, band.streamed, band.own};
  }

  // Streamed rows that some of the own rows [first, first + count) see.
  __device__ __forceinline__ RowRange SeenByAny(int first, int count) const {
    const int last = min(first + count, own) - 1;
    if (last < first) return {};
    return {max(0, first + low), min(streamed, last + high + 1)};
  }
  // Streamed rows that all of them see; none if some of them do not exist.
  __device__ __forceinline__ RowRange SeenByAll(int first, int count) const {
    const int last = first + count - 1;
    if (last >= own) return {};
    return {max(0, last + low), min(streamed, first + high + 1)};
  }
  __device__ __forceinline__ bool Sees(int own_row, int streamed_row) const {
    return static_cast<unsigned>(streamed_row - own_row - low) <=
               static_cast<unsigned>(high - low) &&
           own_row < own && streamed_row < streamed;
  }
};

// What a block works on. Lies in shared memory: the registers of the inner loops are needed for
// sums.
struct BlockPlace {
  int head = 0;  // query head or key head
  SequencePart part;
  Band band;
  int first = 0;      // first own row, counted in the sequence
  RowRange streamed;  // that any own row sees

  template <bool kKeys>
  static __device__ __forceinline__ BlockPlace Of(const GeneralProblem& problem, int head, int tile,
                                                  int own_rows) {
    const TilePlace place = PlaceTile<kKeys>(problem, tile, own_rows);
    const Band band =
        kKeys ? Band::OfKeys(problem, place.part) : Band::OfQueries(problem, place.part);
    return {head, place.part, band, place.first, band.SeenByAny(place.first, own_rows)};
  }
};

// Which streamed tiles matter (backward_marks.cuh). In shared memory.
struct StreamedMarks {
  static constexpr int kMarks = 4096;

  uint32_t words[kMarks / 32];
  MarkedRange range;
  int shift;
};

// Dynamic shared memory of a block, in this order.
template <class Element, int kHeadDim>
struct BackwardShared {
  using Shape = BackwardShape<Element, kHeadDim>;
  using Tile = SharedTile<Element, kHeadDim>;
  static constexpr int kOwn = Shape::kOwnRows, kStreamed = Shape::kStreamedRows;
  static constexpr int kRows = 2 * kOwn + (2 * Shape::kStages + 1) * kStreamed;
  static constexpr int kBytes =
      Tile::Bytes(kRows) +
      static_cast<int>(4 * kStreamed * sizeof(float) + sizeof(BlockPlace) + sizeof(StreamedMarks));
  static_assert(kBytes <= 99 * 1024);

  Element* data;

  __device__ __forceinline__ Tile Rows(int first) const { return {data + first * Tile::kStride}; }
  // Query and output gradient, or key and value.
  __device__ __forceinline__ Tile Own(int which) const { return Rows(which * kOwn); }
  __device__ __forceinline__ Tile Streamed(int stage, int which) const {
    return Rows(2 * kOwn + (2 * stage + which) * kStreamed);
  }
  // The weighted mean of V of the queries in a streamed tile.
  __device__ __forceinline__ Tile Mean() const { return Streamed(Shape::kStages, 0); }
  // The same for own queries: needed only before the second stage is.
  __device__ __forceinline__ Tile OwnMean() const {
    return Streamed(Shape::kStages - 1, Shape::kStages == 1 ? 2 : 0);
  }
  static_assert(kOwn <= (Shape::kStages == 1 ? 1 : 2) * kStreamed);

  // 1, or 0 for streamed keys with NaN or infinities.
  __device__ __forceinline__ float* KeyIsFinite() const { return Scalars(0); }
  // Of the queries in a streamed tile; thresholds have two stages.
  __device__ __forceinline__ float* Threshold(int stage) const { return Scalars(stage); }
  __device__ __forceinline__ float* MinusDelta() const { return Scalars(2); }
  __device__ __forceinline__ float* Factor() const { return Scalars(3); }

  __device__ __forceinline__ BlockPlace& Place() const {
    return *reinterpret_cast<BlockPlace*>(Scalars(4));
  }
  __device__ __forceinline__ StreamedMarks& Marks() const {
    return *reinterpret_cast<StreamedMarks*>(&Place() + 1);
  }

 private:
  __device__ __forceinline__ float* Scalars(int which) const {
    return reinterpret_cast<float*>(Rows(kRows).data) + which * kStreamed;
  }
};

// z from a dot product where nothing but a factor is between them. The forward rounds this product,
// except where it works on the dot products themselves (alpha = 1.5).
template <Alpha kMode>
__device__ __forceinline__ float PlainProduct(float factor, float dot) {
  return kMode == Alpha::kOneAndHalf ? factor * dot : __fmul_rn(factor, dot);
}

// p and u = p^(2 - alpha) from w, the positive part of z - tau. NaN stays NaN.
struct Probability {
  float p;
  float u;

  // exponent: (2 - alpha) / (alpha - 1), only for kGeneral.
  template <Alpha kMode>
  static __device__ __forceinline__ Probability Of(float w, float exponent) {
    if constexpr (kMode == Alpha::kOneAndHalf) {
      return {w * w, w};
    } else {
      float u = w;
      if (w > 0.0f) u = kMode == Alpha::kTwo ? 1.0f : exp2f(exponent * __log2f(w));
      return {u * w, u};
    }
  }
};

// One alpha a head; a constant where the kernel is compiled for one value.
template <Alpha kMode>
__device__ __forceinline__ AlphaCurve CurveOf(const GeneralProblem& problem, int head) {
  if constexpr (kMode == Alpha::kOneAndHalf) return {kMode, 0.5f, 2.0f};
  if constexpr (kMode == Alpha::kTwo) return {kMode, 1.0f, 1.0f};
  return AlphaCurve::Of(problem, head);
}

// A warp's own rows as left operands, kept in registers or read from shared memory each time.
template <class Element, int kHeadDim>
struct OwnOperand {
  using Shape = BackwardShape<Element, kHeadDim>;
  using Product = Mma<Element>;
  static constexpr int kSteps = kHeadDim / Product::kDepth;

  SharedTile<Element, kHeadDim> tile;
  int row;
  typename Product::A kept[Shape::kKeepOwn ? Shape::kRowTiles : 1][Shape::kKeepOwn ? kSteps : 1];

  __device__ __forceinline__ OwnOperand(const SharedTile<Element, kHeadDim>& own_tile, int own_row)
      : tile(own_tile), row(own_row) {
    if constexpr (Shape::kKeepOwn) {
#pragma unroll
      for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          kept[m][step] = Product::LoadRowsA(tile, row + 16 * m, step);
        }
      }
    }
  }
  __device__ __forceinline__ typename Product::A Get(int m, int step) const {
    if constexpr (Shape::kKeepOwn) {
      return kept[m][step];
    } else {
      return Product::LoadRowsA(tile, row + 16 * m, step);
    }
  }
};

// c += own rows . transpose of the streamed rows [first, first + 8 kTiles); kFresh: c = this.
template <bool kFresh = false, class Element, int kHeadDim, int kRowTiles, int kTiles>
__device__ __forceinline__ void AddDotProducts(const OwnOperand<Element, kHeadDim>& own,
                                               const SharedTile<Element, kHeadDim>& streamed,
                                               int first, float (&c)[kRowTiles][kTiles][4]) {
  using Product = Mma<Element>;
  constexpr int kSteps = kHeadDim / Product::kDepth;
  constexpr int kUnroll = BackwardShape<Element, kHeadDim>::kKeepOwn ? kSteps : 4;
  constexpr bool kFromZero = kFresh && kUnroll == kSteps;
  if constexpr (kFresh && !kFromZero) {
#pragma unroll
    for (int e = 0; e < 4 * kRowTiles * kTiles; ++e)
      c[e / 4 / kTiles][e / 4 % kTiles][e % 4] = 0.0f;
  }
#pragma unroll kUnroll
  for (int step = 0; step < kSteps; ++step) {
    typename Product::A a[kRowTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) a[m] = own.Get(m, step);
#pragma unroll
    for (int t = 0; t < kTiles; t += 2) {
      typename Product::B low, high;
      Product::LoadRowsB2(streamed, first + 8 * t, step, &low, &high);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        MultiplyStep<Product>(kFromZero && step == 0, a[m], low, c[m][t]);
        MultiplyStep<Product>(kFromZero && step == 0, a[m], high, c[m][t + 1]);
      }
    }
  }
}

// sum += weights . streamed rows [first, first + 8 kTiles), columns from `column` on.
template <class Element, int kHeadDim, int kRowTiles, int kTiles, int kColumnTiles>
__device__ __forceinline__ void AddWeightedRows(const float (&weights)[kRowTiles][kTiles][4],
                                                const SharedTile<Element, kHeadDim>& streamed,
                                                int first, int column,
                                                float (&sum)[kRowTiles][kColumnTiles][4]) {
  using Product = Mma<Element>;
  constexpr int kWide = Product::kDepth / 8;  // accumulators that make one left operand
#pragma unroll
  for (int t = 0; t < kTiles; t += kWide) {
    typename Product::A a[kRowTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if constexpr (kWide == 2) {
        a[m] = Product::FromAccumulators(weights[m][t], weights[m][t + 1]);
      } else {
        a[m] = Product::FromAccumulators(weights[m][t]);
      }
    }
#pragma unroll
    for (int c = 0; c < kColumnTiles; c += 2) {
      typename Product::B low, high;
      Product::LoadSumB2(streamed, first + 8 * t, column + 8 * c, &low, &high);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        Product::Multiply(a[m], low, sum[m][c]);
        Product::Multiply(a[m], high, sum[m][c + 1]);
      }
    }
  }
}

// Dot products of row r of x with row r of y, for the rows row + lane / 4 and row + lane / 4 + 8:
// the diagonal of a 16 x 16 product, of which the tensor cores make the two blocks that matter.
template <class Element, int kHeadDim>
__device__ __forceinline__ void DiagonalProducts(const SharedTile<Element, kHeadDim>& x,
                                                 const SharedTile<Element, kHeadDim>& y, int row,
                                                 float (&diagonal)[2]) {
  using Product = Mma<Element>;
  float upper[4] = {}, lower[4] = {};
#pragma unroll 4
  for (int step = 0; step < kHeadDim / Product::kDepth; ++step) {
    const typename Product::A a = Product::LoadRowsA(x, row, step);
    typename Product::B low, high;
    Product::LoadRowsB2(y, row, step, &low, &high);
    Product::Multiply(a, low, upper);
    Product::Multiply(a, high, lower);
  }
  // Entry (g, g) lies with lane 4 g + g / 2, in its column g % 2; here g = lane / 4.
  const int lane = threadIdx.x % 32;
  const bool odd = lane / 4 % 2 != 0;
  const int source = lane / 4 * 4 + lane / 8;
  diagonal[0] = __shfl_sync(kAllLanes, odd ? upper[1] : upper[0], source);
  diagonal[1] = __shfl_sync(kAllLanes, odd ? lower[3] : lower[2], source);
}

__device__ __forceinline__ bool IsFinite(float x) { return x * 0.0f == 0.0f; }

template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ bool AllFinite(const float (&sum)[kRowTiles][kColumnTiles][4]) {
  float zero = 0.0f;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) zero = fmaf(sum[m][c][e], 0.0f, zero);
    }
  }
  return zero == 0.0f;
}

// Calls body(m, t, e) for every accumulator of a warp's scores; all are constants.
template <int kRowTiles, int kTiles, class Body>
__device__ __forceinline__ void ForAll(const float (&)[kRowTiles][kTiles][4], Body body) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) body(m, t, e);
    }
  }
}

// Replaces w by its positive part. True in all lanes if any of the warp's is not zero, or NaN.
template <int kRowTiles, int kTiles>
__device__ __forceinline__ bool AnyPositive(float (&w)[kRowTiles][kTiles][4]) {
  unsigned bits = 0;
  ForAll(w, [&](int m, int t, int e) {
    w[m][t][e] = PositivePart(w[m][t][e]);
    bits |= __float_as_uint(w[m][t][e]);
  });
  return __any_sync(kAllLanes, bits != 0);
}

// Replaces the elements of a tile that are NaN or infinite by zeros, and sets row_is_finite to 0
// for their rows unless it is null. All threads of a block call it.
template <class Element, int kHeadDim>
__device__ __forceinline__ void ClearNonFinite(const SharedTile<Element, kHeadDim>& tile, int rows,
                                               float* row_is_finite) {
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * kHeadDim; i += blockDim.x) {
    const int row = i / kHeadDim;
    Element* const element = tile.At(row, i % kHeadDim);
    if (IsFinite(static_cast<float>(*element))) continue;
    *element = Element(0.0f);
    if (row_is_finite != nullptr) row_is_finite[row] = 0.0f;
  }
}

// Where the rows of one head and sequence begin in a tensor.
struct TilePosition {
  int batch;
  int head;
  int origin;  // tensor row of the sequence's row 0
  int first;   // first row of the tile, counted in the sequence
  int rows;    // of the sequence; rows from there on are read as zeros and not written
  int columns;
};

template <class Element, int kHeadDim, int kRows>
__device__ __forceinline__ void LoadTile(const SharedTile<Element, kHeadDim>& tile,
                                         const StridedTensor& tensor, const TilePosition& at) {
  LoadSharedTile<Element, kHeadDim, kRows, BackwardShape<Element, kHeadDim>::kThreads>(
      tile, tensor.Row<const Element>(at.batch, at.head, at.origin), tensor.row, tensor.column,
      at.first, at.rows, at.columns, tensor.vectors);
}

// The forward's weighted mean of V as a tensor.
template <class Element>
__device__ __forceinline__ StridedTensor WeightedValue(const GeneralBackward& call) {
  const GeneralProblem& problem = call.problem;
  StridedTensor tensor;
  tensor.data = call.saved.weighted_value;
  tensor.row = problem.value_dim;
  tensor.head = tensor.row * problem.queries;
  tensor.batch = tensor.head * problem.heads;
  tensor.vectors = problem.value_dim * sizeof(Element) % 16 == 0;
  return tensor;
}

// Writes a warp's sums, times a factor a row, to its rows of a shared tile.
template <class Element, int kHeadDim, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void PutSums(const float (&sum)[kRowTiles][kColumnTiles][4],
                                        const float (&factor)[kRowTiles][2],
                                        const SharedTile<Element, kHeadDim>& tile, int row,
                                        int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Element* const target =
            tile.At(row + 16 * m + 8 * half + lane / 4, column + 8 * c + 2 * (lane % 4));
        const float first = factor[m][half] * sum[m][c][2 * half];
        const float second = factor[m][half] * sum[m][c][2 * half + 1];
        if constexpr (sizeof(Element) == 2) {
          *reinterpret_cast<uint32_t*>(target) = Mma<Element>::Pack(first, second);
        } else {
          *reinterpret_cast<float2*>(target) = make_float2(first, second);
        }
      }
    }
  }
}

// Writes an own tile to a tensor; with `keep_finite` only over elements that are NaN or infinite.
template <class Element, int kHeadDim>
__device__ __forceinline__ void StoreTile(const SharedTile<Element, kHeadDim>& tile,
                                          const StridedTensor& tensor, const TilePosition& at,
                                          bool keep_finite) {
  using Shape = BackwardShape<Element, kHeadDim>;
  constexpr int kVector = 16 / static_cast<int>(sizeof(Element));
  Element* const target =
      tensor.Row<Element>(at.batch, at.head, static_cast<int64_t>(at.origin) + at.first);
  const int rows = min(Shape::kOwnRows, at.rows - at.first), thread = threadIdx.x;
  if (tensor.vectors && at.columns % kVector == 0 && !keep_finite) {
    constexpr int kVectors = kHeadDim / kVector;
    const int column = thread % kVectors * kVector;
    if (column >= at.columns) return;
    for (int row = thread / kVectors; row < rows; row += Shape::kThreads / kVectors) {
      *reinterpret_cast<uint4*>(target + row * tensor.row + column) =
          *reinterpret_cast<const uint4*>(tile.At(row, column));
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < rows * kHeadDim; i += Shape::kThreads) {
      const int row = i / kHeadDim, column = i % kHeadDim;
      if (column >= at.columns) continue;
      Element* const element = target + row * tensor.row + column * tensor.column;
      if (!(keep_finite && IsFinite(static_cast<float>(*element))))
        *element = *tile.At(row, column);
    }
  }
}

// What a call may have beside queries, keys and values. A softcap, which needs the dot products
// once more, and the sums for other results would take the registers of one block of three.
enum class Extras {
  kNone,
  kCommon,  // slopes, query_scale and its gradient
  kAll,     // also a softcap and the gradients of alpha and slopes
};

// One compiled form of the backward.
//   kMode     kGeneral serves every alpha, also one a head.
//   kCareful  what a block runs again if a sum is not finite: NaN and infinities are cleared from
//             streamed rows and pairs of weight zero are left out. Only results that are not finite
//             are replaced. In fp16 possibly a third time, with score gradients scaled down, in
//             case they were too large for a fragment.
template <class ElementType, int kColumns, Alpha kAlphaMode, Extras kExtras, bool kIsCareful>
struct BackwardVariant {
  using Element = ElementType;
  static constexpr int kHeadDim = kColumns;
  static constexpr Alpha kMode = kAlphaMode;
  static constexpr bool kPlain = kExtras == Extras::kNone;
  static constexpr bool kAll = kExtras == Extras::kAll;
  static constexpr bool kCareful = kIsCareful;
  using Shape = BackwardShape<Element, kHeadDim>;
  // Sets the limit of registers: 168 or 255.
  static constexpr int kBlocksPerMultiprocessor = !kAll && Shape::kRowBytes <= 128 ? 3 : 2;
  using Shared = BackwardShared<Element, kHeadDim>;
  using Tile = SharedTile<Element, kHeadDim>;
  using Own = OwnOperand<Element, kHeadDim>;
  using Careful = BackwardVariant<Element, kHeadDim, Alpha::kGeneral, Extras::kAll, true>;
};

constexpr float kScaleDown = 1.0f / 4096.0f;

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_GENERAL_BACKWARD_TILES_CUH_
