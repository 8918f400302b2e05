#include "visible_pairs.h"

#include <algorithm>
#include <vector>

#include "math/element.h"

namespace flash_entmax::cli {
namespace {

int64_t ReadInteger(const TensorView& tensor, int64_t index) {
  return static_cast<int64_t>(ReadElement(tensor, index * tensor.strides[0]));
}

// unmasked[j] counts the keys before j that the mask leaves, for j up to `keys`.
std::vector<int64_t> CountUnmasked(const AttentionProblem& problem, int64_t batch, int64_t keys) {
  const TensorView& mask = problem.key_mask;
  std::vector<int64_t> unmasked(static_cast<size_t>(keys) + 1);
  for (int64_t j = 0; j < keys; ++j) {
    bool seen = true;
    if (mask) {
      int64_t offset = 0;
      const int last = mask.rank - 1;
      if (last >= 0 && mask.shape[last] != 1) offset += j * mask.strides[last];
      if (last >= 1 && mask.shape[last - 1] != 1) offset += batch * mask.strides[last - 1];
      seen = ReadElement(mask, offset) != 0.0;
    }
    unmasked[static_cast<size_t>(j) + 1] = unmasked[static_cast<size_t>(j)] + (seen ? 1 : 0);
  }
  return unmasked;
}

// Pairs of one sequence.
int64_t PairsOf(const AttentionProblem& problem, int64_t queries, int64_t keys,
                const std::vector<int64_t>& unmasked) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t position = i + keys - queries;
    int64_t begin = 0;
    int64_t end = keys;
    // Windows may be as large as their type allows, so they are compared, not added.
    if (problem.window_left.has_value() && *problem.window_left < position) {
      begin = position - *problem.window_left;
    }
    if (problem.causal) {
      end = std::min(end, position + 1);
    }
    if (problem.window_right.has_value() && *problem.window_right < keys - position) {
      end = std::min(end, position + *problem.window_right + 1);
    }
    begin = std::min(begin, keys);
    if (begin < end) {
      pairs += unmasked[static_cast<size_t>(end)] - unmasked[static_cast<size_t>(begin)];
    }
  }
  return pairs;
}

}  // namespace

int64_t VisiblePairs(const AttentionProblem& problem) {
  int64_t pairs = 0;
  if (problem.cu_query) {
    for (int64_t b = 0; b + 1 < problem.cu_query.shape[0]; ++b) {
      const int64_t queries =
          ReadInteger(problem.cu_query, b + 1) - ReadInteger(problem.cu_query, b);
      const int64_t keys = ReadInteger(problem.cu_key, b + 1) - ReadInteger(problem.cu_key, b);
      pairs += PairsOf(problem, queries, keys, CountUnmasked(problem, 0, keys));
    }
    return pairs;
  }
  for (int64_t b = 0; b < problem.query.shape[0]; ++b) {
    const int64_t keys =
        problem.key_lengths ? ReadInteger(problem.key_lengths, b) : problem.key.shape[2];
    pairs += PairsOf(problem, problem.query.shape[2], keys, CountUnmasked(problem, b, keys));
  }
  return pairs;
}

}  // namespace flash_entmax::cli
