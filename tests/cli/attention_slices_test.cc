#include "attention_slices.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "math/element.h"
#include "owned_tensor.h"
#include "reference/attention_reference.h"
#include "visible_pairs.h"

namespace flash_entmax::cli {
namespace {

class SlicesTest : public ::testing::Test {
 protected:
  TensorView Make(const std::vector<int64_t>& shape) {
    auto tensor = OwnedTensor::Allocate("tensor", DType::kFloat64, shape);
    for (int64_t i = 0; i < tensor->view().num_elements(); ++i) {
      WriteElement(tensor->mutable_view(), i, std::normal_distribution<double>()(random_));
    }
    memory_.push_back(std::move(tensor).value());
    return memory_.back().view();
  }

  AttentionProblem MakeProblem(int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries,
                               int64_t keys) {
    AttentionProblem problem;
    problem.query = Make({batch, heads, queries, 4});
    problem.key = Make({batch, kv_heads, keys, 4});
    problem.value = Make({batch, kv_heads, keys, 3});
    return problem;
  }

  // Every slice alone must give the rows that the whole problem has there, in order.
  void ExpectSlicesEqualWhole(const AttentionProblem& problem, int64_t max_pairs,
                              size_t min_slices) {
    ASSERT_TRUE(CheckAttention(problem).ok()) << CheckAttention(problem).message();
    const std::vector<AttentionSlice> slices = CutAttention(problem, max_pairs);
    EXPECT_GE(slices.size(), min_slices);
    const reference::AttentionResult whole = reference::AttentionForward(problem);
    auto memory = OwnedTensor::Allocate(
        "output", DType::kFloat64,
        {problem.query.shape[0], problem.query.shape[1], problem.query.shape[2], 3});
    AttentionOutputs outputs;
    outputs.output = memory->mutable_view();
    AttentionSupport support;
    for (const AttentionSlice& slice : slices) {
      AttentionSupport part_support;
      AttentionOutputs part = SliceOutputs(outputs, slice);
      part.support = &part_support;
      const Status status = AttentionForward(SliceProblem(problem, slice), part);
      ASSERT_TRUE(status.ok()) << status.message();
      AppendSupport(part_support, support);
    }
    for (size_t i = 0; i < whole.output.size(); ++i) {
      ASSERT_NEAR(ReadElement(memory->view(), static_cast<int64_t>(i)), whole.output[i], 1e-12);
    }
    ASSERT_EQ(support.row_offsets.size(), whole.threshold.size() + 1);
    const int64_t keys = problem.key.shape[2];
    for (size_t row = 0; row < whole.threshold.size(); ++row) {
      double sum = 0.0;
      for (int64_t e = support.row_offsets[row]; e < support.row_offsets[row + 1]; ++e) {
        const auto entry = static_cast<size_t>(e);
        const size_t key =
            row * static_cast<size_t>(keys) + static_cast<size_t>(support.key_index[entry]);
        const auto p = static_cast<double>(support.probability[entry]);
        EXPECT_NEAR(p, whole.probability[key], 1e-6);
        sum += p;
      }
      EXPECT_TRUE(std::abs(sum - 1.0) < 1e-5 ||
                  support.row_offsets[row] == support.row_offsets[row + 1]);
    }
  }

  std::mt19937_64 random_{1};
  std::vector<OwnedTensor> memory_;
};

TEST_F(SlicesTest, CutBatchEntriesAndHeads) {
  AttentionProblem problem = MakeProblem(3, 4, 2, 5, 7);
  problem.bias = Make({3, 1, 5, 7});
  problem.query_scale = Make({4, 1});
  for (const int64_t max_pairs : {1, 35, 70, 140, 280, 100000}) {
    ExpectSlicesEqualWhole(problem, max_pairs, max_pairs == 100000 ? 1 : 2);
  }
}

TEST_F(SlicesTest, CutQueries) {
  AttentionProblem problem = MakeProblem(1, 2, 1, 1500, 9);
  problem.bias = Make({1500, 9});
  ExpectSlicesEqualWhole(problem, 1, 4);
}

TEST_F(SlicesTest, CutCausalQueries) {
  AttentionProblem problem = MakeProblem(1, 1, 1, 1100, 1200);
  problem.causal = true;
  problem.window_left = 30;
  const double slope = 0.5;
  problem.alibi_slopes = TensorView::Contiguous(&slope, DType::kFloat64, {1});
  ExpectSlicesEqualWhole(problem, 1, 2);
}

TEST_F(SlicesTest, DoNotCutQueriesWhosePositionWouldMove) {
  AttentionProblem problem = MakeProblem(2, 1, 1, 1100, 9);
  problem.window_left = 3;
  ExpectSlicesEqualWhole(problem, 1, 2);
  EXPECT_EQ(CutAttention(problem, 1).size(), 2u);
  problem.window_left.reset();
  const int64_t lengths[] = {4, 9};
  problem.key_lengths = TensorView::Contiguous(lengths, DType::kInt64, {2});
  problem.causal = true;
  ExpectSlicesEqualWhole(problem, 1, 2);
}

// Pairs that the reference gives a finite score.
int64_t CountPairs(const AttentionProblem& problem) {
  int64_t pairs = 0;
  for (int64_t b = 0; b < problem.query.shape[0]; ++b) {
    for (int64_t i = 0; i < problem.query.shape[2]; ++i) {
      for (const double s : reference::AttentionForwardRow(problem, b, 0, i).score) {
        if (std::isfinite(s)) ++pairs;
      }
    }
  }
  return pairs;
}

TEST_F(SlicesTest, VisiblePairsCountsWhatMasksLeave) {
  for (const int64_t keys : {1, 6, 20}) {
    AttentionProblem problem = MakeProblem(2, 1, 1, 9, keys);
    EXPECT_EQ(VisiblePairs(problem), CountPairs(problem));
    for (const int64_t left : {int64_t{-1}, int64_t{0}, int64_t{3}, INT64_MAX}) {
      for (const int64_t right : {int64_t{-1}, int64_t{0}, int64_t{2}, INT64_MAX}) {
        for (const bool causal : {false, true}) {
          problem.causal = causal;
          problem.window_left.reset();
          problem.window_right.reset();
          if (left >= 0) problem.window_left = left;
          if (right >= 0) problem.window_right = right;
          EXPECT_EQ(VisiblePairs(problem), CountPairs(problem)) << left << " " << right;
        }
      }
    }
    const int32_t lengths[] = {0, static_cast<int32_t>(keys)};
    problem.key_lengths = TensorView::Contiguous(lengths, DType::kInt32, {2});
    std::vector<uint8_t> mask(static_cast<size_t>(keys), 1);
    mask[0] = 0;
    problem.key_mask = TensorView::Contiguous(mask.data(), DType::kUInt8, {keys});
    EXPECT_EQ(VisiblePairs(problem), CountPairs(problem));
  }
}

}  // namespace
}  // namespace flash_entmax::cli
