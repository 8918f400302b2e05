// CPU attention around the panels: packs keys and values, hands panels to threads, stores results.
//
// Every (sequence, head, panel of query rows) is one item of work with one owner; an item's result
// depends on nothing but its inputs, so any number of threads gives the same bits.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "attention_resolved.h"
#include "cpu/attention_panel.h"
#include "cpu/cache_size.h"
#include "cpu/keys_by_row.h"
#include "cpu/packed_inputs.h"
#include "cpu/parallel.h"
#include "cpu/saved_support.h"
#include "cpu/screen_int7.h"
#include "cpu/screen_int8.h"
#include "flash_entmax/machine.h"
#include "math/element.h"

namespace flash_entmax::cpu {
namespace {

// One item of work.
struct Item {
  int64_t sequence = 0;
  int64_t head = 0;
  int64_t first_query = 0;
  int64_t queries = 0;
  int64_t keys = 0;  // That any of its rows sees: what it costs.
};

// All items, a head after the other, so that its keys and values stay in the caches; the longest
// sequences first, and the longest items of a head, so that no thread is left with a long one at
// the end.
std::vector<Item> ListItems(const ResolvedAttention& resolved, int64_t rows_per_panel) {
  std::vector<std::pair<int64_t, int64_t>> sequences;  // −keys that any row sees, number
  for (size_t s = 0; s < resolved.sequences.size(); ++s) {
    const PositionMask& mask = resolved.sequences[s].mask;
    sequences.emplace_back(-std::min(mask.key_length, mask.End(mask.query_length - 1)),
                           static_cast<int64_t>(s));
  }
  std::sort(sequences.begin(), sequences.end());
  std::vector<Item> items;
  for (const auto& [keys, s] : sequences) {
    const PositionMask& mask = resolved.sequences[static_cast<size_t>(s)].mask;
    for (int64_t head = 0; head < resolved.heads; ++head) {
      const auto of_head = std::ssize(items);
      for (int64_t first = 0; first < mask.query_length; first += rows_per_panel) {
        Item item{s, head, first, std::min(rows_per_panel, mask.query_length - first), 0};
        const int64_t last = first + item.queries - 1;
        item.keys = std::max<int64_t>(0, mask.End(last) - mask.First(first));
        items.push_back(item);
      }
      std::stable_sort(items.begin() + of_head, items.end(),
                       [](const Item& a, const Item& b) { return a.keys > b.keys; });
    }
  }
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
             const AttentionOutputs& outputs, const AttentionOptions& options, void* saved)
      : problem_(problem),
        resolved_(resolved),
        outputs_(outputs),
        saved_(saved),
        shape_(GetPanelShape<T>()),
        rows_per_panel_(int64_t{shape_.rows_per_group} * kGroupsPerPanel),
        saved_layout_(SavedLayout::Make<T>(resolved, rows_per_panel_, options.support_capacity)),
        packed_(problem, resolved, shape_, AnySoftmax(resolved), options.num_threads),
        query_stride_(RoundUp(resolved.head_size, shape_.value_multiple)),
        items_(ListItems(resolved, rows_per_panel_)),
        threads_(static_cast<size_t>(ThreadCount(options.num_threads))),
        supports_(outputs.support != nullptr ? items_.size() : 0) {
    if (saved_ != nullptr) saved_layout_.WriteHeader(saved_);
    const Screening screening = ScreeningOf(resolved, shape_, options);
    // Lists of keys, which softmax has only to report its support.
    if (AnySparse(resolved) || (AnySoftmax(resolved) && outputs.support != nullptr)) {
      keys_by_row_.emplace(problem, resolved, shape_, packed_, screening, options.num_threads);
    }
    for (PanelMemory<T>& memory : threads_) {
      memory.query.resize(static_cast<size_t>(rows_per_panel_ * query_stride_));
      memory.rounded_query.resize(
          static_cast<size_t>(ScreenBytes(screening, rows_per_panel_, resolved.head_size)));
    }
  }

  static bool AnySoftmax(const ResolvedAttention& resolved) {
    return std::any_of(resolved.alpha.begin(), resolved.alpha.end(),
                       [](double alpha) { return alpha == 1.0; });
  }

  // Whether any head has zeros to find.
  static bool AnySparse(const ResolvedAttention& resolved) {
    return std::any_of(resolved.alpha.begin(), resolved.alpha.end(),
                       [](double alpha) { return alpha > 1.0; });
  }

  static bool AnyBelowSoftmax(const ResolvedAttention& resolved) {
    return std::any_of(resolved.alpha.begin(), resolved.alpha.end(),
                       [](double alpha) { return alpha < 1.0; });
  }

  // What keys are rejected with: what the machine has for the shape of the float tile.
  static Screening ScreeningOf(const ResolvedAttention& resolved, const PanelShape& shape,
                               const AttentionOptions& options) {
    if (!std::is_same_v<T, float> || !options.screening || !AnySparse(resolved) ||
        resolved.head_size > kMaxScreenDepth ||
        resolved.key_length > kMaxScreenBlocks * shape.keys_per_block) {
      return Screening::kNone;
    }
    if (CanScreenInt8() && shape.rows_per_group == kInt8Rows && shape.keys_per_block == kInt8Keys) {
      return Screening::kInt8;
    }
    return CanScreenInt7() ? Screening::kInt7 : Screening::kNone;
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
    if (keys_by_row_) input.table = keys_by_row_->Get(item.sequence, kv_head);
    input.head_size = resolved_.head_size;
    input.mask = sequence.mask;
    input.modifiers = ModifiersOf(sequence, item.head);
    input.curve = Curve::Entmax(resolved_.alpha[static_cast<size_t>(item.head)]);
    input.first_query = item.first_query;
    input.queries = item.queries;
    input.query = PackQuery(item, sequence, memory);
    input.query_stride = query_stride_;
    std::optional<SavedPanelWriter<T>> saved;
    if (saved_ != nullptr) {
      saved.emplace(saved_layout_, saved_,
                    (sequence.batch * resolved_.heads + item.head) * resolved_.query_length +
                        sequence.first_query + item.first_query,
                    item.queries);
    }
    memory->saved = saved ? &*saved : nullptr;
    RunPanel(input, outputs_.support != nullptr, memory);
    // Where α = 1 the weights of the mean that the backward pass needs are the probabilities.
    if (saved && input.curve.kind == CurveKind::kSoftmax) {
      saved->StoreMeans(memory->output.data(), input.head.value_width);
    } else if (saved && KeepsMeans(item, sequence.mask, *memory)) {
      saved->StoreMeans(memory->means.data(), input.head.value_width);
    }
    Store(item, sequence, input.head.value_width, *memory);
    if (outputs_.support != nullptr) {
      supports_[index] = {memory->support_size, memory->support_key, memory->support_probability};
    }
  }

  // Whether the means of the panel's values are worth keeping, instead of one more pass backward.
  static bool KeepsMeans(const Item& item, const PositionMask& mask, const PanelMemory<T>& memory) {
    if (memory.mean_rows != item.queries) return false;
    // Means are rounded, and the weights of the few keys of a short row so large that this would
    // show beside the gradients of long ones.
    constexpr int64_t kFewKeys = 256;
    int64_t visible = 0;
    for (int64_t i = item.first_query; i < item.first_query + item.queries; ++i) {
      const int64_t keys = mask.End(i) - mask.First(i);
      if (keys < kFewKeys) return false;
      visible += keys;
    }
    return IsDenseSupport(memory.mean_entries, visible);
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
      T* target = memory->query.data() + r * query_stride_;
      DispatchFloating(query.dtype, [&](auto type) {
        const auto* source = static_cast<const decltype(type)*>(query.data) + offset;
        for (int64_t e = 0; e < depth; ++e) {
          target[e] = static_cast<T>(factor * ToDouble(source[e * query.strides[3]]));
        }
      });
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
      DispatchFloating(output.dtype, [&](auto type) {
        auto* target = static_cast<decltype(type)*>(output.data) + offset;
        for (int64_t e = 0; e < resolved_.value_size; ++e) {
          Assign(source[e], target + e * output.strides[3]);
        }
      });
      if (outputs_.threshold) {
        const MutableTensorView& threshold = outputs_.threshold;
        WriteElement(threshold,
                     sequence.batch * threshold.strides[0] + item.head * threshold.strides[1] +
                         row * threshold.strides[2],
                     memory.threshold[static_cast<size_t>(r)]);
      }
    }
  }

  // The output has the type of the query, so T is no wider than float unless both are double.
  static void Assign(T x, double* y) { *y = static_cast<double>(x); }
  static void Assign(T x, float* y) { *y = static_cast<float>(x); }
  static void Assign(T x, BFloat16* y) { *y = ToBFloat16(static_cast<float>(x)); }
  static void Assign(T x, Float16* y) { *y = ToFloat16(static_cast<float>(x)); }

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
  void* saved_;  // Null if nothing is to be kept for the backward pass.
  PanelShape shape_;
  int64_t rows_per_panel_;
  SavedLayout saved_layout_;
  PackedInputs<T> packed_;
  std::optional<KeysByRow<T>> keys_by_row_;  // Not where α ≤ 1 everywhere.
  int64_t query_stride_;
  std::vector<Item> items_;
  std::vector<PanelMemory<T>> threads_;
  std::vector<ItemSupport> supports_;
};

template <typename T>
void FillPlan(const AttentionProblem& problem, const ResolvedAttention& resolved,
              const AttentionOptions& options, AttentionPlan* plan) {
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
  // Query, output and the scores of the first keys of a panel, and its candidate lists as they
  // start.
  constexpr int64_t kInitialList = 1024;
  const int64_t stride = RoundUp(resolved.value_size, shape.value_multiple);
  const int64_t per_thread = plan->rows_per_panel * (resolved.head_size + stride + kInitialList);
  plan->workspace_bytes =
      (elements + per_thread * plan->num_threads) * static_cast<int64_t>(sizeof(T));
  if (ForwardRun<T>::AnyBelowSoftmax(resolved)) {
    // Scores and, if saved, u of dense rows; candidates of one.
    const int64_t row =
        RoundUp(resolved.key_length, shape.keys_per_block) * static_cast<int64_t>(sizeof(T));
    const int64_t group = row * shape.rows_per_group;
    const int64_t groups = std::min<int64_t>(kGroupsPerPanel, DenseGroupsTogether(group));
    const int64_t copies = options.save_for_backward ? 2 : 1;
    plan->workspace_bytes += plan->num_threads * (row + copies * groups * group);
  }
  if (!ForwardRun<T>::AnySparse(resolved)) return;
  const Screening screening = ForwardRun<T>::ScreeningOf(resolved, shape, options);
  for (const Sequence& sequence : resolved.sequences) {
    plan->workspace_bytes +=
        resolved.kv_heads * KeysByRow<T>::Bytes(problem, resolved, sequence, shape, screening);
  }
  if (screening == Screening::kInt8) plan->path += ", keys rejected by 8-bit products";
  if (screening == Screening::kInt7) plan->path += ", keys rejected by 7-bit products";
}

}  // namespace

AttentionPlan PlanForward(const AttentionProblem& problem, const ResolvedAttention& resolved,
                          const AttentionOptions& options) {
  AttentionPlan plan;
  plan.engine = "cpu";
  const bool sparse = ForwardRun<float>::AnySparse(resolved);
  const bool softmax = ForwardRun<float>::AnySoftmax(resolved);
  const bool below = ForwardRun<float>::AnyBelowSoftmax(resolved);
  plan.path = sparse || resolved.alpha.empty() ? "one-pass candidates"
              : softmax                        ? "online softmax"
                                               : "dense products";
  if (sparse && softmax) plan.path += "; online softmax for heads with alpha 1";
  if (below && (sparse || softmax)) plan.path += "; dense products for heads with alpha below 1";
  plan.instruction_set = ActiveInstructionSet();
  plan.num_threads = ThreadCount(options.num_threads);
  if (problem.query.dtype == DType::kFloat64) {
    FillPlan<double>(problem, resolved, options, &plan);
  } else {
    FillPlan<float>(problem, resolved, options, &plan);
  }
  return plan;
}

Status RunForward(const AttentionProblem& problem, const ResolvedAttention& resolved,
                  const AttentionOutputs& outputs, const AttentionOptions& options,
                  AttentionBuffer saved) {
  void* data = options.save_for_backward ? saved.data : nullptr;
  if (problem.query.dtype == DType::kFloat64) {
    return ForwardRun<double>(problem, resolved, outputs, options, data).Run(options);
  }
  return ForwardRun<float>(problem, resolved, outputs, options, data).Run(options);
}

}  // namespace flash_entmax::cpu
