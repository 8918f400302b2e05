// Everything that the kernels of attention's backward pass read and write, by head.

#ifndef FLASH_ENTMAX_SRC_CPU_BACKWARD_TENSORS_H_
#define FLASH_ENTMAX_SRC_CPU_BACKWARD_TENSORS_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "attention_resolved.h"
#include "cpu/aligned_array.h"
#include "cpu/attention_panel.h"
#include "cpu/backward_inputs.h"
#include "cpu/backward_kernels.h"
#include "cpu/backward_panels.h"
#include "cpu/saved_support.h"
#include "math/element.h"

namespace flash_entmax::cpu {

template <typename T>
class BackwardTensors {
 public:
  BackwardTensors(const AttentionProblem& problem, const ResolvedAttention& resolved,
                  const AttentionGradients& gradients, const SavedLayout& layout, void* saved,
                  int num_threads)
      : width(GetPanelShape<T>().keys_per_block),
        query(problem.query, width, num_threads),
        key(problem.key, width, num_threads),
        value(problem.value, width, num_threads),
        grad_output(gradients.output, width, num_threads),
        grad_key(gradients.key, problem.key, width),
        grad_value(gradients.value, problem.value, width),
        dense(static_cast<size_t>(layout.rows), 0),
        delta(static_cast<size_t>(layout.rows), 0.0),
        problem_(problem),
        resolved_(resolved),
        gradients_(gradients),
        saved_rows_(layout.Rows(saved)),
        threads_(num_threads) {
    const auto rows = static_cast<size_t>(layout.rows);
    if (gradients.alpha) grad_alpha.assign(rows, 0.0);
    if (gradients.alibi_slopes) grad_slope.assign(rows, 0.0);
    if (gradients.query_scale) grad_query_scale.assign(rows, 0.0);
    FillFactors(rows);
  }

  bool wants_query() const { return gradients_.query || gradients_.query_scale; }
  bool query_in_place() const {
    return gradients_.query && RowsInPlace<T>(gradients_.query.dtype, gradients_.query.shape[3],
                                              gradients_.query.strides[3], width);
  }

  // To be called when `dense` is filled: packs the keys, and for dense rows the values, of the
  // ranges where scores are made again, and makes the heads.
  void Prepare(const std::vector<BackwardPanel>& panels, const std::vector<KeyRange>& ranges) {
    Pack(panels, ranges);
    heads_.reserve(resolved_.sequences.size() * static_cast<size_t>(resolved_.heads));
    // Dense rows of the query's gradient are summed in memory of their own if not in place.
    const bool in_place = query_in_place();
    std::vector<int64_t> offset{0};
    for (size_t s = 0; s < resolved_.sequences.size(); ++s) {
      const Sequence& sequence = resolved_.sequences[s];
      for (int64_t head = 0; head < resolved_.heads; ++head) {
        const uint8_t* rows = dense.data() + FirstRowOf(resolved_, sequence, head);
        int64_t end = sequence.mask.query_length;
        while (end > 0 && rows[end - 1] == 0) --end;
        offset.push_back(offset.back() + end * query.width());
      }
    }
    if (!in_place && wants_query()) query_work_.reset(new T[static_cast<size_t>(offset.back())]);
    for (size_t s = 0; s < resolved_.sequences.size(); ++s) {
      for (int64_t head = 0; head < resolved_.heads; ++head) {
        heads_.push_back(MakeHead(static_cast<int64_t>(s), head, offset[heads_.size()]));
      }
    }
  }

  const BackwardHead<T>& Head(int64_t sequence, int64_t head) const {
    return heads_[static_cast<size_t>(sequence * resolved_.heads + head)];
  }

  bool IsVisible(const Sequence& sequence, int64_t key_index) const {
    const TensorView& mask = resolved_.key_mask;
    if (!mask) return true;
    const auto* visible = static_cast<const uint8_t*>(mask.data);
    return visible[sequence.batch * mask.strides[0] + key_index * mask.strides[1]] != 0;
  }

  // Rounds a finished row of the query's gradient into its tensor, if it was not made there.
  void WriteQueryRow(const Sequence& sequence, int64_t head, int64_t row, const T* values) const {
    const MutableTensorView& out = gradients_.query;
    if (!out || query_in_place()) return;
    const int64_t offset = sequence.batch * out.strides[0] + head * out.strides[1] +
                           (sequence.first_query + row) * out.strides[2];
    for (int64_t e = 0; e < out.shape[3]; ++e) {
      WriteElement(out, offset + e * out.strides[3], static_cast<double>(values[e]));
    }
  }

  const int64_t width;  // Multiple that rows are padded to, and keys of a packed block.
  const InputRows<T> query;
  const InputRows<T> key;
  const InputRows<T> value;
  const InputRows<T> grad_output;
  const OutputRows<T> grad_key;
  const OutputRows<T> grad_value;
  // One number a row; the gradients are empty if not wanted.
  std::vector<uint8_t> dense;
  std::vector<double> delta;
  std::vector<double> grad_alpha;
  std::vector<double> grad_slope;
  std::vector<double> grad_query_scale;

 private:
  struct PackedGroup {
    AlignedArray<T> keys;
    AlignedArray<T> values;
  };

  void FillFactors(size_t rows) {
    factor_.assign(rows, resolved_.scale);
    if (!resolved_.query_scale) return;
    const TensorView& scale = resolved_.query_scale;
    size_t row = 0;
    for (int64_t b = 0; b < resolved_.batch; ++b) {
      for (int64_t h = 0; h < resolved_.heads; ++h) {
        for (int64_t i = 0; i < resolved_.query_length; ++i, ++row) {
          factor_[row] *= ReadElement(
              scale, b * scale.strides[0] + h * scale.strides[1] + i * scale.strides[2]);
        }
      }
    }
  }

  void Pack(const std::vector<BackwardPanel>& panels, const std::vector<KeyRange>& ranges) {
    packed_.resize(ranges.size());
    std::vector<uint8_t> any_dense(ranges.size(), 0);
    for (const BackwardPanel& panel : panels) {
      if (panel.dense) any_dense[static_cast<size_t>(panel.group)] = 1;
    }
    struct Block {
      size_t group;
      int64_t first;
    };
    std::vector<Block> blocks;
    for (size_t group = 0; group < ranges.size(); ++group) {
      const KeyRange& range = ranges[group];
      if (range.first >= range.end) continue;
      // As large as the last key needs; what lies before the first is never touched.
      const auto keys = static_cast<size_t>(PaddedWidth(range.end, width));
      packed_[group].keys = MakeAligned<T>(keys * static_cast<size_t>(resolved_.head_size));
      if (any_dense[group] != 0) {
        packed_[group].values = MakeAligned<T>(keys * static_cast<size_t>(resolved_.value_size));
      }
      for (int64_t first = range.first / width * width; first < range.end; first += width) {
        blocks.push_back({group, first});
      }
    }
    if (resolved_.key_mask && !blocks.empty()) PackKeyMasks();
    ParallelFor(static_cast<int64_t>(blocks.size()), 4, threads_,
                [&](int64_t begin, int64_t end, int) {
                  for (int64_t i = begin; i < end; ++i) {
                    const Block& block = blocks[static_cast<size_t>(i)];
                    PackBlock(block.group, block.first);
                  }
                });
  }

  void PackBlock(size_t group, int64_t first) const {
    const auto index = static_cast<int64_t>(group);
    const Sequence& sequence = resolved_.sequences[group / static_cast<size_t>(resolved_.kv_heads)];
    const int64_t kv_head = index % resolved_.kv_heads;
    const int64_t keys = sequence.mask.key_length;
    PackTransposed(key.Get(sequence.batch, kv_head, sequence.first_key), first, keys,
                   resolved_.head_size, width,
                   packed_[group].keys.get() + first * resolved_.head_size);
    if (!packed_[group].values) return;
    PackTransposed(value.Get(sequence.batch, kv_head, sequence.first_key), first, keys,
                   resolved_.value_size, width,
                   packed_[group].values.get() + first * resolved_.value_size);
  }

  void PackKeyMasks() {
    key_bias_.resize(resolved_.sequences.size());
    for (size_t s = 0; s < key_bias_.size(); ++s) {
      const Sequence& sequence = resolved_.sequences[s];
      key_bias_[s].assign(static_cast<size_t>(PaddedWidth(sequence.mask.key_length, width)),
                          -std::numeric_limits<T>::infinity());
      for (int64_t j = 0; j < sequence.mask.key_length; ++j) {
        if (IsVisible(sequence, j)) key_bias_[s][static_cast<size_t>(j)] = T{0};
      }
    }
  }

  BackwardHead<T> MakeHead(int64_t s, int64_t head, int64_t work_offset) {
    const Sequence& sequence = resolved_.sequences[static_cast<size_t>(s)];
    const int64_t kv_head = head / (resolved_.heads / resolved_.kv_heads);
    const PackedGroup& packed = packed_[static_cast<size_t>(GroupOf(resolved_, s, head))];
    const int64_t row = FirstRowOf(resolved_, sequence, head);
    const auto numbers = [row](std::vector<double>& of_rows) {
      return of_rows.empty() ? nullptr : of_rows.data() + row;
    };
    BackwardHead<T> result;
    result.alpha = resolved_.alpha[static_cast<size_t>(head)];
    result.scores.head.keys = packed.keys.get();
    if (!key_bias_.empty()) result.scores.head.key_bias = key_bias_[static_cast<size_t>(s)].data();
    result.scores.head_size = resolved_.head_size;
    result.scores.mask = sequence.mask;
    result.scores.curve = Curve::Entmax(result.alpha);
    ScoreModifiers<T>& modifiers = result.scores.modifiers;
    modifiers.softcap = static_cast<T>(problem_.softcap);
    modifiers.slope = static_cast<T>(resolved_.slope[static_cast<size_t>(head)]);
    if (resolved_.bias) {
      const TensorView& bias = resolved_.bias;
      modifiers.bias = bias;
      modifiers.bias.data =
          static_cast<const char*>(bias.data) +
          (sequence.batch * bias.strides[0] + head * bias.strides[1]) * SizeOf(bias.dtype);
      modifiers.bias_query_stride = bias.strides[2];
      modifiers.bias_key_stride = bias.strides[3];
    }
    result.packed_values = packed.values.get();
    result.scale = resolved_.scale;
    result.query = query.Get(sequence.batch, head, sequence.first_query);
    result.key = key.Get(sequence.batch, kv_head, sequence.first_key);
    result.value = value.Get(sequence.batch, kv_head, sequence.first_key);
    result.grad_output = grad_output.Get(sequence.batch, head, sequence.first_query);
    result.value_size = resolved_.value_size;
    result.query_width = query.width();
    result.value_width = value.width();
    result.factor = factor_.data() + row;
    result.saved = saved_rows_ + row;
    result.dense = dense.data() + row;
    result.delta = delta.data() + row;
    if (query_in_place()) {
      const MutableTensorView& out = gradients_.query;
      result.grad_query = {static_cast<T*>(out.data) + sequence.batch * out.strides[0] +
                               head * out.strides[1] + sequence.first_query * out.strides[2],
                           out.strides[2]};
    } else if (query_work_) {
      result.grad_query = {query_work_.get() + work_offset, query.width()};
    }
    result.grad_key = grad_key.Get(sequence.batch, kv_head, sequence.first_key);
    result.grad_value = grad_value.Get(sequence.batch, kv_head, sequence.first_key);
    result.grad_alpha = numbers(grad_alpha);
    result.grad_slope = numbers(grad_slope);
    result.grad_query_scale = numbers(grad_query_scale);
    return result;
  }

  const AttentionProblem& problem_;
  const ResolvedAttention& resolved_;
  const AttentionGradients& gradients_;
  const SavedRow* saved_rows_;
  int threads_;
  std::vector<double> factor_;
  std::vector<PackedGroup> packed_;
  std::vector<std::vector<T>> key_bias_;  // Of each sequence; empty without a key mask.
  std::unique_ptr<T[]> query_work_;
  std::vector<BackwardHead<T>> heads_;  // [sequence][head]
};

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_BACKWARD_TENSORS_H_
