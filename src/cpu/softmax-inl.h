// Flash softmax, for α = 1: scores of a few key blocks, exponentials with a running maximum, and a
// dense product with the values. It shares packing, tiles and masks with the candidate path, so
// that comparisons of the two compare algorithms.

#if defined(FLASH_ENTMAX_SRC_CPU_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_ENTMAX_SRC_CPU_SOFTMAX_INL_H_
#undef FLASH_ENTMAX_SRC_CPU_SOFTMAX_INL_H_
#else
#define FLASH_ENTMAX_SRC_CPU_SOFTMAX_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/attention_panel.h"
#include "cpu/scores-inl.h"
#include "cpu/tile-inl.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// exp(scores − max) in place; returns the sum. A row that has seen no key yet (max = −∞) gives 0,
// and one with NaN or +∞ gives NaN.
template <typename T>
T Exponentiate(T max, size_t n, T* HWY_RESTRICT scores) {
  const hn::ScalableTag<T> d;
  const auto shift = hn::Set(d, max == -Infinity<T>() ? T{0} : max);
  auto sum = hn::Zero(d);
  auto ordered = hn::FirstN(d, hn::Lanes(d));
  for (size_t i = 0; i < n; i += hn::Lanes(d)) {
    const auto x = hn::Sub(hn::LoadU(d, scores + i), shift);
    ordered = hn::And(ordered, hn::Eq(x, x));  // Exp() would turn NaN into 0.
    const auto e = hn::Exp(d, x);
    hn::StoreU(e, d, scores + i);
    sum = hn::Add(sum, e);
  }
  if (!hn::AllTrue(d, ordered)) return std::numeric_limits<T>::quiet_NaN();
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

template <typename T>
T MaxOf(const T* HWY_RESTRICT scores, size_t n, T max) {
  const hn::ScalableTag<T> d;
  auto result = hn::Set(d, max);
  for (size_t i = 0; i < n; i += hn::Lanes(d)) result = hn::Max(result, hn::LoadU(d, scores + i));
  return hn::GetLane(hn::MaxOfLanes(d, result));
}

template <typename T>
void Scale(T factor, size_t n, T* HWY_RESTRICT x) {
  const hn::ScalableTag<T> d;
  for (size_t i = 0; i < n; i += hn::Lanes(d)) {
    hn::StoreU(hn::Mul(hn::Set(d, factor), hn::LoadU(d, x + i)), d, x + i);
  }
}

// output (kTileRows × value_stride) += probability (kTileRows × keys) · values.
template <typename T>
void MultiplyValues(const T* probability, size_t keys, const PackedHead<T>& head, int64_t first_key,
                    T* output) {
  const auto stride = static_cast<size_t>(head.value_stride);
  const auto width = static_cast<size_t>(head.value_width);
  const T* values = head.values + first_key * head.value_stride;
  if (head.values_finite) {
    for (size_t e = 0; e < width; e += TileWidth<T>()) {
      Tile<T> tile;
      tile.Load(output + e, width);
      tile.MultiplyAdd(probability, keys, values + e, stride, keys);
      tile.Store(output + e, width);
    }
    return;
  }
  for (size_t r = 0; r < kTileRows; ++r) {
    for (size_t j = 0; j < keys; ++j) {
      const T p = probability[r * keys + j];
      if (p == T{0}) continue;
      for (size_t e = 0; e < width; ++e) output[r * width + e] += p * values[j * stride + e];
    }
  }
}

template <typename T>
void SoftmaxPanel(const PanelInput<T>& input, PanelMemory<T>* memory) {
  constexpr size_t kWidth = TileWidth<T>();
  constexpr size_t kStep = kBlocksPerSoftmaxStep * kWidth;
  const auto depth = static_cast<size_t>(input.head_size);
  const auto width = static_cast<size_t>(input.head.value_width);
  const int64_t groups = (input.queries + kTileRows - 1) / kTileRows;
  if (memory->scores.size() < kTileRows * kStep) memory->scores.resize(kTileRows * kStep);
  T* scores = memory->scores.data();
  std::vector<T> max(static_cast<size_t>(groups * kTileRows), -Infinity<T>());
  std::vector<double> sum(max.size(), 0.0);
  std::fill(memory->output.begin(), memory->output.end(), T{0});
  const BlockRange panel =
      VisibleBlocks(input, input.first_query, input.first_query + input.queries - 1);
  const auto keys_per_step = static_cast<int64_t>(kStep);
  // Steps are aligned, so that the values of a step lie inside the padded array.
  for (int64_t step = panel.first / kBlocksPerSoftmaxStep; step * kBlocksPerSoftmaxStep < panel.end;
       ++step) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first_row = input.first_query + group * kTileRows;
      const int64_t rows = std::min<int64_t>(kTileRows, input.queries - group * kTileRows);
      const int64_t last_row = first_row + rows - 1;
      if (step * keys_per_step >= input.mask.End(last_row)) continue;
      for (int64_t b = 0; b < kBlocksPerSoftmaxStep; ++b) {
        const int64_t block = step * kBlocksPerSoftmaxStep + b;
        const int64_t first_key = block * static_cast<int64_t>(kWidth);
        T* tile_scores = scores + b * static_cast<int64_t>(kWidth);
        if (block >= panel.end) {
          for (size_t r = 0; r < kTileRows; ++r)
            std::fill_n(tile_scores + r * kStep, kWidth, -Infinity<T>());
          continue;
        }
        Tile<T> tile;
        tile.Zero();
        tile.MultiplyAdd(input.query + group * kTileRows * input.query_stride,
                         static_cast<size_t>(input.query_stride),
                         input.head.keys + block * static_cast<int64_t>(kWidth * depth), kWidth,
                         depth);
        tile.Store(tile_scores, kStep);
        if (NeedsModification(input, first_row, last_row, first_key)) {
          for (int64_t r = 0; r < rows; ++r) {
            ModifyScores(input, first_row + r, first_key, tile_scores + r * keys_per_step);
          }
        }
      }
      T* output = memory->output.data() + static_cast<size_t>(group * kTileRows) * width;
      for (size_t r = 0; r < static_cast<size_t>(rows); ++r) {
        T& row_max = max[static_cast<size_t>(group * kTileRows) + r];
        double& row_sum = sum[static_cast<size_t>(group * kTileRows) + r];
        const T new_max = MaxOf(scores + r * kStep, kStep, row_max);
        if (new_max > row_max && row_sum != 0.0) {
          const T factor = std::exp(row_max - new_max);
          Scale(factor, width, output + r * width);
          row_sum *= static_cast<double>(factor);
        }
        row_max = new_max;
        row_sum += static_cast<double>(Exponentiate(row_max, kStep, scores + r * kStep));
      }
      MultiplyValues(scores, kStep, input.head, step * keys_per_step, output);
    }
  }
  for (size_t row = 0; row < static_cast<size_t>(input.queries); ++row) {
    const bool empty = sum[row] == 0.0;
    memory->threshold[row] = empty ? std::numeric_limits<double>::quiet_NaN()
                                   : static_cast<double>(max[row]) + std::log(sum[row]);
    Scale(empty ? T{0} : static_cast<T>(1.0 / sum[row]), width,
          memory->output.data() + row * width);
    // A NaN sum marks the row; its output may have escaped if every probability was lost to it.
    if (std::isnan(sum[row]))
      std::fill_n(memory->output.data() + row * width, width, std::numeric_limits<T>::quiet_NaN());
    if (memory->saved == nullptr) continue;
    if (empty) {
      memory->saved->AddEmpty();
    } else if (std::isnan(sum[row])) {
      memory->saved->AddNotANumber();
    } else {
      const int64_t query = input.first_query + static_cast<int64_t>(row);
      memory->saved->Add(static_cast<double>(max[row]), std::log(sum[row]), nullptr, nullptr,
                         input.mask.End(query) - input.mask.First(query));
    }
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#endif  // FLASH_ENTMAX_SRC_CPU_SOFTMAX_INL_H_
