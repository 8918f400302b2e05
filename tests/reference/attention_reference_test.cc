// The reference attention: which keys each query sees, and what the score is made of.

#include "reference/attention_reference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "reference/mapping_reference.h"
#include "testing/attention_case.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace flash_entmax {
namespace {

using reference::AttentionForward;
using reference::AttentionForwardRow;
using reference::AttentionResult;
using reference::AttentionRow;
using testing::AttentionCase;
using testing::AttentionFeatures;
using testing::AttentionShape;
using testing::Error;
using testing::Index;
using testing::MaxError;
using testing::Random;
using testing::SeedMessage;
using testing::StoredTensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

StoredTensor Tensor(DType dtype, const Index& shape, const std::vector<double>& values) {
  StoredTensor tensor(dtype, shape);
  tensor.SetValues(values);
  return tensor;
}

// One batch entry and head, head size and value size 1. Query and key hold numbers, value j is j.
struct Line {
  Line(int64_t queries, int64_t keys)
      : query(DType::kFloat64, {1, 1, queries, 1}),
        key(DType::kFloat64, {1, 1, keys, 1}),
        value(DType::kFloat64, {1, 1, keys, 1}) {
    query.SetValues(std::vector<double>(queries, 1.0));
    key.SetValues(std::vector<double>(keys, 0.0));
    for (int64_t j = 0; j < keys; ++j) value.Set({0, 0, j, 0}, static_cast<double>(j));
    problem.query = query.view();
    problem.key = key.view();
    problem.value = value.view();
    problem.scale = 1.0;
  }

  // One string a query: 'x' where the score is finite, '.' where the key is hidden.
  std::vector<std::string> Visible() const {
    std::vector<std::string> rows;
    for (int64_t i = 0; i < problem.query.shape[2]; ++i) {
      std::string text;
      for (double score : AttentionForwardRow(problem, 0, 0, i).score) {
        text += score == -kInfinity ? '.' : 'x';
      }
      rows.push_back(text);
    }
    return rows;
  }

  StoredTensor query, key, value;
  AttentionProblem problem;
};

using Rows = std::vector<std::string>;

TEST(AttentionReference, CausalIsAlignedAtTheBottomRight) {
  Line line(3, 5);
  line.problem.causal = true;
  EXPECT_EQ(line.Visible(), (Rows{"xxx..", "xxxx.", "xxxxx"}));
  Line longer(4, 2);  // The first two queries come before every key.
  longer.problem.causal = true;
  EXPECT_EQ(longer.Visible(), (Rows{"..", "..", "x.", "xx"}));
}

TEST(AttentionReference, Window) {
  Line line(4, 6);  // i' = i + 2
  line.problem.window_left = 1;
  line.problem.window_right = 2;
  EXPECT_EQ(line.Visible(), (Rows{".xxxx.", "..xxxx", "...xxx", "....xx"}));
  line.problem.window_right = std::nullopt;
  EXPECT_EQ(line.Visible(), (Rows{".xxxxx", "..xxxx", "...xxx", "....xx"}));
  line.problem.window_left = std::nullopt;
  line.problem.window_right = 0;  // The same as causal.
  EXPECT_EQ(line.Visible(), (Rows{"xxx...", "xxxx..", "xxxxx.", "xxxxxx"}));
  line.problem.window_left = 0;
  EXPECT_EQ(line.Visible(), (Rows{"..x...", "...x..", "....x.", ".....x"}));
  line.problem.window_left = std::numeric_limits<int64_t>::max();
  line.problem.window_right = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(line.Visible(), (Rows(4, "xxxxxx")));
}

TEST(AttentionReference, KeyLengthsMoveTheDiagonal) {
  Line line(3, 5);
  for (DType dtype : {DType::kInt32, DType::kInt64}) {
    const StoredTensor lengths = Tensor(dtype, {1}, {4.0});
    line.problem.key_lengths = lengths.view();
    line.problem.causal = false;
    EXPECT_EQ(line.Visible(), (Rows(3, "xxxx.")));
    line.problem.causal = true;
    EXPECT_EQ(line.Visible(), (Rows{"xx...", "xxx..", "xxxx."}));
  }
}

TEST(AttentionReference, KeyMaskAndInfiniteBiasHideKeys) {
  Line line(2, 4);
  const StoredTensor mask = Tensor(DType::kUInt8, {4}, {1.0, 0.0, 255.0, 1.0});
  line.problem.key_mask = mask.view();
  EXPECT_EQ(line.Visible(), (Rows{"x.xx", "x.xx"}));
  const StoredTensor bias = Tensor(DType::kFloat32, {2, 1}, {0.0, -kInfinity});
  line.problem.bias = bias.view();
  EXPECT_EQ(line.Visible(), (Rows{"x.xx", "...."}));
}

TEST(AttentionReference, PackedSequencesAreSeparate) {
  // Sequences of (1, 2), (0, 1), (2, 0) and (3, 2) queries and keys.
  Line line(6, 5);
  const StoredTensor cu_query = Tensor(DType::kInt32, {5}, {0.0, 1.0, 1.0, 3.0, 6.0});
  const StoredTensor cu_key = Tensor(DType::kInt32, {5}, {0.0, 2.0, 3.0, 3.0, 5.0});
  line.problem.cu_query = cu_query.view();
  line.problem.cu_key = cu_key.view();
  EXPECT_EQ(line.Visible(), (Rows{"xx", "", "", "xx", "xx", "xx"}));
  line.problem.causal = true;
  EXPECT_EQ(line.Visible(), (Rows{"xx", "", "", "..", "x.", "xx"}));
  // Probabilities lie at the packed position of the key.
  const AttentionResult result = AttentionForward(line.problem);
  const std::vector<double> want = {0.5, 0.5, 0.0, 0.0, 0.0,  //
                                    0.0, 0.0, 0.0, 0.0, 0.0,  //
                                    0.0, 0.0, 0.0, 0.0, 0.0,  //
                                    0.0, 0.0, 0.0, 0.0, 0.0,  //
                                    0.0, 0.0, 0.0, 1.0, 0.0,  //
                                    0.0, 0.0, 0.0, 0.5, 0.5};
  EXPECT_LE(MaxError(result.probability, want), 1e-15);
  EXPECT_LE(MaxError(result.output, {0.5, 0.0, 0.0, 0.0, 3.0, 3.5}), 1e-14);
  EXPECT_TRUE(std::isnan(result.threshold[1]));
  EXPECT_TRUE(std::isnan(result.threshold[3]));
  EXPECT_FALSE(std::isnan(result.threshold[4]));
}

TEST(AttentionReference, ScoreIsMadeOfItsParts) {
  Line line(2, 3);  // i' = i + 1
  line.query.SetValues({2.0, -3.0});
  line.key.SetValues({1.0, 0.5, -1.0});
  line.problem.scale = 0.5;
  const auto scores = [&](int64_t i) { return AttentionForwardRow(line.problem, 0, 0, i).score; };
  EXPECT_LE(MaxError(scores(0), {1.0, 0.5, -1.0}), 0.0);

  const StoredTensor query_scale = Tensor(DType::kFloat32, {2}, {3.0, 0.25});
  line.problem.query_scale = query_scale.view();
  EXPECT_LE(MaxError(scores(0), {3.0, 1.5, -3.0}), 0.0);
  EXPECT_LE(MaxError(scores(1), {-0.375, -0.1875, 0.375}), 0.0);

  line.problem.softcap = 2.0;
  const auto cap = [](double x) { return 2.0 * std::tanh(x / 2.0); };
  EXPECT_LE(MaxError(scores(0), {cap(3.0), cap(1.5), cap(-3.0)}), 1e-15);

  const StoredTensor slopes = Tensor(DType::kFloat64, {1}, {0.75});
  line.problem.alibi_slopes = slopes.view();
  EXPECT_LE(MaxError(scores(0), {cap(3.0) - 0.75, cap(1.5), cap(-3.0) - 0.75}), 1e-15);
  EXPECT_LE(MaxError(scores(1), {cap(-0.375) - 1.5, cap(-0.1875) - 0.75, cap(0.375)}), 1e-15);

  const StoredTensor bias = Tensor(DType::kFloat64, {1, 2, 3}, {1.0, 2.0, 3.0, 4.0, 5.0, 6.0});
  line.problem.bias = bias.view();
  EXPECT_LE(MaxError(scores(0), {cap(3.0) + 0.25, cap(1.5) + 2.0, cap(-3.0) + 2.25}), 1e-15);
  EXPECT_LE(MaxError(scores(1), {cap(-0.375) + 2.5, cap(-0.1875) + 4.25, cap(0.375) + 6.0}), 1e-15);
}

TEST(AttentionReference, ScaleDefaultsToOneOverTheRootOfTheHeadSize) {
  const StoredTensor query = Tensor(DType::kFloat32, {1, 1, 1, 4}, {1.0, 2.0, 3.0, 4.0});
  const StoredTensor key = Tensor(DType::kFloat32, {1, 1, 1, 4}, {1.0, 1.0, 1.0, 1.0});
  AttentionProblem problem;
  problem.query = query.view();
  problem.key = key.view();
  problem.value = key.view();
  EXPECT_EQ(AttentionForwardRow(problem, 0, 0, 0).score[0], 5.0);
}

TEST(AttentionReference, HeadsShareKeysInGroupsAndHaveTheirOwnAlpha) {
  SCOPED_TRACE(SeedMessage());
  Random random(50);
  const AttentionShape shape{.batch = 2, .heads = 6, .kv_heads = 2};
  AttentionCase c(shape, {.alpha_per_head = true}, DType::kFloat64, 2.0, &random, &random);
  const AttentionProblem problem = c.problem();
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t h = 0; h < 6; ++h) {
      for (int64_t i = 0; i < c.shape().queries; ++i) {
        std::vector<double> scores;
        for (int64_t j = 0; j < c.shape().keys; ++j) {
          double dot = 0.0;
          for (int64_t x = 0; x < c.shape().head_size; ++x) {
            dot += c.query.Get({b, h, i, x}) * c.key.Get({b, h / 3, j, x});
          }
          scores.push_back(dot / std::sqrt(3.0));
        }
        const std::vector<double> p =
            reference::MapRow(scores, MappingKind::kEntmax, c.alpha_per_head.Get({h})).probability;
        const AttentionRow row = AttentionForwardRow(problem, b, h, i);
        EXPECT_LE(MaxError(row.probability, p), 1e-14);
        for (int64_t x = 0; x < c.shape().value_size; ++x) {
          double want = 0.0;
          for (int64_t j = 0; j < c.shape().keys; ++j) want += p[j] * c.value.Get({b, h / 3, j, x});
          EXPECT_LE(Error(row.output[x], want), 1e-14);
        }
      }
    }
  }
}

TEST(AttentionReference, NanStaysInItsRow) {
  SCOPED_TRACE(SeedMessage());
  Random random(51);
  const AttentionShape shape{.batch = 1, .heads = 1, .queries = 4, .keys = 4};
  for (bool in_key : {false, true}) {
    AttentionCase c(shape, {.causal = true}, DType::kFloat32, 1.5, &random);
    // Key 2 is seen by queries 2 and 3 only.
    (in_key ? c.key : c.query).Set({0, 0, 2, 1}, std::nan(""));
    const AttentionResult result = AttentionForward(c.problem());
    for (int64_t i = 0; i < 4; ++i) {
      const bool bad = in_key ? i >= 2 : i == 2;
      EXPECT_EQ(std::isnan(result.output[2 * i]), bad) << i;
      EXPECT_EQ(std::isnan(result.output[2 * i + 1]), bad) << i;
      EXPECT_EQ(std::isnan(result.threshold[i]), bad) << i;
    }
  }
}

TEST(AttentionReference, NanValueMattersWhereItsProbabilityIsPositive) {
  Line line(2, 3);
  line.problem.alpha = 2.0;
  line.query.SetValues({1.0, 0.1});
  line.key.SetValues({0.0, 2.0, 0.0});
  line.value.Set({0, 0, 0, 0}, std::nan(""));
  const AttentionResult result = AttentionForward(line.problem);
  EXPECT_EQ(result.output[0], 1.0);  // Key 1 has it all.
  EXPECT_TRUE(std::isnan(result.output[1]));
}

TEST(AttentionReference, NoKeysOrNoQueries) {
  Line none(3, 0);
  const AttentionResult result = AttentionForward(none.problem);
  EXPECT_EQ(result.output, (std::vector<double>(3, 0.0)));
  for (double threshold : result.threshold) EXPECT_TRUE(std::isnan(threshold));
  EXPECT_TRUE(result.probability.empty());
  Line empty(0, 3);
  EXPECT_TRUE(AttentionForward(empty.problem).output.empty());
}

}  // namespace
}  // namespace flash_entmax
