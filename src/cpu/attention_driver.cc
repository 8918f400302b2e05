// CPU attention around the panels: packs keys and values, hands panels to threads, stores results.
//
// Every (sequence, head, panel of query rows) is one item of work with one owner; an item's result
// depends on nothing but its inputs, so any number of threads gives the same bits.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "attention_resolved.h"
#include "cpu/attention_panel.h"
#include "cpu/parallel.h"
#include "flash_entmax/machine.h"
#include "math/element.h"

namespace flash_entmax::cpu {
namespace {

int64_t RoundUp(int64_t value, int64_t multiple) {
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
    std::unique_ptr<T[]> keys;
    std::unique_ptr<T[]> values;
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
    storage.keys.reset(new T[static_cast<size_t>(KeyElements(resolved_, sequence, shape_))]);
    if (in_place) {
      storage.values_in_place =
          static_cast<const T*>(problem_.value.data) + Offset(problem_.value, sequence, kv_head);
      storage.value_stride = problem_.value.strides[2];
    } else {
      storage.values.reset(new T[static_cast<size_t>(ValueElements(resolved_, sequence, shape_))]);
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
      for (int64_t j = 0; j < width; ++j) {
        const bool real = first + j < sequence.mask.key_length;
        for (int64_t e = 0; e < depth; ++e) {
          target[e * width + j] =
              real ? Convert(source[(first + j) * key.strides[2] + e * key.strides[3]]) : T{0};
        }
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

// One item of work.
struct Item {
  int64_t sequence = 0;
  int64_t head = 0;
  int64_t first_query = 0;
  int64_t queries = 0;
  int64_t keys = 0;  // That any of its rows sees: what it costs.
};

// All items, the longest first, so that no thread is left with a long one at the end.
std::vector<Item> ListItems(const ResolvedAttention& resolved, int64_t rows_per_panel) {
  std::vector<Item> items;
  for (size_t s = 0; s < resolved.sequences.size(); ++s) {
    const PositionMask& mask = resolved.sequences[s].mask;
    for (int64_t head = 0; head < resolved.heads; ++head) {
      for (int64_t first = 0; first < mask.query_length; first += rows_per_panel) {
        Item item{static_cast<int64_t>(s), head, first,
                  std::min(rows_per_panel, mask.query_length - first), 0};
        const int64_t last = first + item.queries - 1;
        item.keys = std::max<int64_t>(0, mask.End(last) - mask.First(first));
        items.push_back(item);
      }
    }
  }
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& a, const Item& b) { return a.keys > b.keys; });
  return items;
}

// The support of one item, kept until all are known.
struct ItemSupport {
  std::vector<int64_t> size;
  std::vector<int32_t> key;
  std::vector<float> probability;
};

template <typename T>
class ForwardRun {
 public:
  ForwardRun(const AttentionProblem& problem, const ResolvedAttention& resolved,
             const AttentionOutputs& outputs, const AttentionOptions& options)
      : problem_(problem),
        resolved_(resolved),
        outputs_(outputs),
        shape_(GetPanelShape<T>()),
        rows_per_panel_(int64_t{shape_.rows_per_group} * kGroupsPerPanel),
        packed_(problem, resolved, shape_, AnySoftmax(resolved), options.num_threads),
        items_(ListItems(resolved, rows_per_panel_)),
        threads_(static_cast<size_t>(ThreadCount(options.num_threads))),
        supports_(outputs.support != nullptr ? items_.size() : 0) {
    for (PanelMemory<T>& memory : threads_) {
      memory.query.resize(static_cast<size_t>(rows_per_panel_ * resolved.head_size));
    }
  }

  static bool AnySoftmax(const ResolvedAttention& resolved) {
    return std::any_of(resolved.alpha.begin(), resolved.alpha.end(),
                       [](double alpha) { return alpha == 1.0; });
  }

  Status Run(const AttentionOptions& options) {
    std::atomic<bool> out_of_memory = false;
    ParallelFor(static_cast<int64_t>(items_.size()), 1, options.num_threads,
                [&](int64_t first, int64_t last, int thread) {
                  for (int64_t i = first; i < last; ++i) {
                    try {
                      RunItem(static_cast<size_t>(i), &threads_[static_cast<size_t>(thread)]);
                    } catch (const std::bad_alloc&) {
                      out_of_memory.store(true);
                    }
                  }
                });
    if (out_of_memory.load()) {
      return Status::OutOfMemory("query: no memory for the candidates of " +
                                 std::to_string(resolved_.key_length) + " keys");
    }
    if (outputs_.support != nullptr) AssembleSupport();
    return Status::Ok();
  }

 private:
  void RunItem(size_t index, PanelMemory<T>* memory) {
    const Item& item = items_[index];
    const Sequence& sequence = resolved_.sequences[static_cast<size_t>(item.sequence)];
    const int64_t kv_head = item.head / (resolved_.heads / resolved_.kv_heads);
    PanelInput<T> input;
    input.head = packed_.Get(item.sequence, kv_head);
    input.head_size = resolved_.head_size;
    input.mask = sequence.mask;
    input.modifiers = ModifiersOf(sequence, item.head);
    input.curve = Curve::Entmax(resolved_.alpha[static_cast<size_t>(item.head)]);
    input.first_query = item.first_query;
    input.queries = item.queries;
    input.query = PackQuery(item, sequence, memory);
    RunPanel(input, outputs_.support != nullptr, memory);
    Store(item, sequence, input.head.value_width, *memory);
    if (outputs_.support != nullptr) {
      supports_[index] = {memory->support_size, memory->support_key, memory->support_probability};
    }
  }

  ScoreModifiers<T> ModifiersOf(const Sequence& sequence, int64_t head) const {
    ScoreModifiers<T> modifiers;
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
    return modifiers;
  }

  // The panel's query rows times scale and query_scale.
  const T* PackQuery(const Item& item, const Sequence& sequence, PanelMemory<T>* memory) const {
    const TensorView& query = problem_.query;
    const int64_t depth = resolved_.head_size;
    std::fill(memory->query.begin(), memory->query.end(), T{0});
    for (int64_t r = 0; r < item.queries; ++r) {
      const int64_t row = sequence.first_query + item.first_query + r;
      double factor = resolved_.scale;
      if (resolved_.query_scale) {
        const TensorView& scale = resolved_.query_scale;
        factor *= ReadElement(scale, sequence.batch * scale.strides[0] +
                                         item.head * scale.strides[1] + row * scale.strides[2]);
      }
      const int64_t offset =
          sequence.batch * query.strides[0] + item.head * query.strides[1] + row * query.strides[2];
      T* target = memory->query.data() + r * depth;
      for (int64_t e = 0; e < depth; ++e) {
        target[e] = static_cast<T>(factor * ReadElement(query, offset + e * query.strides[3]));
      }
    }
    return memory->query.data();
  }

  void Store(const Item& item, const Sequence& sequence, int64_t width,
             const PanelMemory<T>& memory) const {
    const MutableTensorView& output = outputs_.output;
    for (int64_t r = 0; r < item.queries; ++r) {
      const int64_t row = sequence.first_query + item.first_query + r;
      const int64_t offset = sequence.batch * output.strides[0] + item.head * output.strides[1] +
                             row * output.strides[2];
      const T* source = memory.output.data() + r * width;
      for (int64_t e = 0; e < resolved_.value_size; ++e) {
        WriteElement(output, offset + e * output.strides[3], static_cast<double>(source[e]));
      }
      if (outputs_.threshold) {
        const MutableTensorView& threshold = outputs_.threshold;
        WriteElement(threshold,
                     sequence.batch * threshold.strides[0] + item.head * threshold.strides[1] +
                         row * threshold.strides[2],
                     memory.threshold[static_cast<size_t>(r)]);
      }
    }
  }

  // Joins the items' supports in the order of rows.
  void AssembleSupport() const {
    const int64_t rows = resolved_.batch * resolved_.heads * resolved_.query_length;
    AttentionSupport& support = *outputs_.support;
    support.row_offsets.assign(static_cast<size_t>(rows) + 1, 0);
    const auto first_row = [&](const Item& item) {
      const Sequence& sequence = resolved_.sequences[static_cast<size_t>(item.sequence)];
      return static_cast<size_t>((sequence.batch * resolved_.heads + item.head) *
                                     resolved_.query_length +
                                 sequence.first_query + item.first_query);
    };
    for (size_t i = 0; i < items_.size(); ++i) {
      const size_t row = first_row(items_[i]);
      std::copy(supports_[i].size.begin(), supports_[i].size.end(),
                support.row_offsets.begin() + static_cast<std::ptrdiff_t>(row) + 1);
    }
    for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
      support.row_offsets[row + 1] += support.row_offsets[row];
    }
    const auto entries = static_cast<size_t>(support.row_offsets.back());
    support.key_index.resize(entries);
    support.probability.resize(entries);
    for (size_t i = 0; i < items_.size(); ++i) {
      const auto begin = static_cast<std::ptrdiff_t>(support.row_offsets[first_row(items_[i])]);
      std::copy(supports_[i].key.begin(), supports_[i].key.end(),
                support.key_index.begin() + begin);
      std::copy(supports_[i].probability.begin(), supports_[i].probability.end(),
                support.probability.begin() + begin);
    }
  }

  const AttentionProblem& problem_;
  const ResolvedAttention& resolved_;
  const AttentionOutputs& outputs_;
  PanelShape shape_;
  int64_t rows_per_panel_;
  PackedInputs<T> packed_;
  std::vector<Item> items_;
  std::vector<PanelMemory<T>> threads_;
  std::vector<ItemSupport> supports_;
};

template <typename T>
void FillPlan(const AttentionProblem& problem, const ResolvedAttention& resolved,
              AttentionPlan* plan) {
  const PanelShape shape = GetPanelShape<T>();
  const bool softmax = ForwardRun<T>::AnySoftmax(resolved);
  plan->rows_per_panel = shape.rows_per_group * kGroupsPerPanel;
  plan->keys_per_block = shape.keys_per_block;
  const bool in_place = PackedInputs<T>::ValuesInPlace(problem.value, shape, softmax);
  int64_t elements = 0;
  for (const Sequence& sequence : resolved.sequences) {
    elements += resolved.kv_heads * PackedInputs<T>::KeyElements(resolved, sequence, shape);
    if (!in_place) {
      elements += resolved.kv_heads * PackedInputs<T>::ValueElements(resolved, sequence, shape);
    }
    if (resolved.key_mask) elements += RoundUp(sequence.mask.key_length, shape.keys_per_block);
  }
  // Query and output of a panel, and its candidate lists as they start.
  constexpr int64_t kInitialList = 1024;
  const int64_t stride = RoundUp(resolved.value_size, shape.value_multiple);
  const int64_t per_thread = plan->rows_per_panel * (resolved.head_size + stride + kInitialList);
  plan->workspace_bytes =
      (elements + per_thread * plan->num_threads) * static_cast<int64_t>(sizeof(T));
}

}  // namespace

AttentionPlan PlanForward(const AttentionProblem& problem, const ResolvedAttention& resolved,
                          const AttentionOptions& options) {
  AttentionPlan plan;
  plan.engine = "cpu";
  const bool any_softmax = ForwardRun<float>::AnySoftmax(resolved);
  const bool all_softmax = std::all_of(resolved.alpha.begin(), resolved.alpha.end(),
                                       [](double alpha) { return alpha == 1.0; });
  plan.path = !any_softmax  ? "one-pass candidates"
              : all_softmax ? "online softmax"
                            : "one-pass candidates; online softmax for heads with alpha 1";
  plan.instruction_set = ActiveInstructionSet();
  plan.num_threads = ThreadCount(options.num_threads);
  if (problem.query.dtype == DType::kFloat64) {
    FillPlan<double>(problem, resolved, &plan);
  } else {
    FillPlan<float>(problem, resolved, &plan);
  }
  return plan;
}

Status RunForward(const AttentionProblem& problem, const ResolvedAttention& resolved,
                  const AttentionOutputs& outputs, const AttentionOptions& options) {
  if (problem.query.dtype == DType::kFloat64) {
    return ForwardRun<double>(problem, resolved, outputs, options).Run(options);
  }
  return ForwardRun<float>(problem, resolved, outputs, options).Run(options);
}

}  // namespace flash_entmax::cpu
