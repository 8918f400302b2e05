// The backward kernels of the general engine, their own source run on the CPU (emulation/gpu.h),
// against the formulas in double: that of short rows, and the two halves of the tiled one.

#include "emulation/gpu.h"
// The order matters.
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "testing/random.h"

namespace flash_entmax::cuda {
alignas(16) char shared_bytes[128 * 1024];  // of the block that runs
}

#include "general/backward_columns.cuh"
#include "general/backward_rows.cuh"
#include "general/backward_short_kernel.cuh"

namespace flash_entmax::cuda {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class Element>
Element Bad() {
  return Element(std::numeric_limits<float>::quiet_NaN());
}

struct Settings {
  int batch = 2, heads = 3, queries = 90, keys = 90, size = 32, value_size = 32;
  bool causal = true;
  int left = GeneralProblem::kUnlimited, right = GeneralProblem::kUnlimited;
  float alpha = 1.5f;
  float scale = 0.1767767f;
  float deviation = 1.0f;           // of the scores
  float gradient_deviation = 1.0f;  // of the output's gradient
  std::vector<float> alpha_per_head, slopes;
  std::vector<int> key_lengths;
  float first_factor = 0.0f;  // query_scale of the rows: this, a little more, …; 0: none
};

// The tiled kernel's work for a block, as backward_instance.cu gives it out.
template <class Element>
struct Tiled {
  const GeneralBackward& call;
  bool columns;
  int head, tile;

  template <class Variant>
  bool Try() const {
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
class Problem {
 public:
  using Element = ElementType;
  struct Gradients {
    std::vector<double> query, key, value, query_scale, slopes;  // the last two: a number a row
  };

  explicit Problem(const Settings& settings) : s(settings) {
    testing::Random random;
    const auto fill = [&](int rows, int columns, double deviation) {
      std::vector<Element> tensor;
      for (int i = 0; i < s.batch * s.heads * rows * columns; ++i) {
        tensor.push_back(Element(static_cast<float>(deviation * random.Gauss())));
      }
      return tensor;
    };
    query = fill(s.queries, s.size, s.deviation);
    key = fill(s.keys, s.size, 1.0);
    value = fill(s.keys, s.value_size, 1.0);
    output_gradient = fill(s.queries, s.value_size, s.gradient_deviation);
    if (s.first_factor != 0.0f) {
      for (int i = 0; i < Rows(); ++i) {
        query_scale.push_back(s.first_factor * (1.0f + 0.1f * static_cast<float>(i % 7)));
      }
    }
  }

  int Rows() const { return s.batch * s.heads * s.queries; }

  // Thresholds, as the forward would have them, and gradients.
  void Solve() {
    threshold.assign(static_cast<size_t>(Rows()), 0.0f);
    mean.assign(output_gradient.size(), Element(0.0f));
    want = {std::vector<double>(query.size()), std::vector<double>(key.size()),
            std::vector<double>(value.size()), std::vector<double>(threshold.size()),
            std::vector<double>(threshold.size())};
    for (int row = 0; row < Rows(); ++row) SolveRow(row);
  }

  // Runs the kernel; nothing may be written beyond what the plan asks for.
  void Run() {
    const auto nothing = Element(std::numeric_limits<float>::quiet_NaN());
    got_query.assign(query.size(), nothing);
    got_key.assign(key.size(), nothing);
    got_value.assign(value.size(), nothing);
    got_query_scale.assign(threshold.size(), std::numeric_limits<float>::quiet_NaN());
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
      EXPECT_LE(Error(got_query_scale, want.query_scale), 1e-4);
    }
    if (!s.slopes.empty()) {
      EXPECT_LE(Error(got_slopes, want.slopes), 1e-4);
    }
  }

  // Rows of a gradient, counted over the whole tensor, with a number that is not finite.
  static std::vector<int> BadRows(const std::vector<Element>& gradient, int columns) {
    std::vector<int> rows;
    for (size_t i = 0; i < gradient.size(); ++i) {
      const int row = static_cast<int>(i) / columns;
      const bool known = !rows.empty() && rows.back() == row;
      if (!known && !std::isfinite(static_cast<float>(gradient[i]))) rows.push_back(row);
    }
    return rows;
  }

  Settings s;
  std::vector<Element> query, key, value, output_gradient;
  std::vector<float> query_scale, threshold;
  std::vector<Element> mean;  // of V under u
  Gradients want;
  std::vector<Element> got_query, got_key, got_value;
  std::vector<float> got_query_scale, got_slopes;

 private:
  template <Alpha kMode>
  void RunMode(const GeneralBackward& call) {
    if constexpr (kShortRows) {
      const ShortBackwardPlan& plan = call.short_rows;
      ASSERT_GT(plan.query_rows, 0) << "the plan does not take this problem";
      const int threads = std::max(plan.query_rows, plan.key_rows) > 112 ? kMostShortThreads : 128;
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

  // In the Frobenius norm, relative to the reference; absolute where that is zero.
  template <class Number>
  static double Error(const std::vector<Number>& got, const std::vector<double>& expected) {
    double difference = 0.0, size = 0.0;
    for (size_t i = 0; i < got.size(); ++i) {
      const double x = static_cast<double>(static_cast<float>(got[i])) - expected[i];
      difference += x * x;
      size += expected[i] * expected[i];
    }
    return std::sqrt(size > 0.0 ? difference / size : difference);
  }

  void SolveRow(int row) {
    const int i = row % s.queries, head = row / s.queries % s.heads;
    const int entry = row / s.queries / s.heads;
    const double alpha = s.alpha_per_head.empty() ? s.alpha : s.alpha_per_head[head];
    const double order = alpha - 1.0, scale = s.scale;
    const double slope = s.slopes.empty() ? 0.0f : s.slopes[head];
    const double factor = scale * double{query_scale.empty() ? 1.0f : query_scale[row]};
    const int keys = s.key_lengths.empty() ? s.keys : s.key_lengths[entry];
    const int position = i + keys - s.queries;
    struct Seen {
      int row;
      double distance, dot, z, p, u, dp;
    };
    std::vector<Seen> seen;
    for (int j = 0; j < keys; ++j) {
      if (j < position - s.left || j > position + (s.causal ? 0 : s.right)) continue;
      Seen pair = {};
      pair.row = (entry * s.heads + head) * s.keys + j;
      pair.distance = std::abs(position - j);
      pair.dot = Dot(query, row, key, pair.row, s.size);
      pair.dp = Dot(output_gradient, row, value, pair.row, s.value_size);
      pair.z = order * (factor * pair.dot - slope * pair.distance);
      seen.push_back(pair);
    }
    threshold[row] = std::numeric_limits<float>::quiet_NaN();
    if (seen.empty()) return;
    Element* const mean_row = mean.data() + static_cast<ptrdiff_t>(row) * s.value_size;
    std::fill(mean_row, mean_row + s.value_size, Bad<Element>());
    double high = -kInfinity;
    for (const Seen& pair : seen) {
      if (std::isnan(pair.z) || pair.z == kInfinity) return;
      high = std::max(high, pair.z);
    }
    double low = high - 1.0;
    for (int step = 0; step < 70; ++step) {
      const double middle = 0.5 * (low + high);
      double sum = 0.0;
      for (const Seen& x : seen) sum += std::pow(std::max(x.z - middle, 0.0), 1.0 / order);
      (sum >= 1.0 ? low : high) = middle;
    }
    threshold[row] = static_cast<float>(low);
    double u_sum = 0.0, u_gradient = 0.0;
    for (Seen& x : seen) {
      const double w = x.z - double{threshold[row]};
      x.p = w > 0.0 ? std::pow(w, 1.0 / order) : 0.0;
      x.u = w > 0.0 ? std::pow(w, 1.0 / order - 1.0) : 0.0;
      if (x.u == 0.0) continue;
      u_sum += x.u;
      u_gradient += x.u * x.dp;
    }
    for (int c = 0; c < s.value_size; ++c) {
      double sum = 0.0;
      for (const Seen& x : seen) {
        if (x.u > 0.0) sum += x.u * At(value, x.row * s.value_size + c);
      }
      mean_row[c] = Element(static_cast<float>(sum / u_sum));
    }
    for (const Seen& x : seen) {
      if (x.u == 0.0) continue;
      const double ds = x.u * (x.dp - u_gradient / u_sum);
      want.query_scale[row] += ds * scale * x.dot;
      want.slopes[row] -= ds * x.distance;
      for (int c = 0; c < s.size; ++c) {
        want.query[row * s.size + c] += factor * ds * At(key, x.row * s.size + c);
        want.key[x.row * s.size + c] += factor * ds * At(query, row * s.size + c);
      }
      for (int c = 0; c < s.value_size; ++c) {
        want.value[x.row * s.value_size + c] += x.p * At(output_gradient, row * s.value_size + c);
      }
    }
  }

  static double At(const std::vector<Element>& tensor, int at) {
    return static_cast<double>(static_cast<float>(tensor[static_cast<size_t>(at)]));
  }
  static double Dot(const std::vector<Element>& x, int x_row, const std::vector<Element>& y,
                    int y_row, int columns) {
    double sum = 0.0;
    for (int c = 0; c < columns; ++c)
      sum += At(x, x_row * columns + c) * At(y, y_row * columns + c);
    // In float a large one is infinite.
    constexpr double kMost = std::numeric_limits<float>::max();
    return std::abs(sum) > kMost ? std::copysign(kInfinity, sum) : sum;
  }

  StridedTensor Strided(std::vector<Element>& tensor, int rows, int columns) const {
    StridedTensor view;
    view.data = tensor.data();
    view.row = columns;
    view.head = static_cast<int64_t>(rows) * columns;
    view.batch = view.head * s.heads;
    view.vectors = columns % 8 == 0;
    return view;
  }

  GeneralBackward MakeCall() {
    GeneralBackward call;
    GeneralProblem& problem = call.problem;
    problem.batch = problem.sequences = s.batch;
    problem.heads = problem.kv_heads = s.heads;
    problem.queries = problem.longest_query = s.queries;
    problem.keys = problem.longest_key = s.keys;
    problem.head_dim = s.size;
    problem.value_dim = s.value_size;
    problem.alpha = s.alpha;
    problem.scale = s.scale;
    problem.causal = s.causal;
    problem.window_left = s.left;
    problem.window_right = s.right;
    if (!s.alpha_per_head.empty()) problem.alpha_per_head = s.alpha_per_head.data();
    if (!s.key_lengths.empty()) problem.key_lengths = s.key_lengths.data();
    if (!s.slopes.empty()) {
      problem.slopes = s.slopes.data();
      call.slope_rows = got_slopes.data();
    }
    if (!query_scale.empty()) {
      problem.query_scale = query_scale.data();
      problem.query_scale_stride[0] = static_cast<int64_t>(s.heads) * s.queries;
      problem.query_scale_stride[1] = s.queries;
      problem.query_scale_stride[2] = 1;
      call.query_scale_rows = got_query_scale.data();
    }
    call.query = Strided(query, s.queries, s.size);
    call.key = Strided(key, s.keys, s.size);
    call.value = Strided(value, s.keys, s.value_size);
    call.output_gradient = Strided(output_gradient, s.queries, s.value_size);
    call.query_gradient = Strided(got_query, s.queries, s.size);
    call.key_gradient = Strided(got_key, s.keys, s.size);
    call.value_gradient = Strided(got_value, s.keys, s.value_size);
    call.saved.threshold = threshold.data();
    if (kShortRows) {
      call.short_rows = ShortBackwardPlan::Of(problem, 2, false);
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
