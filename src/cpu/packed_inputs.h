// Keys and values of an attention call in the layout that the CPU engine reads.

#ifndef FLASH_ENTMAX_SRC_CPU_PACKED_INPUTS_H_
#define FLASH_ENTMAX_SRC_CPU_PACKED_INPUTS_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "attention_resolved.h"
#include "cpu/aligned_array.h"
#include "cpu/attention_panel.h"
#include "cpu/parallel.h"
#include "flash_entmax/tensor.h"
#include "math/element.h"

namespace flash_entmax::cpu {

inline int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Keys and values of every (sequence, KV head), packed.
template <typename T>
class PackedInputs {
 public:
  // True if rows of `value` can be read where they are by the candidate path.
  static bool ValuesInPlace(const TensorView& value, const PanelShape& shape, bool softmax) {
    constexpr DType kDType = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;
    return !softmax && value.dtype == kDType && value.strides[3] == 1 &&
           value.shape[3] % shape.value_multiple == 0;
  }

  static int64_t KeyElements(const ResolvedAttention& resolved, const Sequence& sequence,
                             const PanelShape& shape) {
    return RoundUp(sequence.mask.key_length, shape.keys_per_block) * resolved.head_size;
  }

  static int64_t ValueElements(const ResolvedAttention& resolved, const Sequence& sequence,
                               const PanelShape& shape) {
    const int64_t step = int64_t{shape.keys_per_block} * kBlocksPerSoftmaxStep;
    return RoundUp(sequence.mask.key_length, step) *
           RoundUp(resolved.value_size, shape.value_multiple);
  }

  PackedInputs(const AttentionProblem& problem, const ResolvedAttention& resolved,
               const PanelShape& shape, bool softmax, int num_threads)
      : problem_(problem), resolved_(resolved), shape_(shape) {
    const bool in_place = ValuesInPlace(problem.value, shape, softmax);
    const int64_t sequences = static_cast<int64_t>(resolved.sequences.size());
    heads_.resize(static_cast<size_t>(sequences * resolved.kv_heads));
    key_bias_.resize(resolved.key_mask ? static_cast<size_t>(sequences) : 0);
    for (int64_t s = 0; s < sequences; ++s) {
      if (resolved.key_mask) PackKeyMask(s);
      for (int64_t kv_head = 0; kv_head < resolved.kv_heads; ++kv_head) {
        Allocate(s, kv_head, in_place);
      }
    }
    // All blocks of all heads, a few at a time.
    std::vector<Block> blocks;
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t keys = resolved.sequences[static_cast<size_t>(s)].mask.key_length;
      const int64_t step = int64_t{shape.keys_per_block} * kBlocksPerSoftmaxStep;
      for (int64_t kv_head = 0; kv_head < resolved.kv_heads; ++kv_head) {
        for (int64_t first = 0; first < keys; first += step) blocks.push_back({s, kv_head, first});
      }
    }
    ParallelFor(static_cast<int64_t>(blocks.size()), 1, num_threads,
                [&](int64_t first, int64_t last, int) {
                  for (int64_t i = first; i < last; ++i) {
                    PackStep(blocks[static_cast<size_t>(i)], in_place);
                  }
                });
  }

  PackedHead<T> Get(int64_t sequence, int64_t kv_head) const {
    const Storage& storage = heads_[Index(sequence, kv_head)];
    PackedHead<T> head;
    head.keys = storage.keys.get();
    head.values = storage.values_in_place ? storage.values_in_place : storage.values.get();
    head.value_stride = storage.value_stride;
    head.value_width = RoundUp(resolved_.value_size, shape_.value_multiple);
    head.values_finite = storage.values_finite->load();
    if (!key_bias_.empty()) head.key_bias = key_bias_[static_cast<size_t>(sequence)].data();
    return head;
  }

 private:
  struct Block {
    int64_t sequence;
    int64_t kv_head;
    int64_t first_key;
  };
  struct Storage {
    AlignedArray<T> keys;
    AlignedArray<T> values;
    const T* values_in_place = nullptr;
    int64_t value_stride = 0;
    std::unique_ptr<std::atomic<bool>> values_finite = std::make_unique<std::atomic<bool>>(true);
  };

  size_t Index(int64_t sequence, int64_t kv_head) const {
    return static_cast<size_t>(sequence * resolved_.kv_heads + kv_head);
  }

  int64_t Offset(const TensorView& tensor, const Sequence& sequence, int64_t kv_head) const {
    return sequence.batch * tensor.strides[0] + kv_head * tensor.strides[1] +
           sequence.first_key * tensor.strides[2];
  }

  void PackKeyMask(int64_t s) {
    const Sequence& sequence = resolved_.sequences[static_cast<size_t>(s)];
    const TensorView& mask = resolved_.key_mask;
    const auto* visible = static_cast<const uint8_t*>(mask.data) + sequence.batch * mask.strides[0];
    std::vector<T>& bias = key_bias_[static_cast<size_t>(s)];
    bias.assign(static_cast<size_t>(RoundUp(sequence.mask.key_length, shape_.keys_per_block)),
                -std::numeric_limits<T>::infinity());
    for (int64_t j = 0; j < sequence.mask.key_length; ++j) {
      if (visible[j * mask.strides[1]] != 0) bias[static_cast<size_t>(j)] = T{0};
    }
  }

  void Allocate(int64_t s, int64_t kv_head, bool in_place) {
    const Sequence& sequence = resolved_.sequences[static_cast<size_t>(s)];
    Storage& storage = heads_[Index(s, kv_head)];
    // Not initialised here: the threads that pack write every element.
    storage.keys = MakeAligned<T>(static_cast<size_t>(KeyElements(resolved_, sequence, shape_)));
    if (in_place) {
      storage.values_in_place =
          static_cast<const T*>(problem_.value.data) + Offset(problem_.value, sequence, kv_head);
      storage.value_stride = problem_.value.strides[2];
    } else {
      storage.values =
          MakeAligned<T>(static_cast<size_t>(ValueElements(resolved_, sequence, shape_)));
      storage.value_stride = RoundUp(resolved_.value_size, shape_.value_multiple);
    }
  }

  // Packs the keys, and if need be the values, of one softmax step.
  void PackStep(const Block& block, bool in_place) {
    const Sequence& sequence = resolved_.sequences[static_cast<size_t>(block.sequence)];
    Storage& storage = heads_[Index(block.sequence, block.kv_head)];
    const int64_t step = int64_t{shape_.keys_per_block} * kBlocksPerSoftmaxStep;
    const int64_t end = std::min(block.first_key + step, sequence.mask.key_length);
    DispatchFloating(problem_.key.dtype, [&](auto type) {
      PackKeys<decltype(type)>(sequence, block, end, &storage);
      if (!in_place) PackValues<decltype(type)>(sequence, block, end, &storage);
    });
  }

  template <typename Element>
  void PackKeys(const Sequence& sequence, const Block& block, int64_t end, Storage* storage) {
    const TensorView& key = problem_.key;
    const auto* source =
        static_cast<const Element*>(key.data) + Offset(key, sequence, block.kv_head);
    const int64_t width = shape_.keys_per_block;
    const int64_t depth = resolved_.head_size;
    for (int64_t first = block.first_key; first < end; first += width) {
      T* target = storage->keys.get() + first * depth;
      const Element* rows = source + first * key.strides[2];
      const int64_t real = std::min(width, sequence.mask.key_length - first);
      // Reads stay within the block's rows, which the first-level cache holds; writes are in order.
      for (int64_t e = 0; e < depth; ++e) {
        const Element* element = rows + e * key.strides[3];
        for (int64_t j = 0; j < real; ++j) target[j] = Convert(element[j * key.strides[2]]);
        std::fill(target + real, target + width, T{0});
        target += width;
      }
    }
  }

  template <typename Element>
  void PackValues(const Sequence& sequence, const Block& block, int64_t end, Storage* storage) {
    const TensorView& value = problem_.value;
    const auto* source =
        static_cast<const Element*>(value.data) + Offset(value, sequence, block.kv_head);
    const int64_t step = int64_t{shape_.keys_per_block} * kBlocksPerSoftmaxStep;
    bool finite = true;
    for (int64_t j = block.first_key; j < block.first_key + step; ++j) {
      T* target = storage->values.get() + j * storage->value_stride;
      std::fill_n(target, storage->value_stride, T{0});
      if (j >= end) continue;
      for (int64_t e = 0; e < resolved_.value_size; ++e) {
        target[e] = Convert(source[j * value.strides[2] + e * value.strides[3]]);
        finite = finite && std::isfinite(target[e]);
      }
    }
    if (!finite) storage->values_finite->store(false);
  }

  static T Convert(double x) { return static_cast<T>(x); }
  static T Convert(float x) { return static_cast<T>(x); }
  static T Convert(BFloat16 x) { return static_cast<T>(ToFloat(x)); }
  static T Convert(Float16 x) { return static_cast<T>(ToFloat(x)); }

  const AttentionProblem& problem_;
  const ResolvedAttention& resolved_;
  PanelShape shape_;
  std::vector<Storage> heads_;
  std::vector<std::vector<T>> key_bias_;
};

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_PACKED_INPUTS_H_
