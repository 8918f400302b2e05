// The second form of the keys that the candidate path reads: rows, norms and blocks of small
// integers.

#ifndef FLASH_ENTMAX_SRC_CPU_KEYS_BY_ROW_H_
#define FLASH_ENTMAX_SRC_CPU_KEYS_BY_ROW_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "attention_resolved.h"
#include "cpu/aligned_array.h"
#include "cpu/attention_panel.h"
#include "cpu/packed_inputs.h"
#include "cpu/parallel.h"
#include "cpu/screen_int7.h"
#include "cpu/screen_int8.h"
#include "math/element.h"

namespace flash_entmax::cpu {

// Keys of every (sequence, KV head). Rows are read where they are if their layout allows it.
template <typename T>
class KeysByRow {
 public:
  static bool InPlace(const TensorView& key, const PanelShape& shape) {
    constexpr DType kDType = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;
    return key.dtype == kDType && key.strides[3] == 1 && key.shape[3] % shape.value_multiple == 0;
  }

  static int64_t RowStride(const ResolvedAttention& resolved, const PanelShape& shape) {
    return RoundUp(resolved.head_size, shape.value_multiple);
  }

  // Bytes of one sequence and KV head.
  static int64_t Bytes(const AttentionProblem& problem, const ResolvedAttention& resolved,
                       const Sequence& sequence, const PanelShape& shape, Screening screening) {
    const int64_t blocks =
        (sequence.mask.key_length + shape.keys_per_block - 1) / shape.keys_per_block;
    int64_t bytes = blocks * static_cast<int64_t>(sizeof(KeyBlockBound));
    if (!InPlace(problem.key, shape)) {
      bytes +=
          sequence.mask.key_length * RowStride(resolved, shape) * static_cast<int64_t>(sizeof(T));
    }
    return bytes + ScreenBytes(screening, blocks * shape.keys_per_block, resolved.head_size);
  }

  KeysByRow(const AttentionProblem& problem, const ResolvedAttention& resolved,
            const PanelShape& shape, const PackedInputs<T>& packed, Screening screening,
            int num_threads)
      : problem_(problem), resolved_(resolved), shape_(shape), screening_(screening) {
    const auto sequences = static_cast<int64_t>(resolved.sequences.size());
    heads_.resize(static_cast<size_t>(sequences * resolved.kv_heads));
    std::vector<Piece> pieces;
    for (int64_t s = 0; s < sequences; ++s) {
      for (int64_t kv_head = 0; kv_head < resolved.kv_heads; ++kv_head) {
        Allocate(s, kv_head);
        const int64_t blocks = Blocks(resolved.sequences[static_cast<size_t>(s)]);
        for (int64_t first = 0; first < blocks; first += kBlocksPerPiece) {
          pieces.push_back({s, kv_head, first, std::min(blocks, first + kBlocksPerPiece)});
        }
      }
    }
    ParallelFor(static_cast<int64_t>(pieces.size()), 1, num_threads,
                [&](int64_t first, int64_t last, int) {
                  for (int64_t i = first; i < last; ++i) {
                    Fill(pieces[static_cast<size_t>(i)], packed);
                  }
                });
    for (Storage& storage : heads_) {
      for (int64_t b = 0; b < storage.blocks; ++b) {
        // So that NaN stays.
        if (!(storage.bounds[b].norm <= storage.largest_norm)) {
          storage.largest_norm = storage.bounds[b].norm;
        }
        if (std::isnan(storage.largest_norm)) break;
      }
    }
  }

  KeyTable<T> Get(int64_t sequence, int64_t kv_head) const {
    const Storage& storage = heads_[Index(sequence, kv_head)];
    KeyTable<T> table;
    table.rows = storage.in_place != nullptr ? storage.in_place : storage.rows.get();
    table.row_stride = storage.row_stride;
    table.bounds = storage.bounds.get();
    table.largest_norm = storage.largest_norm;
    table.screening = screening_;
    table.rounded = storage.rounded.get();
    return table;
  }

 private:
  static constexpr int64_t kBlocksPerPiece = 16;

  struct Piece {
    int64_t sequence;
    int64_t kv_head;
    int64_t first_block;
    int64_t end_block;
  };
  struct Storage {
    std::unique_ptr<T[]> rows;
    const T* in_place = nullptr;
    int64_t row_stride = 0;
    int64_t blocks = 0;
    std::unique_ptr<KeyBlockBound[]> bounds;
    AlignedArray<uint8_t> rounded;
    float largest_norm = 0.0f;
  };

  size_t Index(int64_t sequence, int64_t kv_head) const {
    return static_cast<size_t>(sequence * resolved_.kv_heads + kv_head);
  }

  int64_t Blocks(const Sequence& sequence) const {
    return (sequence.mask.key_length + shape_.keys_per_block - 1) / shape_.keys_per_block;
  }

  void Allocate(int64_t s, int64_t kv_head) {
    const Sequence& sequence = resolved_.sequences[static_cast<size_t>(s)];
    Storage& storage = heads_[Index(s, kv_head)];
    storage.blocks = Blocks(sequence);
    if (InPlace(problem_.key, shape_)) {
      storage.in_place =
          static_cast<const T*>(problem_.key.data) + sequence.batch * problem_.key.strides[0] +
          kv_head * problem_.key.strides[1] + sequence.first_key * problem_.key.strides[2];
      storage.row_stride = problem_.key.strides[2];
    } else {
      storage.row_stride = RowStride(resolved_, shape_);
      storage.rows.reset(new T[static_cast<size_t>(sequence.mask.key_length * storage.row_stride)]);
    }
    storage.bounds = std::make_unique<KeyBlockBound[]>(static_cast<size_t>(storage.blocks));
    if (screening_ != Screening::kNone) {
      storage.rounded = MakeAligned<uint8_t>(static_cast<size_t>(RoundedOffset(storage.blocks)));
    }
  }

  // Bytes of so many rounded blocks.
  int64_t RoundedOffset(int64_t blocks) const {
    return ScreenBytes(screening_, blocks * shape_.keys_per_block, resolved_.head_size);
  }

  void Fill(const Piece& piece, const PackedInputs<T>& packed) {
    const Sequence& sequence = resolved_.sequences[static_cast<size_t>(piece.sequence)];
    Storage& storage = heads_[Index(piece.sequence, piece.kv_head)];
    const PackedHead<T> head = packed.Get(piece.sequence, piece.kv_head);
    const int64_t width = shape_.keys_per_block;
    const int64_t depth = resolved_.head_size;
    for (int64_t b = piece.first_block; b < piece.end_block; ++b) {
      const T* block = head.keys + b * width * depth;
      KeyBlockBound& bound = storage.bounds[b];
      bound.norm = LargestNorm(block, width, depth);
      if constexpr (std::is_same_v<T, float>) {
        uint8_t* rounded = storage.rounded.get() + RoundedOffset(b);
        if (screening_ == Screening::kInt8) {
          RoundKeysInt8(block, static_cast<size_t>(depth), rounded, &bound);
        } else if (screening_ == Screening::kInt7) {
          RoundKeysInt7(block, static_cast<size_t>(depth), rounded, &bound);
        }
      }
      if (storage.in_place != nullptr) continue;
      const int64_t end = std::min((b + 1) * width, sequence.mask.key_length);
      for (int64_t j = b * width; j < end; ++j) {
        T* row = storage.rows.get() + j * storage.row_stride;
        for (int64_t e = 0; e < depth; ++e) row[e] = block[e * width + (j - b * width)];
        std::fill(row + depth, row + storage.row_stride, T{0});
      }
    }
  }

  // Rounded up.
  static float LargestNorm(const T* block, int64_t width, int64_t depth) {
    constexpr int64_t kMaxWidth = 64;
    T square[kMaxWidth] = {};
    for (int64_t e = 0; e < depth; ++e) {
      for (int64_t j = 0; j < width; ++j) square[j] += block[e * width + j] * block[e * width + j];
    }
    T largest = T{0};
    for (int64_t j = 0; j < width; ++j) {
      if (!(square[j] <= largest)) largest = square[j];
      if (std::isnan(largest)) break;
    }
    return NormFromSquare(static_cast<double>(largest), depth);
  }

  const AttentionProblem& problem_;
  const ResolvedAttention& resolved_;
  PanelShape shape_;
  Screening screening_;
  std::vector<Storage> heads_;
};

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_KEYS_BY_ROW_H_
