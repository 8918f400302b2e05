// The general engine's forward kernel for rows of 129 to 512 keys, its own source run on the CPU
// (emulation/gpu.h), against the formulas in double.

#include "emulation/gpu.h"
// The order matters.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "general_problem.h"

namespace flash_entmax::cuda::forward {
constexpr size_t kMostShared = 227 * 1024;                // that a block can have
alignas(128) unsigned char swizzled[kMostShared + 1024];  // of the block that runs
}  // namespace flash_entmax::cuda::forward

#include "general/forward_short_sweeps.cuh"

namespace flash_entmax::cuda::forward {
namespace {

struct Shares {
  int warps = 2, turns = 2;  // as in SweepPlan
};

// How the tensors lie in memory: elements from a column to the next, and from the end of a row to
// the start of the next, which hold NaN.
struct Layout {
  int column = 1, gap = 0;
};

template <class ElementType, int kColumns>
class Problem : public RandomProblem<ElementType> {
 public:
  using Base = RandomProblem<ElementType>;
  using Element = ElementType;
  using Base::Base, Base::Error, Base::key, Base::query, Base::query_scale, Base::s;
  using Base::threshold, Base::value, Base::want;
  using Shape = SweepShape<kColumns>;
  static constexpr int kHeadDim = kColumns;
  static constexpr bool kHalf = std::is_same_v<Element, __half>;

  // Runs the kernel; nothing may be written beyond what the plan asks for, nor between rows.
  // Without a backward to come the means are not wanted.
  void Run(const Shares& shares, bool with_mean = true) {
    const size_t results = static_cast<size_t>(this->Rows()) * s.value_size;
    got_output.assign(results, Bad<Element>());
    got_mean.assign(results, Bad<Element>());
    got_threshold.assign(threshold.size(), 7.0f);
    got_user_threshold = got_threshold;
    auto queries = Spread(query, s.size), keys = Spread(key, s.size);
    auto values = Spread(value, s.value_size), outputs = Spread(got_output, s.value_size);
    GeneralForward call;
    call.problem = this->MakeProblem();
    call.query = View(queries, s.queries, s.size);
    call.key = View(keys, s.keys, s.size);
    call.value = View(values, s.keys, s.value_size);
    call.output = View(outputs, s.queries, s.value_size);
    call.saved.threshold = got_threshold.data();
    if (with_mean) call.saved.weighted_value = got_mean.data();
    call.user_threshold = got_user_threshold.data();
    call.user_threshold_stride[0] = static_cast<int64_t>(s.heads) * s.queries;
    call.user_threshold_stride[1] = s.queries;
    call.user_threshold_stride[2] = 1;
    // As IsFast of forward_instance.cu.
    const bool fast = s.alpha == 1.5f && s.alpha_per_head.empty() && s.scale > 0.0f &&
                      query_scale.empty() && s.slopes.empty();
    if (fast) {
      RunBlocks<true>(call, shares);
    } else {
      RunBlocks<false>(call, shares);
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      const auto at = static_cast<int>(i), row = at / Pitch(s.value_size);
      const int column = at % Pitch(s.value_size) / layout.column;
      if (column < s.value_size && at % Pitch(s.value_size) % layout.column == 0) {
        got_output[static_cast<size_t>(row * s.value_size + column)] = outputs[i];
      } else {
        EXPECT_TRUE(std::isnan(static_cast<float>(outputs[i]))) << "written between rows";
      }
    }
  }

  // Against the reference. Rounding weights and results to 16 bits costs somewhat more than half of
  // what is allowed.
  void Compare(const Shares& shares, bool with_mean = true) {
    this->Solve(false);
    Run(shares, with_mean);
    constexpr double kAllowed = kHalf ? 5e-4 : 4e-3;
    EXPECT_LE(Error(got_output, want.output), kAllowed);
    EXPECT_LE(WorstRow(got_output, want.output), 2.0 * kAllowed);
    if (with_mean) {
      EXPECT_LE(Error(got_mean, want.mean), kAllowed);
      EXPECT_LE(WorstRow(got_mean, want.mean), 2.0 * kAllowed);
    }
    EXPECT_LE(ThresholdError(got_threshold), 4e-6);
    EXPECT_LE(ThresholdError(got_user_threshold), 4e-6);
  }

  Layout layout;
  std::vector<Element> got_output, got_mean;
  std::vector<float> got_threshold, got_user_threshold;

 private:
  int Pitch(int columns) const { return columns * layout.column + layout.gap; }
  std::vector<Element> Spread(const std::vector<Element>& tensor, int columns) const {
    const size_t rows = tensor.size() / columns;
    std::vector<Element> result(rows * Pitch(columns), Bad<Element>());
    for (size_t i = 0; i < tensor.size(); ++i) {
      result[i / columns * Pitch(columns) + i % columns * layout.column] = tensor[i];
    }
    return result;
  }
  StridedTensor View(std::vector<Element>& spread, int rows, int columns) const {
    StridedTensor view = this->Strided(spread, rows, Pitch(columns));
    view.column = layout.column;
    view.vectors = view.vectors && layout.column == 1;
    return view;
  }

  // As SpanOfRows of forward_instance.cu.
  int SpanOfRows(int rows) const {
    const int64_t right = s.causal ? 0 : s.right;
    return static_cast<int>(std::min<int64_t>(s.keys, rows + right + s.left));
  }

  template <bool kFast>
  void RunBlocks(const GeneralForward& call, const Shares& shares) {
    ASSERT_LE(SpanOfRows(Shape::kQueries + 31), 16 * Shape::kMostBlocks);
    ASSERT_LE(32 * shares.warps, int{Shape::kMaxThreads});
    SweepPlan plan;
    plan.warps = shares.warps;
    plan.turns = shares.turns;
    plan.strip_rows = Shape::kQueries;
    plan.key_rows = (SpanOfRows(plan.BlockRows()) + 31) / 32 * 32;
    plan.tiles = static_cast<int>(call.problem.QueryTiles(plan.BlockRows()));
    ASSERT_LE(Shape::Bytes(plan), kMostShared);
    testing::SetSharedMemory(swizzled, Shape::Bytes(plan));
    for (int block = 0; block < plan.tiles * s.heads; ++block) {
      // NaN, or large numbers: as a score, NaN would have no weight.
      const int poison = block % 4 < 2 ? 0xff : 0x7b;
      std::memset(swizzled, poison, sizeof(swizzled));
      testing::RunBlock(block, 32 * plan.warps,
                        [&] { SweepForwardKernel<Element, kColumns, kFast>(call, plan); });
      ASSERT_TRUE(std::all_of(swizzled + Shape::Bytes(plan), swizzled + sizeof(swizzled),
                              [&](unsigned char x) { return x == poison; }));
    }
  }

  // The largest error of a row; NaN if one is.
  double WorstRow(const std::vector<Element>& got, const std::vector<double>& expected) const {
    double worst = 0.0;
    for (int first = 0; first < static_cast<int>(got.size()); first += s.value_size) {
      const auto row = [&](const auto& x) {
        return std::vector(x.begin() + first, x.begin() + first + s.value_size);
      };
      const double error = Error(row(got), row(expected));
      if (!(error <= worst)) worst = error;
      if (std::isnan(worst)) break;
    }
    return worst;
  }
  // The same of thresholds, relative to those above one.
  double ThresholdError(const std::vector<float>& got) const {
    double worst = 0.0;
    for (size_t i = 0; i < got.size(); ++i) {
      if (std::isnan(threshold[i]) && std::isnan(got[i])) continue;
      const double expected = threshold[i];
      const double error = std::abs(double{got[i]} - expected) / std::max(1.0, std::abs(expected));
      if (!(error <= worst)) worst = error;
      if (std::isnan(worst)) break;
    }
    return worst;
  }
};

template <class ProblemType>
class GeneralForwardTest : public ::testing::Test {
 protected:
  using Problem = ProblemType;

  static Settings DefaultSettings() {
    Settings settings;
    settings.batch = 1;
    settings.heads = 2;
    settings.queries = settings.keys = 136;
    settings.size = settings.value_size = Problem::kHeadDim;
    settings.scale = 1.0f / std::sqrt(static_cast<float>(Problem::kHeadDim));
    return settings;
  }
  template <class Change>
  static void Compare(const std::string& name, const Shares& shares, Change change,
                      const Layout& layout = {}) {
    SCOPED_TRACE(name + ", " + testing::SeedMessage());
    Settings settings = DefaultSettings();
    change(&settings);
    Problem problem(settings);
    problem.layout = layout;
    problem.Compare(shares);
  }
  // The same with inputs that `change` has changed. The number of output rows that are not finite.
  template <class Change>
  static size_t CompareInputs(const std::string& name, Change change) {
    SCOPED_TRACE(name + ", " + testing::SeedMessage());
    Problem problem(DefaultSettings());
    change(&problem);
    problem.Compare({});
    problem.Compare({3, 1}, false);
    return problem.BadRows(problem.got_output, problem.s.value_size).size();
  }
};
using Problems = ::testing::Types<Problem<__nv_bfloat16, 32>, Problem<__half, 32>,
                                  Problem<__nv_bfloat16, 64>, Problem<__half, 64>>;
TYPED_TEST_SUITE(GeneralForwardTest, Problems);

TYPED_TEST(GeneralForwardTest, Sizes) {
  this->Compare("one warp", {1, 9}, [](Settings*) {});
  this->Compare("a warp for each strip", {9, 1}, [](Settings*) {});
  this->Compare("a row too many", {3, 3}, [](Settings* s) { s->queries = s->keys = 145; });
  this->Compare("more warps than strips", {12, 1}, [](Settings* s) {
    s->queries = 150;
    s->keys = 161;
    s->causal = false;
  });
  this->Compare("129 keys", {2, 2}, [](Settings* s) {
    s->queries = s->keys = 129;
    s->causal = false;
  });
  this->Compare("fewer queries", {2, 2}, [](Settings* s) {
    s->queries = 37;
    s->keys = 199;
  });
  this->Compare("rows without keys", {3, 2}, [](Settings* s) {
    s->queries = 190;
    s->keys = 131;
  });
  this->Compare("512 keys", {1, 1}, [](Settings* s) {
    s->queries = 20;
    s->keys = 512;
  });
  this->Compare("512 keys, not causal", {2, 1}, [](Settings* s) {
    s->queries = 20;
    s->keys = 512;
    s->causal = false;
  });
}

TYPED_TEST(GeneralForwardTest, Columns) {
  this->Compare("fewer", {}, [](Settings* s) {
    s->size -= 8;
    s->value_size -= 16;
  });
  this->Compare("no vectors", {}, [](Settings* s) {
    s->size -= 25;
    s->value_size -= 3;
  });
}

TYPED_TEST(GeneralForwardTest, Layouts) {
  const auto fewer = [](Settings* s) {
    s->size -= 3;
    s->value_size -= 3;
  };
  this->Compare("rows apart", {}, [](Settings*) {}, {1, 8});
  this->Compare("rows apart, no vectors", {}, [](Settings*) {}, {1, 3});
  this->Compare("columns apart", {}, [](Settings*) {}, {2, 0});
  this->Compare("vectors, an odd number of columns", {}, fewer, {1, 3});
  this->Compare("rows and columns apart, an odd number of columns", {}, fewer, {3, 5});
}

TYPED_TEST(GeneralForwardTest, Masks) {
  this->Compare("window", {1, 2}, [](Settings* s) {
    s->queries = 150;
    s->keys = 170;
    s->causal = false;
    s->left = 65;
    s->right = 34;
  });
  this->Compare("causal window", {2, 1}, [](Settings* s) {
    s->queries = 90;
    s->keys = 230;
    s->left = 99;
  });
  // The widest that the engine gives to this kernel.
  this->Compare("window of most of 512 keys", {1, 3}, [](Settings* s) {
    s->heads = 1;
    s->queries = 50;
    s->keys = 520;
    s->left = 512 - 31 - TypeParam::Shape::kQueries;
  });
  this->Compare("lengths", {}, [](Settings* s) {
    s->batch = 2;
    s->heads = 1;
    s->causal = false;
    s->key_lengths = {45, 133};
  });
  this->Compare("lengths, causal, one of them zero", {}, [](Settings* s) {
    s->batch = 2;
    s->heads = 1;
    s->key_lengths = {0, 130};
  });
  this->Compare("lengths and window", {1, 2}, [](Settings* s) {
    s->batch = 2;
    s->heads = 1;
    s->causal = false;
    s->left = 70;
    s->right = 40;
    s->key_lengths = {136, 50};
  });
}

// What takes the kernel that is not kFast.
TYPED_TEST(GeneralForwardTest, Modifiers) {
  // Here u jumps at the threshold: with other seeds a key may, rarely, be too close to it to tell.
  this->Compare("alpha = 2", {}, [](Settings* s) { s->alpha = 2.0f; });
  this->Compare("alpha = 1.25", {}, [](Settings* s) { s->alpha = 1.25f; });
  this->Compare("alpha of each head", {}, [](Settings* s) {
    s->heads = 3;
    s->alpha_per_head = {1.5f, 1.1f, 2.0f};
  });
  this->Compare("slopes", {}, [](Settings* s) { s->slopes = {0.3f, -0.03f}; });
  this->Compare("slopes, not causal", {}, [](Settings* s) {
    s->slopes = {0.3f, -0.03f};
    s->causal = false;
  });
  this->Compare("factors", {}, [](Settings* s) { s->first_factor = 1.3f; });
  this->Compare("negative factors, slopes, window", {}, [](Settings* s) {
    s->first_factor = -0.7f;
    s->slopes = {0.05f, 0.0f};
    s->left = 100;
    s->keys = 150;
  });
  this->Compare("negative scale", {}, [](Settings* s) { s->scale = -s->scale; });
}

TYPED_TEST(GeneralForwardTest, Scores) {
  // All keys have a probability; the lists have no room for them.
  this->Compare("equal", {}, [](Settings* s) { s->deviation = 0.0f; });
  this->Compare("equal, alpha = 2", {}, [](Settings* s) {
    s->deviation = 0.0f;
    s->alpha = 2.0f;
  });
  this->Compare("equal, 512 keys", {1, 1}, [](Settings* s) {
    s->heads = 1;
    s->queries = 17;
    s->keys = 512;
    s->deviation = 0.0f;
  });
  // Some strips have room for theirs.
  this->Compare("nearly equal", {}, [](Settings* s) { s->deviation = 0.1f; });
  this->Compare("nearly equal, alpha = 1.25", {}, [](Settings* s) {
    s->deviation = 0.3f;
    s->alpha = 1.25f;
  });
  this->Compare("up to a hundred", {}, [](Settings* s) { s->deviation = 30.0f; });
  this->Compare("up to a hundred, alpha = 1.25", {}, [](Settings* s) {
    s->deviation = 30.0f;
    s->alpha = 1.25f;
  });
  // The largest score takes all, exactly, however large it is.
  this->Compare("up to many thousands", {},
                [](Settings* s) { s->deviation = TypeParam::kHalf ? 1e4f : 1e5f; });
  this->Compare("up to many thousands, alpha = 2", {}, [](Settings* s) {
    s->deviation = TypeParam::kHalf ? 1e4f : 1e5f;
    s->alpha = 2.0f;
  });
  this->CompareInputs("one large key", [](auto* problem) {
    for (int c = 0; c < problem->s.size; ++c) {
      auto& x = problem->key[static_cast<size_t>(77 * problem->s.size + c)];
      x = static_cast<float>(x) * 30.0f;
    }
  });
}

TYPED_TEST(GeneralForwardTest, NotFinite) {
  using Element = typename TypeParam::Element;
  const auto at = [](auto* problem, auto& tensor, int row, int column) -> auto& {
    return tensor[static_cast<size_t>(row * problem->s.size + column)];
  };
  const Element infinity(std::numeric_limits<float>::infinity());
  this->CompareInputs("NaN in a query",
                      [&](auto* problem) { at(problem, problem->query, 40, 3) = Bad<Element>(); });
  this->CompareInputs("NaN in a key",
                      [&](auto* problem) { at(problem, problem->key, 120, 3) = Bad<Element>(); });
  this->CompareInputs("infinity in a key",
                      [&](auto* problem) { at(problem, problem->key, 100, 3) = infinity; });
  const size_t bad_rows = this->CompareInputs("NaN in a value", [&](auto* problem) {
    at(problem, problem->value, 90, 3) = Bad<Element>();
  });
  EXPECT_GT(bad_rows, 0);
  EXPECT_LT(bad_rows, 136 - 90) << "every row that sees the key keeps it";
  for (const float alpha : {1.5f, 1.25f, 2.0f}) {
    const size_t without =
        this->CompareInputs("a row whose scores are all -inf", [&](auto* problem) {
          problem->s.alpha = alpha;
          at(problem, problem->query, 70, 3) = infinity;
          for (int row = 0; row < problem->s.keys; ++row) {
            auto& x = at(problem, problem->key, row, 3);
            x = -std::abs(static_cast<float>(x)) - 0.1f;
          }
        });
    EXPECT_EQ(without, 1);
  }
  this->CompareInputs("infinities in values", [&](auto* problem) {
    at(problem, problem->value, 20, 3) = infinity;
    at(problem, problem->value, 50, 3) = -infinity;
    at(problem, problem->value, 50, 17) = infinity;
  });
}

}  // namespace
}  // namespace flash_entmax::cuda::forward
