// MappingForward, MappingBackward and MappingSupport against the reference over a fixed matrix of
// kinds, α, types, lengths and memory orders; and the rows that are special.

#include "flash_entmax/mapping.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "testing/mapping_case.h"
#include "testing/status.h"

namespace flash_entmax {
namespace {

using testing::BackwardDisagreement;
using testing::FloatingTypes;
using testing::ForwardDisagreement;
using testing::Index;
using testing::IsOk;
using testing::MappingCase;
using testing::MappingProblem;
using testing::StoredTensor;
using testing::TestAlphas;
using testing::ThresholdDisagreement;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Forward, threshold and backward of one case.
std::string Disagreement(const MappingCase& c, MappingProblem* problem) {
  for (const std::string& text :
       {ForwardDisagreement(c, problem), ThresholdDisagreement(c, *problem),
        BackwardDisagreement(c, problem)}) {
    if (!text.empty()) return text;
  }
  return "";
}

void ExpectAgreement(const MappingCase& c) {
  MappingProblem problem(c);
  const std::string disagreement = Disagreement(c, &problem);
  EXPECT_TRUE(disagreement.empty()) << c << '\n' << disagreement;
}

// Calls `check` for every kind with every α that it allows, and for a few budgets.
template <typename Check>
void ForEveryKind(const Check& check) {
  MappingCase c;
  for (double alpha : TestAlphas()) {
    c.alpha = alpha;
    c.kind = MappingKind::kEntmax;
    check(c);
    c.kind = MappingKind::kNormmax;
    if (alpha >= 1.0001) check(c);
  }
  c.kind = MappingKind::kBudget;
  for (double budget : {0.5, 1.0, 1.75, 3.0}) {
    c.budget = budget;
    check(c);
  }
}

TEST(Mapping, EveryKindAndTypeAgreesWithTheReference) {
  ForEveryKind([](MappingCase c) {
    for (DType dtype : FloatingTypes()) {
      for (double spread : {0.1, 1.0, 8.0}) {
        c.dtype = dtype;
        c.spread = spread;
        c.shape = {6, 50};
        c.stream = 100;
        c.threshold_dtype = spread < 1.0 ? DType::kFloat32 : DType::kFloat64;
        ExpectAgreement(c);
        c.ties = true;
        c.masked = true;
        c.strided = true;
        ExpectAgreement(c);
        c.ties = c.masked = c.strided = false;
      }
    }
  });
}

// Lengths around the widths of vectors and the sizes of buffers.
TEST(Mapping, EveryLengthAgreesWithTheReference) {
  std::vector<int64_t> lengths = {0,   1000, 1023, 1024, 1025, 4095, 4097, 127,
                                  128, 129,  255,  256,  257,  511,  513};
  for (int64_t n = 1; n <= 70; ++n) lengths.push_back(n);
  for (int64_t length : lengths) {
    for (double alpha : {0.8, 1.0, 1.25, 1.5, 2.0, 2.5}) {
      for (DType dtype : {DType::kFloat32, DType::kFloat64}) {
        MappingCase c;
        c.alpha = alpha;
        c.dtype = dtype;
        c.shape = {2, length};
        c.stream = static_cast<uint64_t>(length);
        ExpectAgreement(c);
      }
    }
    MappingCase budget;
    budget.kind = MappingKind::kBudget;
    budget.budget = 0.3 * static_cast<double>(std::max<int64_t>(length, 1));
    budget.shape = {2, length};
    ExpectAgreement(budget);
  }
}

TEST(Mapping, EveryDimensionOfEveryRank) {
  const Index sizes = {2, 3, 1, 4, 2, 1, 3, 2};
  for (int rank = 1; rank <= kMaxRank; ++rank) {
    for (int dim = -rank; dim < rank; ++dim) {
      for (bool strided : {false, true}) {
        MappingCase c;
        c.shape = Index(sizes.begin(), sizes.begin() + rank);
        c.dim = dim;
        c.strided = strided;
        c.masked = true;
        c.alpha_per_row = strided;
        c.dtype = strided ? DType::kFloat16 : DType::kFloat32;
        c.stream = 200;
        ExpectAgreement(c);
      }
    }
  }
}

TEST(Mapping, EmptyTensorsAndEmptyRows) {
  for (const Index& shape : {Index{0}, Index{0, 4}, Index{4, 0}, Index{2, 0, 3}}) {
    for (int dim = 0; dim < static_cast<int>(shape.size()); ++dim) {
      ForEveryKind([&](MappingCase c) {
        c.shape = shape;
        c.dim = dim;
        ExpectAgreement(c);
      });
    }
  }
}

TEST(Mapping, SpecialRowsDoNotDisturbTheirNeighbours) {
  ForEveryKind([](MappingCase c) {
    for (DType dtype : FloatingTypes()) {
      for (int64_t length : {5, 40}) {
        c.dtype = dtype;
        c.shape = {8, length};
        c.stream = 300;
        MappingProblem problem(c);
        problem.SetScore(1, 3, kNaN);
        problem.SetScore(2, 0, kInfinity);
        problem.SetScore(3, length - 1, -kInfinity);
        for (int64_t i = 0; i < length; ++i) {
          problem.SetScore(4, i, -kInfinity);                 // Everything masked
          problem.SetScore(5, i, 0.5);                        // Ties
          problem.SetScore(6, i, i == 2 ? 3.0 : -kInfinity);  // One key
          problem.SetScore(7, i, i == 2 ? kNaN : -kInfinity);
        }
        const std::string disagreement = Disagreement(c, &problem);
        EXPECT_TRUE(disagreement.empty()) << c << '\n' << disagreement;
        for (int64_t row : {1, 2}) {
          for (double p : problem.Row(problem.probabilities, row)) {
            ASSERT_TRUE(std::isnan(p)) << c;
          }
        }
        ASSERT_EQ(problem.Row(problem.probabilities, 4), std::vector<double>(length, 0.0)) << c;
        ASSERT_TRUE(std::isnan(problem.threshold.Get({4, 0}))) << c;
        // Gradients of the undefined rows are NaN, of the masked row 0.
        ASSERT_TRUE(IsOk(problem.RunBackward())) << c;
        for (int64_t row = 0; row < 7; ++row) {
          for (double g : problem.Row(problem.grad_scores, row)) {
            ASSERT_EQ(std::isnan(g), row == 1 || row == 2) << c << " row " << row;
          }
        }
        ASSERT_EQ(problem.Row(problem.grad_scores, 4), std::vector<double>(length, 0.0)) << c;
      }
    }
  });
}

TEST(Mapping, NanBehindTheMaskIsNotSeen) {
  ForEveryKind([](const MappingCase& c) {
    const std::vector<double> scores = {1.0, kNaN, 0.5, kInfinity, 0.75};
    const std::vector<uint8_t> mask = {1, 0, 1, 0, 1};
    MappingOptions options;
    options.kind = c.kind;
    options.alpha = c.alpha;
    options.budget = c.budget;
    options.mask = TensorView::Contiguous(mask.data(), DType::kUInt8, {5});
    std::vector<double> p(5, -1.0);
    ASSERT_TRUE(
        IsOk(MappingForward(TensorView::Contiguous(scores.data(), DType::kFloat64, {5}), options,
                            MutableTensorView::Contiguous(p.data(), DType::kFloat64, {5}))));
    const std::vector<double> want =
        reference::MapRow({1.0, -kInfinity, 0.5, -kInfinity, 0.75}, c.kind, c.alpha, c.budget)
            .probability;
    EXPECT_LE(testing::MaxError(p, want), 1e-12) << c;
    EXPECT_EQ(p[1], 0.0);
    EXPECT_EQ(p[3], 0.0);
  });
}

TEST(Mapping, ExtremeScores) {
  for (double alpha : TestAlphas()) {
    for (const std::vector<double>& scores :
         std::vector<std::vector<double>>{{3e38, -3e38, 3e38, 0.0},
                                          {-3e38, -3e38, -3e38, -3e38},
                                          {1e-45, 0.0, -1e-45, 1e-40},
                                          {1e30, 1e30, 0.9e30, 1.0},
                                          {1e5, 1e5 + 0.5, 1e5 - 0.25, 0.0}}) {
      for (DType dtype : {DType::kFloat32, DType::kFloat64}) {
        if (alpha < 1.0 && scores[0] > 1e20) continue;  // Tails below the smallest numbers.
        MappingCase c;
        c.alpha = alpha;
        c.dtype = dtype;
        c.shape = {1, 4};
        MappingProblem problem(c);
        for (int64_t i = 0; i < 4; ++i) problem.SetScore(0, i, scores[i]);
        const std::string disagreement = ForwardDisagreement(c, &problem);
        EXPECT_TRUE(disagreement.empty()) << c << " first score " << scores[0] << '\n'
                                          << disagreement;
      }
    }
  }
}

TEST(Mapping, InPlace) {
  for (double alpha : TestAlphas()) {
    MappingCase c;
    c.alpha = alpha;
    c.dtype = DType::kFloat32;
    c.shape = {7, 90};
    MappingProblem problem(c);
    ASSERT_TRUE(IsOk(problem.RunForward()));
    StoredTensor inplace = problem.scores;
    ASSERT_TRUE(IsOk(MappingForward(inplace.view(), problem.options, inplace.mutable_view()))) << c;
    EXPECT_EQ(inplace.bytes(), problem.probabilities.bytes()) << c;
  }
}

TEST(Mapping, ThreadsChangeNoBit) {
  ForEveryKind([](MappingCase c) {
    c.shape = {300, 257};
    c.dtype = DType::kFloat32;
    c.masked = true;
    c.stream = 400;
    std::vector<std::vector<uint8_t>> first;
    for (int threads : {1, 2, 3}) {
      MappingProblem problem(c);
      problem.options.num_threads = threads;
      ASSERT_TRUE(IsOk(problem.RunForward()));
      ASSERT_TRUE(IsOk(problem.RunBackward()));
      const std::vector<std::vector<uint8_t>> results = {
          problem.probabilities.bytes(), problem.threshold.bytes(), problem.support_size.bytes(),
          problem.grad_scores.bytes(), problem.grad_alpha.bytes()};
      if (first.empty()) first = results;
      EXPECT_EQ(results, first) << c << " threads " << threads;
    }
  });
}

TEST(Mapping, ExtrasAreOptional) {
  MappingCase c;
  MappingProblem all(c);
  MappingProblem none(c);
  ASSERT_TRUE(IsOk(all.RunForward()));
  ASSERT_TRUE(
      IsOk(MappingForward(none.scores.view(), none.options, none.probabilities.mutable_view())));
  EXPECT_EQ(all.probabilities.bytes(), none.probabilities.bytes());
  ASSERT_TRUE(IsOk(all.RunBackward()));
  ASSERT_TRUE(IsOk(MappingBackward(none.probabilities.view(), none.grad_probabilities.view(),
                                   none.options, none.grad_scores.mutable_view())));
  EXPECT_EQ(all.grad_scores.bytes(), none.grad_scores.bytes());
}

TEST(Mapping, SupportListsPositiveEntriesRowByRow) {
  const std::vector<float> p = {0.5f, 0.0f, 0.25f,  //
                                0.0f, 0.0f, 0.75f};
  const TensorView view = TensorView::Contiguous(p.data(), DType::kFloat32, {2, 3});
  const Expected<RowSupport> rows = MappingSupport(view);
  ASSERT_TRUE(rows.ok());
  EXPECT_EQ(rows->row_offsets, (std::vector<int64_t>{0, 2, 3}));
  EXPECT_EQ(rows->index, (std::vector<int64_t>{0, 2, 2}));
  EXPECT_EQ(rows->probability, (std::vector<double>{0.5, 0.25, 0.75}));
  const Expected<RowSupport> columns = MappingSupport(view, 0);
  ASSERT_TRUE(columns.ok());
  EXPECT_EQ(columns->row_offsets, (std::vector<int64_t>{0, 1, 1, 3}));
  EXPECT_EQ(columns->index, (std::vector<int64_t>{0, 0, 1}));
  EXPECT_EQ(columns->probability, (std::vector<double>{0.5, 0.25, 0.75}));
}

// Ranges in which a step of the level is larger than the clamp is wide.
TEST(Mapping, BudgetOverHugeRanges) {
  const auto map = [](std::vector<double> scores, double budget) {
    std::vector<double> p(scores.size(), std::nan(""));
    const auto size = static_cast<int64_t>(scores.size());
    MappingOptions options;
    options.kind = MappingKind::kBudget;
    options.budget = budget;
    EXPECT_TRUE(MappingForward(TensorView::Contiguous(scores.data(), DType::kFloat64, {size}),
                               options,
                               MutableTensorView::Contiguous(p.data(), DType::kFloat64, {size}))
                    .ok());
    return p;
  };
  EXPECT_EQ(map({1e16, 0.0, -1e16}, 1.0), (std::vector<double>{1.0, 0.0, 0.0}));
  EXPECT_EQ(map({1.7e308, -1.7e308, 0.0}, 1.0), (std::vector<double>{1.0, 0.0, 0.0}));
  EXPECT_EQ(map({1.7e308, -1.7e308, 0.0}, 2.0), (std::vector<double>{1.0, 0.0, 1.0}));
  EXPECT_EQ(map({1.0, 2.0, 0.5}, 1.0), (std::vector<double>{0.0, 1.0, 0.0}));
}

}  // namespace
}  // namespace flash_entmax
