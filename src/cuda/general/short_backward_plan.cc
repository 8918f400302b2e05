#include "general/short_backward_plan.h"

#include <algorithm>

namespace flash_entmax::cuda {
namespace {

// What a block may have on devices of compute capability 8.6. Two such blocks fit on a Hopper
// multiprocessor, four of 90 causal rows.
constexpr int kMostShared = 99 * 1024;
constexpr int kMostRows = 144;
constexpr int kMostColumns = 32;

int Tiles(int rows) { return (rows + 15) / 16; }

// Tiles of keys that the 16 queries from `first` on see, at most.
int TilesSeen(const GeneralProblem& problem, int first) {
  const int last = std::min(first + 16, problem.queries) - 1;
  const int shift = problem.keys - problem.queries;
  const int left = problem.window_left;
  const int right = problem.causal ? std::min(0, problem.window_right) : problem.window_right;
  // The last key moves down with a key length.
  const int end = std::min(problem.keys, last + shift + right + 1);
  if (end <= 0) return 0;
  if (problem.key_lengths == nullptr) {
    const int begin = std::max(0, first + shift - left);
    return begin < end ? Tiles(end) - begin / 16 : 0;
  }
  // So does the first one, to anywhere in a tile.
  const int64_t width = int64_t{left} + right + 16;
  return static_cast<int>(std::clamp<int64_t>((width + 15) / 16 + 1, 0, Tiles(end)));
}

}  // namespace

ShortBackwardPlan ShortBackwardPlan::Of(const GeneralProblem& problem, int element_bytes,
                                        bool alpha_gradient) {
  if (element_bytes != 2 || std::max(problem.head_dim, problem.value_dim) > kMostColumns ||
      std::max(problem.queries, problem.keys) > kMostRows || problem.group != 1 ||
      problem.cu_query != nullptr || problem.softcap > 0.0f || alpha_gradient) {
    return {};
  }
  ShortBackwardPlan plan;
  plan.query_rows = 16 * Tiles(problem.queries);
  plan.key_rows = 16 * Tiles(problem.keys);
  for (int first = 0; first < problem.queries; first += 16) {
    plan.pair_tiles += TilesSeen(problem, first);
  }
  return plan.Bytes() <= kMostShared ? plan : ShortBackwardPlan();
}

}  // namespace flash_entmax::cuda
