// CPU backward pass of attention: which way each panel goes, who owns what, and in what order.
//
// Every panel of query rows, as the forward pass cut them, goes one of two ways:
//   - sparse (backward_rows.cc): the support is saved, or is found again if it had no room;
//   - dense (backward_dense.cc): α = 1, or supports that had no room and are large
//     (IsDenseSupport).
// The choice reads only the problem and the saved buffer.
//
// Sparse panels are taken in chunks that bound the memory of their entries. In a chunk first every
// panel is owned by one thread (gradients of query rows; the entries, sorted by block of keys),
// then every block of keys is (gradients of keys and values), whatever the number of query heads
// that share it.
// Dense panels: the query rows and the keys of every head are cut into a few parts, and phase t
// computes the pairs (rows a, keys (a + t) mod m): no two pairs of a phase share rows or keys, and
// each part meets its partners in the same order whatever the number of threads.
//
// So every gradient row is summed in an order that depends on nothing but the problem: any number
// of threads gives the same bits.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "attention_resolved.h"
#include "cpu/attention_panel.h"
#include "cpu/backward_inputs.h"
#include "cpu/backward_kernels.h"
#include "cpu/backward_panels.h"
#include "cpu/backward_sums.h"
#include "cpu/backward_tensors.h"
#include "cpu/parallel.h"
#include "cpu/saved_support.h"
#include "views.h"

namespace flash_entmax::cpu {
namespace {

// Entries of a chunk of sparse panels, unless one panel has more.
constexpr int64_t kChunkEntries = int64_t{1} << 18;
// Keys of one owner in the column pass: their gradients stay in the second-level cache.
constexpr int64_t kKeysPerOwner = 512;
// Entries that a row found again may have more than it had: rounding may differ at the threshold.
constexpr int64_t kFoundSlack = 16;
template <typename T>
class BackwardRun {
 public:
  BackwardRun(const AttentionProblem& problem, const ResolvedAttention& resolved,
              const AttentionGradients& gradients, const AttentionOptions& options,
              const SavedLayout& layout, void* saved)
      : resolved_(resolved),
        gradients_(gradients),
        layout_(layout),
        saved_(saved),
        threads_(ThreadsFor(resolved, options)),
        groups_(static_cast<int64_t>(resolved.sequences.size()) * resolved.kv_heads),
        memory_(static_cast<size_t>(ThreadCount(threads_))),
        tensors_(problem, resolved, gradients, layout, saved, threads_),
        panels_(ListBackwardPanels(resolved, layout, saved)),
        bias_(resolved, problem.bias, gradients.bias) {}

  Status Run() {
    ChooseWays();
    tensors_.Prepare(panels_, ranges_);
    tensors_.grad_key.SetZero(threads_);
    tensors_.grad_value.SetZero(threads_);
    RunSparse();
    RunDense();
    if (out_of_memory_.load()) {
      return Status::OutOfMemory("query: no memory for the support of " +
                                 std::to_string(resolved_.key_length) + " keys");
    }
    SpreadNotANumber();
    tensors_.grad_key.Finish(threads_);
    tensors_.grad_value.Finish(threads_);
    bias_.Finish();
    SumOverRows(resolved_, tensors_.grad_alpha, gradients_.alpha);
    SumOverRows(resolved_, tensors_.grad_slope, gradients_.alibi_slopes);
    SumToShape(resolved_, tensors_.grad_query_scale, gradients_.query_scale);
    return Status::Ok();
  }

 private:
  // Waking threads costs more than a problem of a few thousand scores.
  static int ThreadsFor(const ResolvedAttention& resolved, const AttentionOptions& options) {
    constexpr int64_t kFewScores = int64_t{1} << 16;
    const int64_t rows = resolved.batch * resolved.heads * resolved.query_length;
    if (rows <= kFewScores && rows * resolved.key_length <= kFewScores) return 1;
    return options.num_threads;
  }

  template <typename Body>
  void For(size_t count, const Body& body) {
    ParallelFor(static_cast<int64_t>(count), 1, threads_,
                [&](int64_t first, int64_t last, int thread) {
                  for (int64_t i = first; i < last; ++i) {
                    try {
                      body(static_cast<size_t>(i), &memory_[static_cast<size_t>(thread)]);
                    } catch (const std::bad_alloc&) {
                      out_of_memory_.store(true);
                    }
                  }
                });
  }

  const Sequence& SequenceAt(int64_t s) const {
    return resolved_.sequences[static_cast<size_t>(s)];
  }

  void ChooseWays() {
    for (BackwardPanel& panel : panels_) {
      const SavedRow* rows = layout_.Rows(saved_) + panel.row;
      // The dense way writes each score's own element of the bias's gradient, and sums none. For
      // α > 2 p is so steep next to the threshold that it has to be made in double.
      panel.dense = !panel.all_kept && (!bias_.wanted() || bias_.separate()) &&
                    resolved_.alpha[static_cast<size_t>(panel.head)] <= 2.0 &&
                    (rows->has_mean != 0 || IsDenseSupport(panel.entries, panel.visible));
    }
    ranges_.assign(static_cast<size_t>(groups_), {});
    for (const BackwardPanel& panel : panels_) {
      if (panel.all_kept) continue;
      const PositionMask& mask = SequenceAt(panel.sequence).mask;
      KeyRange& keys = ranges_[static_cast<size_t>(panel.group)];
      keys.first = std::min(keys.first, mask.First(panel.first_query));
      keys.end = std::max(keys.end, mask.End(panel.first_query + panel.queries - 1));
    }
    // 0·NaN must not be computed, so dense products need finite numbers throughout their group.
    const std::vector<size_t> dense = DensePanels();
    std::vector<uint8_t> panel_finite(dense.size());
    For(dense.size(), [&](size_t i, BackwardMemory<T>*) {
      const BackwardPanel& panel = panels_[dense[i]];
      const bool first_of_group = i == 0 || panels_[dense[i - 1]].group != panel.group;
      panel_finite[i] = QueriesAreFinite(panel) && (!first_of_group || KeysAreFinite(panel.group));
    });
    std::vector<uint8_t> finite(static_cast<size_t>(groups_), 1);
    for (size_t i = 0; i < dense.size(); ++i) {
      if (panel_finite[i] == 0) finite[static_cast<size_t>(panels_[dense[i]].group)] = 0;
    }
    for (const size_t i : dense) {
      BackwardPanel& panel = panels_[i];
      panel.dense = finite[static_cast<size_t>(panel.group)] != 0;
      if (!panel.dense) continue;
      const SavedRow* rows = layout_.Rows(saved_) + panel.row;
      for (int64_t r = 0; r < panel.queries; ++r) {
        if (rows[r].count > 0) tensors_.dense[static_cast<size_t>(panel.row + r)] = 1;
      }
    }
  }

  std::vector<size_t> DensePanels() const {
    std::vector<size_t> dense;
    for (size_t i = 0; i < panels_.size(); ++i) {
      if (panels_[i].dense) dense.push_back(i);
    }
    return dense;
  }

  static bool RowsAreFinite(const RowsView<const T>& rows, int64_t count, int64_t size) {
    for (int64_t i = 0; i < count; ++i) {
      const T* row = rows.Row(i);
      T check = T{0};
      for (int64_t e = 0; e < size; ++e) check += row[e] * T{0};
      if (!(check == T{0})) return false;
    }
    return true;
  }

  bool KeysAreFinite(int64_t group) const {
    const Sequence& sequence = SequenceAt(group / resolved_.kv_heads);
    const int64_t kv_head = group % resolved_.kv_heads;
    // The blocks of the dense way reach beyond the keys that are seen.
    const KeyRange& keys = ranges_[static_cast<size_t>(group)];
    const int64_t first = sequence.first_key + keys.first / kDenseBlock * kDenseBlock;
    const int64_t count = std::min(PaddedWidth(keys.end, kDenseBlock), sequence.mask.key_length) +
                          sequence.first_key - first;
    return RowsAreFinite(tensors_.key.Get(sequence.batch, kv_head, first), count,
                         resolved_.head_size) &&
           RowsAreFinite(tensors_.value.Get(sequence.batch, kv_head, first), count,
                         resolved_.value_size);
  }

  bool QueriesAreFinite(const BackwardPanel& panel) const {
    const Sequence& sequence = SequenceAt(panel.sequence);
    const int64_t first = sequence.first_query + panel.first_query;
    return RowsAreFinite(tensors_.query.Get(sequence.batch, panel.head, first), panel.queries,
                         resolved_.head_size) &&
           RowsAreFinite(tensors_.grad_output.Get(sequence.batch, panel.head, first), panel.queries,
                         resolved_.value_size);
  }

  // ---- Sparse -----------------------------------------------------------------------------------

  // A panel's entries in the chunk: sorted by block of keys, of which `bins` holds the ends.
  struct ChunkPanel {
    const BackwardPanel* panel = nullptr;
    int64_t begin = 0;
    int64_t capacity = 0;
    std::vector<int32_t> bin_end;
  };

  bool WantsEntries() const { return tensors_.grad_key.wanted() || tensors_.grad_value.wanted(); }

  void RunSparse() {
    std::vector<const BackwardPanel*> sparse;
    for (const BackwardPanel& panel : panels_) sparse.push_back(&panel);
    // Panels that add to the same elements of the bias's gradient follow each other, and are one
    // item of work.
    if (bias_.wanted()) {
      std::stable_sort(sparse.begin(), sparse.end(),
                       [&](const BackwardPanel* a, const BackwardPanel* b) {
                         return BiasOwner(*a) < BiasOwner(*b);
                       });
    }
    std::vector<ChunkPanel> chunk;
    int64_t used = 0;
    for (const BackwardPanel* panel : sparse) {
      const int64_t capacity =
          panel->dense ? 0 : panel->entries + (panel->all_kept ? 0 : kFoundSlack * panel->queries);
      if (!chunk.empty() && used + capacity > kChunkEntries) {
        RunChunk(used, &chunk);
        chunk.clear();
        used = 0;
      }
      chunk.push_back({panel, used, capacity, {}});
      used += capacity;
    }
    if (!chunk.empty()) RunChunk(used, &chunk);
  }

  int64_t BiasOwner(const BackwardPanel& panel) const {
    return bias_.Owner(SequenceAt(panel.sequence).batch, panel.head, panel.first_query);
  }

  void RunChunk(int64_t capacity, std::vector<ChunkPanel>* chunk) {
    if (WantsEntries() && entries_capacity_ < capacity) {
      entries_.reset();  // Nothing to copy when it grows.
      entries_.reset(new ColumnEntry<T>[static_cast<size_t>(capacity)]);
      entries_capacity_ = capacity;
    }
    // Items: panels one by one, or all those of one owner of the bias's gradient.
    std::vector<size_t> item{0};
    for (size_t i = 1; i < chunk->size(); ++i) {
      if (!bias_.wanted() || BiasOwner(*(*chunk)[i].panel) != BiasOwner(*(*chunk)[i - 1].panel)) {
        item.push_back(i);
      }
    }
    item.push_back(chunk->size());
    For(item.size() - 1, [&](size_t i, BackwardMemory<T>* memory) {
      for (size_t j = item[i]; j < item[i + 1]; ++j) RunPanelRows(&(*chunk)[j], memory);
    });
    if (!WantsEntries() || out_of_memory_.load()) return;
    // Panels of each group in order, and the owners of their keys.
    std::vector<std::vector<const ChunkPanel*>> of_group(static_cast<size_t>(groups_));
    for (const ChunkPanel& part : *chunk) {
      if (!part.bin_end.empty()) {
        of_group[static_cast<size_t>(part.panel->group)].push_back(&part);
      }
    }
    struct Owner {
      int64_t group, block;
    };
    std::vector<Owner> owners;
    for (int64_t group = 0; group < groups_; ++group) {
      if (of_group[static_cast<size_t>(group)].empty()) continue;
      const int64_t keys = SequenceAt(group / resolved_.kv_heads).mask.key_length;
      for (int64_t block = 0; block * kKeysPerOwner < keys; ++block) {
        owners.push_back({group, block});
      }
    }
    For(owners.size(), [&](size_t i, BackwardMemory<T>*) {
      const auto block = static_cast<size_t>(owners[i].block);
      for (const ChunkPanel* part : of_group[static_cast<size_t>(owners[i].group)]) {
        const int32_t begin = block == 0 ? 0 : part->bin_end[block - 1];
        const int32_t end = part->bin_end[block];
        if (begin == end) continue;
        BackwardColumns(tensors_.Head(part->panel->sequence, part->panel->head),
                        entries_.get() + part->begin + begin, end - begin);
      }
    });
  }

  void RunPanelRows(ChunkPanel* part, BackwardMemory<T>* memory) {
    const BackwardPanel& panel = *part->panel;
    const BackwardHead<T>& head = tensors_.Head(panel.sequence, panel.head);
    const SavedPanel<T> saved(layout_, saved_, panel.row, panel.queries);
    const bool elsewhere = tensors_.wants_query() && !tensors_.query_in_place();
    memory->grad_query = {};
    if (elsewhere) {
      memory->grad_query_rows.resize(static_cast<size_t>(panel.queries * head.query_width));
      memory->grad_query = {memory->grad_query_rows.data(), head.query_width};
    } else if (tensors_.wants_query()) {
      memory->grad_query = {head.grad_query.Row(panel.first_query), head.grad_query.stride};
    }
    BackwardRows(head, panel.first_query, panel.queries, saved, WantsEntries() || bias_.wanted(),
                 bias_.wanted(), memory);
    for (int64_t r = 0; r < panel.queries && tensors_.wants_query(); ++r) {
      if (head.dense[panel.first_query + r] != 0) {
        std::fill_n(head.grad_query.Row(panel.first_query + r), head.query_width, T{0});
      } else if (elsewhere) {
        tensors_.WriteQueryRow(SequenceAt(panel.sequence), panel.head, panel.first_query + r,
                               memory->grad_query.Row(r));
      }
    }
    if (bias_.wanted()) {
      bias_.Add(SequenceAt(panel.sequence).batch, panel.head, memory->entries,
                memory->entry_grad_score);
    }
    if (!WantsEntries() || memory->entries.empty()) return;
    // Counting sort by block of keys; inside a block the order of rows stays.
    const int64_t keys = head.scores.mask.key_length;
    const auto bins = static_cast<size_t>((keys + kKeysPerOwner - 1) / kKeysPerOwner);
    std::vector<int32_t> start(bins + 1, 0);
    const auto count = std::min(memory->entries.size(), static_cast<size_t>(part->capacity));
    for (size_t i = 0; i < count; ++i) {
      ++start[static_cast<size_t>(memory->entries[i].key / kKeysPerOwner) + 1];
    }
    for (size_t b = 0; b < bins; ++b) start[b + 1] += start[b];
    ColumnEntry<T>* target = entries_.get() + part->begin;
    for (size_t i = 0; i < count; ++i) {
      const ColumnEntry<T>& entry = memory->entries[i];
      target[start[static_cast<size_t>(entry.key / kKeysPerOwner)]++] = entry;
    }
    start.pop_back();  // Now start[b] is where block b ends.
    part->bin_end = std::move(start);
  }

  // ---- Dense ------------------------------------------------------------------------------------

  void RunDense() {
    const std::vector<std::vector<DensePair>> phases = ListDensePhases(resolved_, tensors_.dense);
    if (phases.empty()) return;
    FindDeltas();
    for (const std::vector<DensePair>& pairs : phases) {
      For(pairs.size(), [&](size_t i, BackwardMemory<T>* memory) {
        const DensePair& pair = pairs[i];
        BackwardHead<T> head = tensors_.Head(pair.sequence, pair.head);
        if (bias_.separate()) {
          head.grad_bias = bias_.Head(SequenceAt(pair.sequence).batch, pair.head);
          head.grad_bias_row_stride = bias_.query_stride();
          head.grad_bias_key_stride = bias_.key_stride();
        }
        DenseGradients(head, pair.first_row, pair.end_row, pair.first_key, pair.end_key, memory);
      });
    }
    const std::vector<size_t> dense = DensePanels();
    For(dense.size(), [&](size_t i, BackwardMemory<T>*) { FinishDenseRows(panels_[dense[i]]); });
  }

  // δ of dense rows.
  void FindDeltas() {
    const std::vector<size_t> dense = DensePanels();
    For(dense.size(), [&](size_t i, BackwardMemory<T>* memory) {
      const BackwardPanel& panel = panels_[dense[i]];
      const SavedPanel<T> saved(layout_, saved_, panel.row, panel.queries);
      if (saved.mean != nullptr) {
        DeltasFromMeans(panel, saved.mean);
      } else {
        DeltasFromSums(panel, memory);
      }
    });
  }

  // From the mean of the values under u, where the forward pass kept it.
  void DeltasFromMeans(const BackwardPanel& panel, const T* mean) {
    const BackwardHead<T>& head = tensors_.Head(panel.sequence, panel.head);
    for (int64_t r = 0; r < panel.queries; ++r, mean += resolved_.value_size) {
      const T* grad = head.grad_output.Row(panel.first_query + r);
      double sum = 0.0;
      for (int64_t e = 0; e < resolved_.value_size; ++e) {
        sum += static_cast<double>(grad[e]) * static_cast<double>(mean[e]);
      }
      tensors_.delta[static_cast<size_t>(panel.row + r)] = sum;
    }
  }

  // From scores and dP, made once more.
  void DeltasFromSums(const BackwardPanel& panel, BackwardMemory<T>* memory) {
    for (int64_t first = 0; first < panel.queries; first += kDenseBlock) {
      const int64_t rows = std::min(kDenseBlock, panel.queries - first);
      double sum_u[kDenseBlock] = {};
      double sum_ug[kDenseBlock] = {};
      DenseSums(tensors_.Head(panel.sequence, panel.head), panel.first_query + first,
                panel.first_query + first + rows, sum_u, sum_ug, memory);
      double* delta = tensors_.delta.data() + panel.row + first;
      for (int64_t r = 0; r < rows; ++r) delta[r] = sum_u[r] > 0.0 ? sum_ug[r] / sum_u[r] : 0.0;
    }
  }

  // Dense rows of grad_query were summed without their factor.
  void FinishDenseRows(const BackwardPanel& panel) {
    if (!tensors_.wants_query()) return;
    const BackwardHead<T>& head = tensors_.Head(panel.sequence, panel.head);
    for (int64_t i = panel.first_query; i < panel.first_query + panel.queries; ++i) {
      if (head.dense[i] == 0) continue;
      T* row = head.grad_query.Row(i);
      if (head.grad_query_scale != nullptr) {
        double sum = 0.0;
        for (int64_t e = 0; e < resolved_.head_size; ++e) {
          sum += static_cast<double>(head.query.Row(i)[e]) * static_cast<double>(row[e]);
        }
        head.grad_query_scale[i] = head.scale * sum;
      }
      for (int64_t e = 0; e < head.query_width; ++e) {
        row[e] = static_cast<T>(head.factor[i] * static_cast<double>(row[e]));
      }
      tensors_.WriteQueryRow(SequenceAt(panel.sequence), panel.head, i, row);
    }
  }

  // ---- Ends -------------------------------------------------------------------------------------

  // Rows whose output is NaN make the gradients of all keys NaN that they see, and of their bias.
  void SpreadNotANumber() {
    constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
    std::vector<std::vector<int32_t>> change(static_cast<size_t>(groups_));
    for (const BackwardPanel& panel : panels_) {
      const SavedRow* rows = layout_.Rows(saved_) + panel.row;
      const Sequence& sequence = SequenceAt(panel.sequence);
      for (int64_t r = 0; r < panel.queries; ++r) {
        if (!rows[r].not_a_number()) continue;
        const int64_t query = panel.first_query + r;
        const int64_t first = sequence.mask.First(query);
        const int64_t end = sequence.mask.End(query);
        if (first >= end) continue;
        auto& counts = change[static_cast<size_t>(panel.group)];
        counts.resize(static_cast<size_t>(sequence.mask.key_length) + 1, 0);
        ++counts[static_cast<size_t>(first)];
        --counts[static_cast<size_t>(end)];
        if (!bias_.wanted()) continue;
        for (int64_t j = first; j < end; ++j) {
          if (tensors_.IsVisible(sequence, j)) {
            bias_.AddOne(sequence.batch, panel.head, query, j, static_cast<double>(kNaN));
          }
        }
      }
    }
    for (int64_t group = 0; group < groups_; ++group) {
      const auto& counts = change[static_cast<size_t>(group)];
      if (counts.empty()) continue;
      const int64_t s = group / resolved_.kv_heads;
      const BackwardHead<T>& head =
          tensors_.Head(s, group % resolved_.kv_heads * (resolved_.heads / resolved_.kv_heads));
      int64_t seen = 0;
      for (int64_t j = 0; j < head.scores.mask.key_length; ++j) {
        seen += counts[static_cast<size_t>(j)];
        if (seen == 0 || !tensors_.IsVisible(SequenceAt(s), j)) continue;
        if (tensors_.grad_key.wanted()) std::fill_n(head.grad_key.Row(j), head.query_width, kNaN);
        if (tensors_.grad_value.wanted())
          std::fill_n(head.grad_value.Row(j), head.value_width, kNaN);
      }
    }
  }

  const ResolvedAttention& resolved_;
  const AttentionGradients& gradients_;
  SavedLayout layout_;
  void* saved_;
  int threads_;
  int64_t groups_;
  std::vector<BackwardMemory<T>> memory_;
  BackwardTensors<T> tensors_;
  std::vector<BackwardPanel> panels_;
  BiasGradient<T> bias_;
  std::vector<KeyRange> ranges_;  // Of each group: keys for which scores are made again.
  std::unique_ptr<ColumnEntry<T>[]> entries_;  // Of a chunk.
  int64_t entries_capacity_ = 0;
  std::atomic<bool> out_of_memory_ = false;
};

template <typename T>
void FillPlan(const AttentionProblem& problem, const ResolvedAttention& resolved,
              const AttentionOptions& options, AttentionPlan* plan) {
  const int64_t width = GetPanelShape<T>().keys_per_block;
  const SavedLayout layout = SavedLayout::Make<T>(resolved, 1, options.support_capacity);
  if (options.save_for_backward) {
    plan->saved_bytes = layout.bytes();
    plan->support_capacity = layout.entries;
  }
  // Copies of inputs and sums of results that are not read and written in place, packed keys and
  // values and, where heads are dense, the query's gradient; the entries of a chunk; numbers a row.
  int64_t elements = 0;
  for (const TensorView* tensor : {&problem.query, &problem.key, &problem.value}) {
    elements += 2 * InputRows<T>::CopyElements(*tensor, width);
  }
  for (const Sequence& sequence : resolved.sequences) {
    elements += resolved.kv_heads * PaddedWidth(sequence.mask.key_length, width) *
                (resolved.head_size + resolved.value_size);
  }
  TensorView output = problem.query;
  output.shape[3] = resolved.value_size;
  elements += InputRows<T>::CopyElements(output, width);
  plan->backward_bytes =
      elements * static_cast<int64_t>(sizeof(T)) +
      std::min(kChunkEntries, layout.entries) * static_cast<int64_t>(sizeof(ColumnEntry<T>)) +
      layout.rows * static_cast<int64_t>(5 * sizeof(double) + 1);
}

template <typename T>
Status RunBackwardAs(const AttentionProblem& problem, const ResolvedAttention& resolved,
                     const AttentionGradients& gradients, const AttentionOptions& options,
                     AttentionBuffer saved) {
  SavedLayout layout = SavedLayout::Make<T>(resolved, 1, options.support_capacity);
  if (!layout.ReadHeader(saved.data)) {
    return BadArgument("saved", "a buffer of other contents",
                       "filled by AttentionForward with save_for_backward, for the same problem "
                       "and options");
  }
  return BackwardRun<T>(problem, resolved, gradients, options, layout, saved.data).Run();
}

}  // namespace

void PlanBackward(const AttentionProblem& problem, const ResolvedAttention& resolved,
                  const AttentionOptions& options, AttentionPlan* plan) {
  if (problem.query.dtype == DType::kFloat64) {
    FillPlan<double>(problem, resolved, options, plan);
  } else {
    FillPlan<float>(problem, resolved, options, plan);
  }
}

Status RunBackward(const AttentionProblem& problem, const ResolvedAttention& resolved,
                   const AttentionGradients& gradients, const AttentionOptions& options,
                   AttentionBuffer saved) {
  if (problem.query.dtype == DType::kFloat64) {
    return RunBackwardAs<double>(problem, resolved, gradients, options, saved);
  }
  return RunBackwardAs<float>(problem, resolved, gradients, options, saved);
}

}  // namespace flash_entmax::cpu
