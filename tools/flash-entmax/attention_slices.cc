#include "attention_slices.h"

#include <algorithm>

namespace flash_entmax::cli {
namespace {

// Rows fewer than this are not worth a call of their own: each call packs all keys again.
constexpr int64_t kMinQueries = 1024;

// Keeps `count` elements of dimension `dim` from `begin` on.
template <typename View>
void Narrow(View& view, int dim, int64_t begin, int64_t count) {
  auto* bytes = static_cast<const char*>(view.data);
  bytes += begin * view.strides[dim] * SizeOf(view.dtype);
  view.data = const_cast<char*>(bytes);
  view.shape[dim] = count;
}

// The same for a view that is broadcast to `full_rank` dimensions, `dim` being one of those.
void NarrowBroadcast(TensorView& view, int full_rank, int dim, int64_t begin, int64_t count) {
  const int own = dim - (full_rank - view.rank);
  if (view && own >= 0 && view.shape[own] != 1) Narrow(view, own, begin, count);
}

// With the queries [begin, begin + count) alone, how many keys keep i + key_length − query_length
// what it was. The keys left out are after the last query's position.
int64_t KeysOfQueries(const AttentionProblem& problem, int64_t begin, int64_t count) {
  if (!problem.causal) return problem.key.shape[2];
  return std::max<int64_t>(1, begin + count + problem.key.shape[2] - problem.query.shape[2]);
}

bool CanCutQueries(const AttentionProblem& problem) {
  if (problem.key_lengths || problem.cu_query) return false;
  // Early causal queries may see no key at all, and no part may be without keys.
  if (problem.causal) return problem.key.shape[2] >= problem.query.shape[2];
  const bool uses_positions =
      problem.alibi_slopes || problem.window_left.has_value() || problem.window_right.has_value();
  return !uses_positions;
}

}  // namespace

std::vector<AttentionSlice> CutAttention(const AttentionProblem& problem, int64_t max_pairs) {
  const int64_t batch = problem.query.shape[0];
  const int64_t heads = problem.query.shape[1];
  const int64_t queries = problem.query.shape[2];
  const int64_t group = heads / problem.key.shape[1];
  const int64_t pairs = std::max<int64_t>(1, queries * problem.key.shape[2]);  // Of one head.

  int64_t batch_step = 1;
  int64_t head_step = heads;
  int64_t query_step = queries;
  if (pairs * heads <= max_pairs) {
    batch_step = std::clamp<int64_t>(max_pairs / (pairs * heads), 1, batch);
  } else if (pairs * group <= max_pairs || !CanCutQueries(problem)) {
    head_step = std::clamp<int64_t>(max_pairs / (pairs * group), 1, heads / group) * group;
  } else {
    head_step = 1;
    query_step = std::clamp<int64_t>(max_pairs / std::max<int64_t>(1, problem.key.shape[2]),
                                     std::min(kMinQueries, queries), queries);
  }
  std::vector<AttentionSlice> slices;
  for (int64_t b = 0; b < batch; b += batch_step) {
    for (int64_t h = 0; h < heads; h += head_step) {
      for (int64_t q = 0; q < queries; q += query_step) {
        slices.push_back({b, std::min(batch_step, batch - b), h, std::min(head_step, heads - h), q,
                          std::min(query_step, queries - q)});
      }
    }
  }
  return slices;
}

AttentionProblem SliceProblem(const AttentionProblem& problem, const AttentionSlice& slice) {
  const int64_t group = problem.query.shape[1] / problem.key.shape[1];
  const int64_t kv_begin = slice.head_begin / group;
  const int64_t kv_count = std::max<int64_t>(1, slice.head_count / group);
  const int64_t keys = KeysOfQueries(problem, slice.query_begin, slice.query_count);
  AttentionProblem part = problem;
  Narrow(part.query, 0, slice.batch_begin, slice.batch_count);
  Narrow(part.query, 1, slice.head_begin, slice.head_count);
  Narrow(part.query, 2, slice.query_begin, slice.query_count);
  // Without a scale of its own, the size of the head decides, which no slice changes.
  for (TensorView* view : {&part.key, &part.value}) {
    Narrow(*view, 0, slice.batch_begin, slice.batch_count);
    Narrow(*view, 1, kv_begin, kv_count);
    Narrow(*view, 2, 0, std::min(keys, problem.key.shape[2]));
  }
  NarrowBroadcast(part.alpha_per_head, 1, 0, slice.head_begin, slice.head_count);
  NarrowBroadcast(part.alibi_slopes, 1, 0, slice.head_begin, slice.head_count);
  NarrowBroadcast(part.query_scale, 3, 0, slice.batch_begin, slice.batch_count);
  NarrowBroadcast(part.query_scale, 3, 1, slice.head_begin, slice.head_count);
  NarrowBroadcast(part.query_scale, 3, 2, slice.query_begin, slice.query_count);
  NarrowBroadcast(part.key_lengths, 1, 0, slice.batch_begin, slice.batch_count);
  NarrowBroadcast(part.key_mask, 2, 0, slice.batch_begin, slice.batch_count);
  NarrowBroadcast(part.key_mask, 2, 1, 0, part.key.shape[2]);
  NarrowBroadcast(part.bias, 4, 0, slice.batch_begin, slice.batch_count);
  NarrowBroadcast(part.bias, 4, 1, slice.head_begin, slice.head_count);
  NarrowBroadcast(part.bias, 4, 2, slice.query_begin, slice.query_count);
  NarrowBroadcast(part.bias, 4, 3, 0, part.key.shape[2]);
  return part;
}

AttentionOutputs SliceOutputs(const AttentionOutputs& outputs, const AttentionSlice& slice) {
  AttentionOutputs part;
  part.output = outputs.output;
  part.threshold = outputs.threshold;
  for (MutableTensorView* view : {&part.output, &part.threshold}) {
    if (!*view) continue;
    Narrow(*view, 0, slice.batch_begin, slice.batch_count);
    Narrow(*view, 1, slice.head_begin, slice.head_count);
    Narrow(*view, 2, slice.query_begin, slice.query_count);
  }
  return part;
}

void AppendSupport(const AttentionSupport& part, AttentionSupport& whole) {
  if (whole.row_offsets.empty()) whole.row_offsets.push_back(0);
  const int64_t base = whole.row_offsets.back();
  for (size_t row = 1; row < part.row_offsets.size(); ++row) {
    whole.row_offsets.push_back(base + part.row_offsets[row]);
  }
  whole.key_index.insert(whole.key_index.end(), part.key_index.begin(), part.key_index.end());
  whole.probability.insert(whole.probability.end(), part.probability.begin(),
                           part.probability.end());
}

}  // namespace flash_entmax::cli
