#include "general/short_backward_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <utility>

#include "testing/random.h"

namespace flash_entmax::cuda {
namespace {

GeneralProblem Square(int rows, bool causal) {
  GeneralProblem problem;
  problem.queries = problem.keys = problem.longest_query = problem.longest_key = rows;
  problem.head_dim = problem.value_dim = 32;
  problem.causal = causal;
  return problem;
}

// Pairs of tiles of 16 with a pair that is visible, of a sequence with so many keys.
int CountTiles(const GeneralProblem& problem, int keys) {
  std::set<std::pair<int, int>> tiles;
  for (int first = 0; first < problem.queries; first += 16) {
    int lowest = keys, highest = -1;
    for (int i = first; i < std::min(first + 16, problem.queries); ++i) {
      const int position = i + keys - problem.queries;
      for (int j = 0; j < keys; ++j) {
        if (j < position - problem.window_left || j > position + problem.window_right ||
            (problem.causal && j > position)) {
          continue;
        }
        lowest = std::min(lowest, j);
        highest = std::max(highest, j);
      }
    }
    for (int j = lowest; j <= highest; ++j) tiles.insert({first, j / 16});
  }
  return static_cast<int>(tiles.size());
}

TEST(ShortBackwardPlanTest, CountsTilesThatSeeEachOther) {
  SCOPED_TRACE(testing::SeedMessage());
  testing::Random random;
  const int length = 7;
  const auto any = [&](int low, int high) { return static_cast<int>(random.Integer(low, high)); };
  for (int round = 0; round < 2000; ++round) {
    GeneralProblem problem = Square(1, any(0, 1) == 1);
    problem.queries = any(1, 100);
    problem.keys = any(1, 100);
    if (any(0, 1)) problem.window_left = any(0, 110);
    if (any(0, 1)) problem.window_right = any(0, 110);
    const bool lengths = any(0, 1) == 1;
    if (lengths) problem.key_lengths = &length;  // on the device: not read
    const ShortBackwardPlan plan = ShortBackwardPlan::Of(problem, 2, false);
    ASSERT_EQ(plan.query_rows, (problem.queries + 15) / 16 * 16);
    ASSERT_EQ(plan.key_rows, (problem.keys + 15) / 16 * 16);
    for (int keys = lengths ? 0 : problem.keys; keys <= problem.keys; ++keys) {
      const int tiles = CountTiles(problem, keys);
      ASSERT_GE(plan.pair_tiles, tiles) << problem.queries << " x " << keys;
      if (!lengths) {
        ASSERT_EQ(plan.pair_tiles, tiles) << problem.queries << " x " << keys;
      }
    }
  }
}

TEST(ShortBackwardPlanTest, TakesWhatFits) {
  const auto takes = [](const GeneralProblem& problem, int bytes = 2, bool alpha = false) {
    return ShortBackwardPlan::Of(problem, bytes, alpha).query_rows > 0;
  };
  for (const int rows : {1, 16, 90, 112}) {
    EXPECT_TRUE(takes(Square(rows, true))) << rows;
    EXPECT_TRUE(takes(Square(rows, false))) << rows;
  }
  EXPECT_TRUE(takes(Square(144, true)));
  EXPECT_FALSE(takes(Square(144, false)));  // 81 pairs of tiles are too many
  EXPECT_FALSE(takes(Square(145, true)));
  // Four blocks of the most common size have room on a multiprocessor of compute capability 9.0.
  EXPECT_LE(4 * (ShortBackwardPlan::Of(Square(90, true), 2, false).Bytes() + 1024), 228 * 1024);

  const GeneralProblem plain = Square(90, true);
  EXPECT_FALSE(takes(plain, 4));
  EXPECT_FALSE(takes(plain, 2, true));
  const int lengths[] = {0, 90};
  for (const auto& change :
       {+[](GeneralProblem* p) { p->head_dim = 33; }, +[](GeneralProblem* p) { p->value_dim = 64; },
        +[](GeneralProblem* p) { p->softcap = 5.0f; },
        +[](GeneralProblem* p) { p->heads = p->group = 2; }}) {
    GeneralProblem problem = plain;
    change(&problem);
    EXPECT_FALSE(takes(problem));
  }
  GeneralProblem packed = plain;
  packed.cu_query = packed.cu_key = lengths;
  EXPECT_FALSE(takes(packed));
}

}  // namespace
}  // namespace flash_entmax::cuda
