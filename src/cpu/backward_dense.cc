// The dense way of attention's backward pass: for α = 1 and for rows whose support is so large that
// gathering it would cost more than five products.
//
// A block is 96 query rows and 96 keys. Its scores are made again by the forward pass's tile, p and
// u = p^(2−α) follow from the saved level of each row, and then, with register tiles throughout,
//     dP = dO·Vᵀ,  dS = u·(dP − δ),  dV += pᵀ·dO,  dK += dSᵀ·Q,  dQ += dS·K.
// A block whose probabilities are all zero ends after its scores. δ is known before: from the mean
// of the values that the forward pass kept, or from one more pass over scores and dP (DenseSums).
//
// Products with one side transposed read that side by broadcasts, which do not care for the order,
// so nothing is transposed but keys and values, once for each head.
//
// Memory traffic a block: keys, values and dK, dV of 96 rows, while queries, dO and the block's p
// and dS stay in the second-level cache.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/backward_kernels.h"
#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward_dense.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h, which includes this file once for every instruction set.
#include "cpu/backward-inl.h"
#include "cpu/scores-inl.h"
#include "cpu/threshold-inl.h"
#include "cpu/tile-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

constexpr int64_t kBlockSize = kDenseBlock;
static_assert(kDenseBlock % kTileRows == 0);

// tile += leftᵀ·right: element (r, k) of the left operand is at left[k·stride + r].
template <typename T>
HWY_INLINE void MultiplyAddTransposed(const T* HWY_RESTRICT left, size_t left_stride,
                                      const T* HWY_RESTRICT right, size_t right_stride,
                                      size_t depth, Tile<T>* tile) {
  const hn::ScalableTag<T> d;
  const size_t lanes = hn::Lanes(d);
  for (size_t k = 0; k < depth; ++k) {
    hn::Vec<decltype(d)> b[kTileVectors];
    HWY_UNROLL(kTileVectors)
    for (int v = 0; v < kTileVectors; ++v)
      b[v] = hn::LoadU(d, right + k * right_stride + v * lanes);
    HWY_UNROLL(kTileRows)
    for (int r = 0; r < kTileRows; ++r) {
      const auto a = hn::Set(d, left[k * left_stride + static_cast<size_t>(r)]);
      HWY_UNROLL(kTileVectors)
      for (int v = 0; v < kTileVectors; ++v) {
        tile->row[r][v] = hn::MulAdd(a, b[v], tile->row[r][v]);
      }
    }
  }
}

// rows[first … first + kTileRows) += product, where `multiply` adds the product of the columns from
// `e` on to a tile. Rows from `end` on do not exist.
template <typename T, class Multiply>
HWY_INLINE void AddToRows(const RowsView<T>& rows, int64_t first, int64_t end, int64_t width,
                          const Multiply& multiply) {
  constexpr auto kWidth = static_cast<int64_t>(TileWidth<T>());
  const int64_t real = std::min<int64_t>(kTileRows, end - first);
  for (int64_t e = 0; e < width; e += kWidth) {
    T* out = rows.Row(first) + e;
    Tile<T> tile;
    if (real == kTileRows) {
      tile.Load(out, static_cast<size_t>(rows.stride));
      multiply(e, &tile);
      tile.Store(out, static_cast<size_t>(rows.stride));
      continue;
    }
    HWY_ALIGN T buffer[kTileRows * TileWidth<T>()];
    tile.Zero();
    multiply(e, &tile);
    tile.Store(buffer, TileWidth<T>());
    for (int64_t r = 0; r < real; ++r) {
      for (int64_t i = 0; i < kWidth; ++i) out[r * rows.stride + i] += buffer[r * kWidth + i];
    }
  }
}

// The rows of a block in the form that its elements need.
template <typename T>
struct DenseRow {
  bool active = false;
  T max = T{0};
  T shift = T{0};
  T top = T{0};  // 1 − shift
  T slope = T{0};
  T factor = T{0};    // Of p.
  T u_factor = T{0};  // Of u.
  T delta = T{0};
};

template <typename T>
struct DenseRowBlock {
  int64_t first = 0;
  int64_t rows = 0;
  double exponent = 1.0;
  DenseRow<T> row[kDenseBlock];
  double sum_u[kDenseBlock];
  double sum_ug[kDenseBlock];
};

// Reads rows [first, end) from the first dense one to the last; false if there is none.
template <typename T>
bool PrepareRows(const BackwardHead<T>& head, int64_t first, int64_t end, bool with_delta,
                 DenseRowBlock<T>* block, BackwardMemory<T>* memory) {
  // Only keys that dense rows see are packed.
  while (first < end && head.dense[first] == 0) ++first;
  while (first < end && head.dense[end - 1] == 0) --end;
  if (first == end) return false;
  const Curve& curve = head.scores.curve;
  block->first = first;
  block->rows = end - first;
  block->exponent = curve.exponent;
  for (int64_t r = 0; r < kBlockSize; ++r) {
    DenseRow<T>& row = block->row[r];
    row.active = r < block->rows && head.dense[first + r] != 0;
    if (!row.active) continue;
    const SavedRow& saved = head.saved[first + r];
    const Level level = LevelOf(curve, saved.level);
    row.max = static_cast<T>(saved.max);
    row.shift = static_cast<T>(level.shift);
    row.top = static_cast<T>(1.0 - level.shift);
    row.slope = static_cast<T>(level.slope);
    row.factor = static_cast<T>(level.factor);
    row.u_factor =
        static_cast<T>(level.factor == 1.0 ? 1.0 : std::pow(level.factor, 2.0 - head.alpha));
    if (with_delta) row.delta = static_cast<T>(head.delta[first + r]);
  }
  ScaleQueries(head, first, block->rows, kBlockSize, head.query_width, &memory->query);
  memory->grad_output.resize(static_cast<size_t>(kBlockSize * head.value_width));
  for (int64_t r = 0; r < kBlockSize; ++r) {
    T* target = memory->grad_output.data() + r * head.value_width;
    if (r < block->rows) {
      std::copy_n(head.grad_output.Row(first + r), head.value_width, target);
    } else {
      std::fill_n(target, head.value_width, T{0});
    }
  }
  constexpr auto kElements = static_cast<size_t>(kBlockSize * kBlockSize);
  if (memory->probability.size() < kElements) memory->probability.resize(kElements);
  if (memory->weights.size() < kElements) memory->weights.resize(kElements);
  if (memory->raw.size() < kElements) memory->raw.resize(kElements);
  return true;
}

// Keys [first, end) of a block that any row of a range sees, relative to the block.
struct Range {
  int64_t first = 0;
  int64_t end = 0;
};

inline Range KeysSeen(const PositionMask& mask, int64_t first_row, int64_t last_row,
                      int64_t first_key) {
  const int64_t first = std::max<int64_t>(mask.First(first_row) - first_key, 0);
  const int64_t end = std::min<int64_t>(mask.End(last_row) - first_key, kBlockSize);
  return {first, std::max(first, end)};
}

// Rows of the block that see any key of [key, last_key]; First() and End() do not fall.
inline Range RowsSeeing(const PositionMask& mask, int64_t first_row, int64_t rows, int64_t key,
                        int64_t last_key) {
  Range range{0, rows};
  while (range.first < rows && mask.End(first_row + range.first) <= key) ++range.first;
  while (range.end > range.first && mask.First(first_row + range.end - 1) > last_key) --range.end;
  return range;
}

template <typename T>
void FillTile(T* target) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    std::fill_n(target + r * kBlockSize, TileWidth<T>(), T{0});
  }
}

// p and u of one tile from its scores; true if any of them is positive.
template <CurveKind kKind, bool kFromBase, typename T>
bool TileProbabilities(const DenseRowBlock<T>& block, int64_t first_row, T* HWY_RESTRICT p,
                       T* HWY_RESTRICT u) {
  const hn::ScalableTag<T> d;
  const size_t lanes = hn::Lanes(d);
  const PowerWay way = PowerWay::Of<T>(block.exponent);
  auto any = hn::Zero(d);
  for (int64_t r = 0; r < kTileRows; ++r, p += kBlockSize, u += kBlockSize) {
    const DenseRow<T>& row = block.row[first_row + r];
    if (!row.active) {
      std::fill_n(p, TileWidth<T>(), T{0});
      std::fill_n(u, TileWidth<T>(), T{0});
      continue;
    }
    const VectorLevel<kKind, hn::ScalableTag<T>> at = {hn::Set(d, row.slope), hn::Set(d, row.shift),
                                                       hn::Set(d, row.top), block.exponent, way};
    for (size_t i = 0; i < TileWidth<T>(); i += lanes) {
      const auto distance = hn::Sub(hn::Set(d, row.max), hn::LoadU(d, p + i));
      hn::Vec<decltype(d)> vp;
      hn::Vec<decltype(d)> vu;
      at.template Evaluate<kFromBase>(d, distance, &vp, &vu);
      if constexpr (kKind == CurveKind::kGeneral) {
        vp = hn::Mul(vp, hn::Set(d, row.factor));
        vu = hn::Mul(vu, hn::Set(d, row.u_factor));
        any = hn::Max(any, vp);
      }
      hn::StoreU(vp, d, p + i);
      hn::StoreU(vu, d, u + i);
      any = hn::Max(any, vu);  // The smaller of both may be 0 by underflow.
    }
  }
  return hn::GetLane(hn::MaxOfLanes(d, any)) > T{0};
}

template <CurveKind kKind, typename T>
bool TileProbabilities(const DenseRowBlock<T>& block, int64_t first_row, T* p, T* u) {
  if constexpr (kKind == CurveKind::kGeneral) {
    if (!PowerWay::Of<T>(block.exponent).from_base()) {
      return TileProbabilities<kKind, false>(block, first_row, p, u);
    }
  }
  return TileProbabilities<kKind, true>(block, first_row, p, u);
}

// Scores, p, u and dS of one block, left in memory->probability and memory->weights; with kSums
// only Σ u and Σ u·dP. False if every probability is zero.
template <CurveKind kKind, bool kSums, typename T>
bool BlockWeights(const BackwardHead<T>& head, int64_t first_key, DenseRowBlock<T>* block,
                  BackwardMemory<T>* memory) {
  constexpr size_t kWidth = TileWidth<T>();
  const hn::ScalableTag<T> d;
  const size_t lanes = hn::Lanes(d);
  const PanelInput<T>& input = head.scores;
  const auto depth = static_cast<size_t>(input.head_size);
  const auto value_size = static_cast<size_t>(head.value_size);
  const bool capped = input.modifiers.softcap != T{0};
  bool any = false;
  HWY_ALIGN T grad[kTileRows * kWidth];
  for (int64_t group = 0; group < block->rows; group += kTileRows) {
    const int64_t first_row = block->first + group;
    const int64_t rows = std::min<int64_t>(kTileRows, block->rows - group);
    const Range keys = KeysSeen(input.mask, first_row, first_row + rows - 1, first_key);
    for (int64_t k = 0; k < kBlockSize; k += static_cast<int64_t>(kWidth)) {
      T* p = memory->probability.data() + group * kBlockSize + k;
      T* u = memory->weights.data() + group * kBlockSize + k;
      if (k >= keys.end || k + static_cast<int64_t>(kWidth) <= keys.first) {
        if (!kSums) {
          FillTile(p);
          FillTile(u);
        }
        continue;
      }
      const int64_t key = first_key + k;
      Tile<T> tile;
      tile.Zero();
      tile.MultiplyAdd(memory->query.data() + group * head.query_width,
                       static_cast<size_t>(head.query_width),
                       input.head.keys + key * input.head_size, kWidth, depth);
      tile.Store(p, kBlockSize);
      T* raw = memory->raw.data() + group * kBlockSize + k;
      if (capped) tile.Store(raw, kBlockSize);
      if (NeedsModification(input, first_row, first_row + rows - 1, key)) {
        for (int64_t r = 0; r < rows; ++r) {
          ModifyScores(input, first_row + r, key, p + r * kBlockSize);
        }
      }
      if (!TileProbabilities<kKind>(*block, group, p, u)) continue;  // u is zero as well.
      any = true;
      tile.Zero();
      tile.MultiplyAdd(memory->grad_output.data() + group * head.value_width,
                       static_cast<size_t>(head.value_width),
                       head.packed_values + key * head.value_size, kWidth, value_size);
      tile.Store(grad, kWidth);
      for (int64_t r = 0; r < rows; ++r) {
        const DenseRow<T>& row = block->row[group + r];
        if (!row.active) continue;
        const T* HWY_RESTRICT dp = grad + r * static_cast<int64_t>(kWidth);
        T* HWY_RESTRICT w = u + r * kBlockSize;
        if constexpr (kSums) {
          auto sum_u = hn::Zero(d);
          auto sum_ug = hn::Zero(d);
          for (size_t i = 0; i < kWidth; i += lanes) {
            const auto weight = hn::LoadU(d, w + i);
            sum_u = hn::Add(sum_u, weight);
            sum_ug = hn::MulAdd(weight, hn::LoadU(d, dp + i), sum_ug);
          }
          block->sum_u[group + r] += Total(d, sum_u);
          block->sum_ug[group + r] += Total(d, sum_ug);
        } else {
          const auto delta = hn::Set(d, row.delta);
          if (head.grad_alpha != nullptr) {
            const DoubleTag d64;
            auto sum = hn::Zero(d64);
            for (size_t i = 0; i < kWidth; i += hn::Lanes(d64)) {
              const auto partial =
                  AlphaPartial(d64, LoadScores(d64, p + r * kBlockSize + static_cast<int64_t>(i)),
                               head.alpha - 1.0);
              sum = hn::MulAdd(
                  partial,
                  hn::Sub(LoadScores(d64, dp + i), hn::Set(d64, head.delta[first_row + r])), sum);
            }
            head.grad_alpha[first_row + r] += Total(d64, sum);
          }
          for (size_t i = 0; i < kWidth; i += lanes) {
            const auto centred = hn::Sub(hn::LoadU(d, dp + i), delta);
            hn::StoreU(hn::Mul(hn::LoadU(d, w + i), centred), d, w + i);
          }
          if (head.grad_bias != nullptr) {
            T* target = head.grad_bias + (first_row + r) * head.grad_bias_row_stride +
                        key * head.grad_bias_key_stride;
            const int64_t real = std::min<int64_t>(kWidth, input.mask.key_length - key);
            for (int64_t i = 0; i < real; ++i) target[i * head.grad_bias_key_stride] = w[i];
          }
          if (head.grad_slope != nullptr) {
            const int64_t position = input.mask.Position(first_row + r) - key;
            double sum = 0.0;
            for (int64_t i = 0; i < static_cast<int64_t>(kWidth); ++i) {
              sum -= static_cast<double>(w[i]) * static_cast<double>(std::abs(position - i));
            }
            head.grad_slope[first_row + r] += sum;
          }
          if (capped) {
            const auto cap = hn::Set(d, input.modifiers.softcap);
            for (size_t i = 0; i < kWidth; i += lanes) {
              const auto product = hn::LoadU(d, raw + r * kBlockSize + static_cast<int64_t>(i));
              const auto t = hn::Tanh(d, hn::Div(product, cap));
              const auto slope = hn::NegMulAdd(t, t, hn::Set(d, T{1}));
              hn::StoreU(hn::Mul(slope, hn::LoadU(d, w + i)), d, w + i);
            }
          }
        }
      }
    }
  }
  return any;
}

// The three products that end in gradients.
template <typename T>
void BlockProducts(const BackwardHead<T>& head, int64_t first_key, int64_t end_key,
                   const DenseRowBlock<T>& block, BackwardMemory<T>* memory) {
  const PositionMask& mask = head.scores.mask;
  const T* p = memory->probability.data();
  const T* w = memory->weights.data();
  const auto value_width = static_cast<size_t>(head.value_width);
  const auto query_width = static_cast<size_t>(head.query_width);
  for (int64_t key = first_key; key < end_key; key += kTileRows) {
    const Range rows = RowsSeeing(mask, block.first, block.rows, key,
                                  std::min<int64_t>(key + kTileRows, end_key) - 1);
    if (rows.first >= rows.end) continue;
    const auto depth = static_cast<size_t>(rows.end - rows.first);
    const int64_t left = rows.first * kBlockSize + key - first_key;
    if (head.grad_value.data != nullptr) {
      const T* right = memory->grad_output.data() + rows.first * head.value_width;
      AddToRows(head.grad_value, key, end_key, head.value_width,
                [&](int64_t e, Tile<T>* tile) HWY_ATTR {
                  MultiplyAddTransposed(p + left, kBlockSize, right + e, value_width, depth, tile);
                });
    }
    if (head.grad_key.data != nullptr) {
      const T* right = memory->query.data() + rows.first * head.query_width;
      AddToRows(head.grad_key, key, end_key, head.query_width,
                [&](int64_t e, Tile<T>* tile) HWY_ATTR {
                  MultiplyAddTransposed(w + left, kBlockSize, right + e, query_width, depth, tile);
                });
    }
  }
  if (head.grad_query.data == nullptr) return;
  for (int64_t group = 0; group < block.rows; group += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, block.rows - group);
    Range keys = KeysSeen(mask, block.first + group, block.first + group + rows - 1, first_key);
    keys.end = std::min(keys.end, end_key - first_key);
    if (keys.first >= keys.end) continue;
    const T* right = head.key.Row(first_key + keys.first);
    AddToRows(head.grad_query, block.first + group, block.first + block.rows, head.query_width,
              [&](int64_t e, Tile<T>* tile) HWY_ATTR {
                tile->MultiplyAdd(w + group * kBlockSize + keys.first, kBlockSize, right + e,
                                  static_cast<size_t>(head.key.stride),
                                  static_cast<size_t>(keys.end - keys.first));
              });
  }
}

template <CurveKind kKind, typename T>
void SumsOfKind(const BackwardHead<T>& head, int64_t first, int64_t end, double* sum_u,
                double* sum_ug, BackwardMemory<T>* memory) {
  DenseRowBlock<T> block;
  if (!PrepareRows(head, first, end, /*with_delta=*/false, &block, memory)) return;
  std::fill_n(block.sum_u, kBlockSize, 0.0);
  std::fill_n(block.sum_ug, kBlockSize, 0.0);
  const Range keys{head.scores.mask.First(block.first),
                   head.scores.mask.End(block.first + block.rows - 1)};
  for (int64_t key = keys.first / kBlockSize * kBlockSize; key < keys.end; key += kBlockSize) {
    BlockWeights<kKind, true>(head, key, &block, memory);
  }
  std::copy_n(block.sum_u, block.rows, sum_u + block.first - first);
  std::copy_n(block.sum_ug, block.rows, sum_ug + block.first - first);
}

template <CurveKind kKind, typename T>
void GradientsOfKind(const BackwardHead<T>& head, int64_t first_row, int64_t end_row,
                     int64_t first_key, int64_t end_key, BackwardMemory<T>* memory) {
  DenseRowBlock<T> block;
  const PositionMask& mask = head.scores.mask;
  for (int64_t row = first_row; row < end_row; row += kBlockSize) {
    const int64_t end = std::min(row + kBlockSize, end_row);
    if (std::min(mask.End(end - 1), end_key) <= std::max(mask.First(row), first_key)) continue;
    if (!PrepareRows(head, row, end, /*with_delta=*/true, &block, memory)) continue;
    const int64_t seen_first = std::max(mask.First(block.first), first_key);
    const int64_t seen_end = std::min(mask.End(block.first + block.rows - 1), end_key);
    for (int64_t key = seen_first / kBlockSize * kBlockSize; key < seen_end; key += kBlockSize) {
      if (BlockWeights<kKind, false>(head, key, &block, memory)) {
        BlockProducts(head, key, std::min(key + kBlockSize, mask.key_length), block, memory);
      }
    }
  }
}

template <typename T>
void DenseSumsImpl(const BackwardHead<T>& head, int64_t first, int64_t end, double* sum_u,
                   double* sum_ug, BackwardMemory<T>* memory) {
  switch (head.scores.curve.kind) {
    case CurveKind::kSoftmax:
      return SumsOfKind<CurveKind::kSoftmax>(head, first, end, sum_u, sum_ug, memory);
    case CurveKind::kSquare:
      return SumsOfKind<CurveKind::kSquare>(head, first, end, sum_u, sum_ug, memory);
    case CurveKind::kSparsemax:
      return SumsOfKind<CurveKind::kSparsemax>(head, first, end, sum_u, sum_ug, memory);
    case CurveKind::kGeneral:
      return SumsOfKind<CurveKind::kGeneral>(head, first, end, sum_u, sum_ug, memory);
  }
}

template <typename T>
void DenseGradientsImpl(const BackwardHead<T>& head, int64_t first_row, int64_t end_row,
                        int64_t first_key, int64_t end_key, BackwardMemory<T>* memory) {
  switch (head.scores.curve.kind) {
    case CurveKind::kSoftmax:
      return GradientsOfKind<CurveKind::kSoftmax>(head, first_row, end_row, first_key, end_key,
                                                  memory);
    case CurveKind::kSquare:
      return GradientsOfKind<CurveKind::kSquare>(head, first_row, end_row, first_key, end_key,
                                                 memory);
    case CurveKind::kSparsemax:
      return GradientsOfKind<CurveKind::kSparsemax>(head, first_row, end_row, first_key, end_key,
                                                    memory);
    case CurveKind::kGeneral:
      return GradientsOfKind<CurveKind::kGeneral>(head, first_row, end_row, first_key, end_key,
                                                  memory);
  }
}

// Highway's tables hold plain functions.
void SumsFloat(const BackwardHead<float>& head, int64_t first, int64_t end, double* sum_u,
               double* sum_ug, BackwardMemory<float>* memory) {
  DenseSumsImpl(head, first, end, sum_u, sum_ug, memory);
}
void SumsDouble(const BackwardHead<double>& head, int64_t first, int64_t end, double* sum_u,
                double* sum_ug, BackwardMemory<double>* memory) {
  DenseSumsImpl(head, first, end, sum_u, sum_ug, memory);
}
void GradientsFloat(const BackwardHead<float>& head, int64_t first_row, int64_t end_row,
                    int64_t first_key, int64_t end_key, BackwardMemory<float>* memory) {
  DenseGradientsImpl(head, first_row, end_row, first_key, end_key, memory);
}
void GradientsDouble(const BackwardHead<double>& head, int64_t first_row, int64_t end_row,
                     int64_t first_key, int64_t end_key, BackwardMemory<double>* memory) {
  DenseGradientsImpl(head, first_row, end_row, first_key, end_key, memory);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_entmax::cpu {

HWY_EXPORT(SumsFloat);
HWY_EXPORT(SumsDouble);
HWY_EXPORT(GradientsFloat);
HWY_EXPORT(GradientsDouble);

template <>
void DenseSums<float>(const BackwardHead<float>& head, int64_t first, int64_t end, double* sum_u,
                      double* sum_ug, BackwardMemory<float>* memory) {
  HWY_DYNAMIC_DISPATCH(SumsFloat)(head, first, end, sum_u, sum_ug, memory);
}
template <>
void DenseSums<double>(const BackwardHead<double>& head, int64_t first, int64_t end, double* sum_u,
                       double* sum_ug, BackwardMemory<double>* memory) {
  HWY_DYNAMIC_DISPATCH(SumsDouble)(head, first, end, sum_u, sum_ug, memory);
}
template <>
void DenseGradients<float>(const BackwardHead<float>& head, int64_t first_row, int64_t end_row,
                           int64_t first_key, int64_t end_key, BackwardMemory<float>* memory) {
  HWY_DYNAMIC_DISPATCH(GradientsFloat)(head, first_row, end_row, first_key, end_key, memory);
}
template <>
void DenseGradients<double>(const BackwardHead<double>& head, int64_t first_row, int64_t end_row,
                            int64_t first_key, int64_t end_key, BackwardMemory<double>* memory) {
  HWY_DYNAMIC_DISPATCH(GradientsDouble)(head, first_row, end_row, first_key, end_key, memory);
}

}  // namespace flash_entmax::cpu
#endif  // HWY_ONCE
