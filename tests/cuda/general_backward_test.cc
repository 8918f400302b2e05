// The backward kernels of the general engine, their own source run on the CPU (emulation/gpu.h),
// against the formulas in double: that of short rows, and the two halves of the tiled one.

#include "emulation/gpu.h"
// The order matters.
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "general_problem.h"

namespace flash_entmax::cuda {
alignas(16) char shared_bytes[128 * 1024];  // of the block that runs
}

#include "general/backward_columns.cuh"
#include "general/backward_rows.cuh"
#include "general/backward_short_kernel.cuh"

namespace flash_entmax::cuda {
namespace {

// The tiled kernel's work for a block, as backward_instance.cu gives it out.
template <class Element>
struct Tiled {
  const GeneralBackward& call;
  bool columns;
  int head, tile;

  template <class Variant>
  bool Try() const {
    testing::SetSharedMemory(shared_bytes, Variant::Shared::kBytes);
    const typename Variant::Shared shared{reinterpret_cast<Element*>(shared_bytes)};
    return columns ? BackwardColumns<Variant>(call, head, tile, shared, 1.0f)
                   : BackwardRows<Variant>(call, head, tile, shared, 1.0f);
  }
  template <Alpha kMode>
  void Run() const {
    const bool plain = !call.problem.slopes && !call.problem.query_scale;
    const bool finite =
        call.slope_rows ? Try<BackwardVariant<Element, 32, kMode, Extras::kAll, false>>()
        : plain         ? Try<BackwardVariant<Element, 32, kMode, Extras::kNone, false>>()
                        : Try<BackwardVariant<Element, 32, kMode, Extras::kCommon, false>>();
    if (finite) return;
    __syncthreads();
    Try<typename BackwardVariant<Element, 32, kMode, Extras::kAll, false>::Careful>();
  }
};

template <class ElementType, bool kShortRows>
class Problem : public RandomProblem<ElementType> {
 public:
  using Base = RandomProblem<ElementType>;
  using Element = ElementType;
  using Base::Base, Base::Error, Base::key, Base::output_gradient, Base::query, Base::query_scale;
  using Base::s, Base::threshold, Base::value, Base::want;

  // Thresholds and means, as the forward would have them, and gradients.
  void Solve() {
    Base::Solve(true);
    mean.clear();
    for (const double x : want.mean) mean.push_back(Element(static_cast<float>(x)));
  }

  // Runs the kernel; nothing may be written beyond what the plan asks for.
  void Run() {
    const Element nothing = Bad<Element>();
    got_query.assign(query.size(), nothing);
    got_key.assign(key.size(), nothing);
    got_value.assign(value.size(), nothing);
    got_query_scale.assign(threshold.size(), kNan);
    got_slopes = got_query_scale;
    const GeneralBackward call = MakeCall();
    if (!s.alpha_per_head.empty() || (s.alpha != 1.5f && s.alpha != 2.0f)) {
      RunMode<Alpha::kGeneral>(call);
    } else if (s.alpha == 1.5f) {
      RunMode<Alpha::kOneAndHalf>(call);
    } else {
      RunMode<Alpha::kTwo>(call);
    }
  }

  void Compare(const std::string& name) {
    SCOPED_TRACE(name + ", " + testing::SeedMessage());
    Solve();
    Run();
    constexpr double kAllowed = std::is_same_v<Element, __half> ? 2.5e-3 : 1.4e-2;
    EXPECT_LE(Error(got_query, want.query), kAllowed);
    EXPECT_LE(Error(got_key, want.key), kAllowed);
    EXPECT_LE(Error(got_value, want.value), kAllowed);
    if (!query_scale.empty()) {
      EXPECT_LE(Error(got_query_scale, want.query_scale), 2e-4);
    }
    if (!s.slopes.empty()) {
      EXPECT_LE(Error(got_slopes, want.slopes), 1e-4);
    }
  }

  std::vector<Element> mean;  // of V under u
  std::vector<Element> got_query, got_key, got_value;
  std::vector<float> got_query_scale, got_slopes;

 private:
  template <Alpha kMode>
  void RunMode(const GeneralBackward& call) {
    if constexpr (kShortRows) {
      const ShortBackwardPlan& plan = call.short_rows;
      ASSERT_GT(plan.query_rows, 0) << "the plan does not take this problem";
      const int threads = std::max(plan.query_rows, plan.key_rows) > 112 ? kMostShortThreads : 128;
      testing::SetSharedMemory(shared_bytes, plan.Bytes());
      for (int block = 0; block < s.batch * s.heads; ++block) {
        std::memset(shared_bytes, 0xff, sizeof(shared_bytes));
        testing::RunBlock(block, threads,
                          [&] { ShortBackwardKernel<Element, 32, kMode>(call, plan); });
        const char* const beyond = shared_bytes + plan.Bytes();
        const char* const end = shared_bytes + sizeof(shared_bytes);
        ASSERT_TRUE(std::all_of(beyond, end, [](char x) { return x == static_cast<char>(0xff); }));
      }
    } else {
      constexpr int kOwn = BackwardShape<Element, 32>::kOwnRows;
      for (const bool columns : {false, true}) {
        const int tiles = ((columns ? s.keys : s.queries) + kOwn - 1) / kOwn;
        for (int block = 0; block < s.batch * s.heads * tiles; ++block) {
          const int entry = block / tiles / s.heads, head = block / tiles % s.heads;
          const Tiled<Element> tiled{call, columns, head, entry * tiles + block % tiles};
          testing::RunBlock(block, 128, [&] { tiled.template Run<kMode>(); });
        }
      }
    }
  }

  GeneralBackward MakeCall() {
    GeneralBackward call;
    call.problem = this->MakeProblem();
    if (!s.slopes.empty()) call.slope_rows = got_slopes.data();
    if (!query_scale.empty()) call.query_scale_rows = got_query_scale.data();
    call.query = this->Strided(query, s.queries, s.size);
    call.key = this->Strided(key, s.keys, s.size);
    call.value = this->Strided(value, s.keys, s.value_size);
    call.output_gradient = this->Strided(output_gradient, s.queries, s.value_size);
    call.query_gradient = this->Strided(got_query, s.queries, s.size);
    call.key_gradient = this->Strided(got_key, s.keys, s.size);
    call.value_gradient = this->Strided(got_value, s.keys, s.value_size);
    call.saved.threshold = threshold.data();
    if (kShortRows) {
      call.short_rows = ShortBackwardPlan::Of(call.problem, 2, false);
    } else {
      call.saved.weighted_value = mean.data();
    }
    return call;
  }
};

template <class Problem>
class GeneralBackwardTest : public ::testing::Test {
 protected:
  static void Compare(const std::string& name, void (*change)(Settings*)) {
    Settings settings;
    change(&settings);
    Problem(settings).Compare(name);
  }
};
using Problems = ::testing::Types<Problem<__nv_bfloat16, true>, Problem<__half, true>,
                                  Problem<__nv_bfloat16, false>, Problem<__half, false>>;
TYPED_TEST_SUITE(GeneralBackwardTest, Problems);

TYPED_TEST(GeneralBackwardTest, Sizes) {
  this->Compare("causal", [](Settings*) {});
  this->Compare("not causal", [](Settings* s) { s->causal = false; });
  this->Compare("fewer queries", [](Settings* s) { s->queries = 33; });
  this->Compare("fewer keys", [](Settings* s) { s->keys = 33; });
  this->Compare("144 rows, eight warps", [](Settings* s) {
    s->queries = s->keys = 144;
    s->batch = s->heads = 1;
  });
  this->Compare("one pair", [](Settings* s) { s->queries = s->keys = 1; });
  this->Compare("fewer columns", [](Settings* s) {
    s->size = 24;
    s->value_size = 16;
  });
  this->Compare("columns that are no vectors", [](Settings* s) {
    s->size = 7;
    s->value_size = 29;
  });
}

TYPED_TEST(GeneralBackwardTest, Masks) {
  this->Compare("window", [](Settings* s) {
    s->causal = false;
    s->left = 20;
    s->right = 7;
  });
  this->Compare("lengths", [](Settings* s) {
    s->causal = false;
    s->key_lengths = {90, 40};
  });
  this->Compare("lengths, causal, one of them zero", [](Settings* s) { s->key_lengths = {0, 57}; });
  this->Compare("lengths and window", [](Settings* s) {
    s->causal = false;
    s->left = 20;
    s->right = 7;
    s->key_lengths = {33, 90};
  });
}

TYPED_TEST(GeneralBackwardTest, Modifiers) {
  this->Compare("alpha = 2", [](Settings* s) { s->alpha = 2.0f; });
  this->Compare("alpha = 1.25", [](Settings* s) { s->alpha = 1.25f; });
  this->Compare("alpha of each head", [](Settings* s) { s->alpha_per_head = {1.5f, 1.25f, 2.0f}; });
  this->Compare("slopes", [](Settings* s) { s->slopes = {1.0f, -0.03f, 0.0f}; });
  this->Compare("factors", [](Settings* s) { s->first_factor = 1.3f; });
  this->Compare("negative factors", [](Settings* s) { s->first_factor = -0.7f; });
  this->Compare("slopes and factors", [](Settings* s) {
    s->slopes = {0.5f, 0.1f, 0.0f};
    s->first_factor = 0.01f;
  });
  this->Compare("scores of up to a hundred", [](Settings* s) {
    s->deviation = 10.0f;
    s->first_factor = 3.0f;
  });
}

// fp16 keeps small numbers with fewer digits: score gradients must not be made smaller.
TYPED_TEST(GeneralBackwardTest, SmallGradients) {
  this->Compare("1e-4", [](Settings* s) { s->gradient_deviation = 1e-4f; });
}

Settings OneHead() {
  Settings settings;
  settings.batch = settings.heads = 1;
  return settings;
}

std::vector<int> From(int first, int end) {
  std::vector<int> rows;
  for (int row = first; row < end; ++row) rows.push_back(row);
  return rows;
}

// A NaN in row 40 reaches what depends on it and nothing else.
TYPED_TEST(GeneralBackwardTest, NanInQueryReachesItsRowAndTheKeysItSees) {
  TypeParam problem(OneHead());
  problem.query[40 * 32 + 3] = Bad<typename TypeParam::Element>();
  problem.Solve();
  problem.Run();
  EXPECT_EQ(problem.BadRows(problem.got_query, 32), From(40, 41));
  EXPECT_EQ(problem.BadRows(problem.got_key, 32), From(0, 41));
  EXPECT_EQ(problem.BadRows(problem.got_value, 32), From(0, 41));
}

TYPED_TEST(GeneralBackwardTest, NanInKeyReachesTheRowsThatSeeIt) {
  TypeParam problem(OneHead());
  problem.key[40 * 32 + 3] = Bad<typename TypeParam::Element>();
  problem.Solve();
  problem.Run();
  EXPECT_EQ(problem.BadRows(problem.got_query, 32), From(40, 90));
}

TYPED_TEST(GeneralBackwardTest, NanInValueReachesTheRowsThatKeepIt) {
  TypeParam problem(OneHead());
  problem.value[40 * 32 + 3] = Bad<typename TypeParam::Element>();
  problem.Solve();
  problem.Run();
  std::vector<int> keeping;
  for (int row = 0; row < 90; ++row) {
    if (std::isnan(problem.want.query[static_cast<size_t>(row) * 32])) keeping.push_back(row);
  }
  ASSERT_FALSE(keeping.empty());
  EXPECT_EQ(problem.BadRows(problem.got_query, 32), keeping);
  EXPECT_TRUE(problem.BadRows(problem.got_value, 32).empty());
}

TYPED_TEST(GeneralBackwardTest, NanInOutputGradientReachesTheKeysKept) {
  TypeParam problem(OneHead());
  problem.output_gradient[40 * 32 + 3] = Bad<typename TypeParam::Element>();
  problem.Solve();
  problem.Run();
  EXPECT_EQ(problem.BadRows(problem.got_query, 32), From(40, 41));
  std::vector<int> kept;
  for (int row = 0; row < 90; ++row) {
    if (std::isnan(problem.want.key[static_cast<size_t>(row) * 32])) kept.push_back(row);
  }
  ASSERT_FALSE(kept.empty());
  EXPECT_EQ(problem.BadRows(problem.got_key, 32), kept);
}

TYPED_TEST(GeneralBackwardTest, FactorThatIsInfiniteInARowWithoutKeys) {
  Settings settings = OneHead();
  settings.queries = 64;
  settings.keys = 32;
  settings.first_factor = 1.0f;
  TypeParam problem(settings);
  problem.query_scale[0] = -std::numeric_limits<float>::infinity();
  problem.Solve();
  problem.Run();
  EXPECT_TRUE(problem.BadRows(problem.got_query, 32).empty());
  EXPECT_TRUE(problem.BadRows(problem.got_key, 32).empty());
}

// Only bfloat16 has numbers whose product is infinite in float.
template <class Problem>
void ExpectNoPartOfMinusInfinity() {
  Settings settings = OneHead();
  settings.first_factor = 1.0f;
  Problem problem(settings);
  for (int row = 0; row < 90; ++row) problem.key[static_cast<size_t>(row) * 32] = 0.0f;
  problem.key[10 * 32] = -1e20f;
  for (int column = 0; column < 32; ++column) {
    problem.query[50 * 32 + static_cast<size_t>(column)] = column == 0 ? 1e20f : 0.0f;
  }
  problem.Solve();
  problem.Run();
  EXPECT_TRUE(problem.BadRows(problem.got_query, 32).empty());
  EXPECT_TRUE(problem.BadRows(problem.got_key, 32).empty());
  for (const float gradient : problem.got_query_scale) EXPECT_TRUE(std::isfinite(gradient));
}
TEST(GeneralBackward, ScoreOfMinusInfinityHasNoPart) {
  ExpectNoPartOfMinusInfinity<Problem<__nv_bfloat16, true>>();
  ExpectNoPartOfMinusInfinity<Problem<__nv_bfloat16, false>>();
}

}  // namespace
}  // namespace flash_entmax::cuda
