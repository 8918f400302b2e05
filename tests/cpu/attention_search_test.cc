// The paths of attention's forward pass that only long or dense rows take: screening in small
// integers, key blocks proved zero, dense groups, and the change from lists to dense groups.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "flash_entmax/attention.h"
#include "testing/attention_case.h"
#include "testing/attention_results.h"
#include "testing/random.h"
#include "testing/status.h"

namespace flash_entmax {
namespace {

using testing::AttentionCase;
using testing::AttentionFeatures;
using testing::AttentionResults;
using testing::AttentionShape;
using testing::ExpectMatchesReference;
using testing::IsOk;
using testing::Random;
using testing::SeedMessage;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

AttentionOptions Options(bool screening, int num_threads = 0) {
  AttentionOptions options;
  options.screening = screening;
  options.num_threads = num_threads;
  return options;
}

// Runs with and without screening; the results must be the same bit for bit. Leaves one of them.
void RunBothWays(const AttentionCase& data, DType dtype, AttentionResults* with) {
  AttentionResults without(data.shape(), dtype, nullptr);
  const AttentionProblem problem = data.problem();
  ASSERT_TRUE(IsOk(AttentionForward(problem, with->views(true), Options(true))));
  ASSERT_TRUE(IsOk(AttentionForward(problem, without.views(true), Options(false))));
  ASSERT_EQ(with->output.bytes(), without.output.bytes());
  ASSERT_EQ(with->threshold.bytes(), without.threshold.bytes());
  ASSERT_EQ(with->support.row_offsets, without.support.row_offsets);
  ASSERT_EQ(with->support.key_index, without.support.key_index);
  ASSERT_EQ(with->support.probability, without.support.probability);
}

void RunBothWaysAndCompare(const AttentionCase& data, DType dtype) {
  AttentionResults results(data.shape(), dtype, nullptr);
  RunBothWays(data, dtype, &results);
  if (::testing::Test::HasFatalFailure()) return;
  ExpectMatchesReference(data, data.problem(), results, true);
}

TEST(AttentionSearch, ScreeningChangesNoBit) {
  SCOPED_TRACE(SeedMessage());
  Random random(21);
  const std::vector<DType> dtypes = {DType::kFloat32, DType::kBFloat16, DType::kFloat16,
                                     DType::kFloat32, DType::kFloat64};
  const std::vector<double> alphas = {1.5, 2.0, 1.25, 1.7, 3.0};
  for (uint32_t bits = 0; bits < (1u << AttentionFeatures::kCount); ++bits) {
    const AttentionFeatures features = AttentionFeatures::FromBits(bits);
    // A third of the combinations is enough here: attention_test.cc has all of them.
    if (!features.IsValid() || bits % 3 != 0) continue;
    const AttentionShape shape{1,
                               2,
                               random.Pick<int64_t>({1, 2}),
                               random.Integer(1, 40),
                               random.Integer(500, 1300),
                               random.Pick<int64_t>({1, 3, 16, 20, 64}),
                               random.Integer(1, 20)};
    const DType dtype = dtypes[bits % dtypes.size()];
    const double alpha = alphas[(bits / 8) % alphas.size()];
    std::ostringstream trace;
    trace << "bits " << bits << ": " << features << NameOf(dtype) << " alpha " << alpha << " Nq "
          << shape.queries << " Nk " << shape.keys << " d " << shape.head_size;
    SCOPED_TRACE(trace.str());
    AttentionCase data(shape, features, dtype, alpha, &random, bits % 2 == 0 ? &random : nullptr);
    // Scores of standard deviation 1/2 to 4.
    const double deviation = random.Pick<double>({0.5, 1.0, 2.0, 4.0});
    data.query.SetValues(random.GaussVector(static_cast<size_t>(data.query.size()), deviation));
    AttentionResults results(shape, dtype, nullptr);
    RunBothWays(data, dtype, &results);
    if (HasFatalFailure()) return;
    if (bits % 37 == 0) ExpectMatchesReference(data, data.problem(), results, true);
    if (HasFatalFailure()) return;
  }
}

// Magnitudes at the ends of the range, and mixtures that a common scale of 8 bits suits badly.
TEST(AttentionSearch, ScreeningOfExtremeValues) {
  SCOPED_TRACE(SeedMessage());
  Random random(22);
  const int64_t keys = 1500;
  const int64_t size = 32;
  struct Change {
    std::string name;
    double query;  // Factors of all elements.
    double key;
    bool finite;  // Products do not come near the end of the range.
  };
  const std::vector<Change> changes = {
      {"large keys", 1e-14, 1e15, true},    {"huge keys", 1e-18, 1e19, true},
      {"large scores", 1e8, 1e8, true},     {"overflow", 1e19, 1e20, false},
      {"small keys", 1e20, 1e-20, true},    {"denormal keys", 1e10, 1e-40, true},
      {"denormal queries", 1e-42, 1, true}, {"all tiny", 1e-30, 1e-30, true},
      {"zero keys", 1.0, 0.0, true},        {"zero queries", 0.0, 1.0, true}};
  for (const Change& change : changes) {
    for (const bool causal : {false, true}) {
      SCOPED_TRACE(change.name);
      AttentionFeatures features;
      features.causal = causal;
      AttentionCase data({1, 1, 1, 30, keys, size, 8}, features, DType::kFloat32, 1.5, &random);
      data.query.SetValues(
          random.GaussVector(static_cast<size_t>(data.query.size()), change.query));
      data.key.SetValues(random.GaussVector(static_cast<size_t>(data.key.size()), change.key));
      AttentionResults results(data.shape(), DType::kFloat32, nullptr);
      RunBothWays(data, DType::kFloat32, &results);
      if (HasFatalFailure()) return;
      if (change.finite) ExpectMatchesReference(data, data.problem(), results, true);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(AttentionSearch, ScreeningOfOutliers) {
  SCOPED_TRACE(SeedMessage());
  Random random(23);
  for (const double alpha : {1.2, 1.5, 2.0}) {
    AttentionCase data({1, 1, 1, 30, 2000, 48, 8}, {}, DType::kFloat32, alpha, &random);
    // One channel a hundred times the others, one giant key, one giant query.
    for (int64_t j = 0; j < 2000; ++j) data.key.Set({0, 0, j, 5}, 100.0 + random.Gauss());
    for (int64_t e = 0; e < 48; ++e) {
      data.key.Set({0, 0, 77, e}, 1e4 * random.Gauss());
      data.query.Set({0, 0, 3, e}, 1e5 * random.Gauss());
    }
    SCOPED_TRACE("alpha " + std::to_string(alpha));
    RunBothWaysAndCompare(data, DType::kFloat32);
    if (HasFatalFailure()) return;
  }
}

// Scores set one by one, longer than the keys that start a row, in orders that are bad for bounds.
TEST(AttentionSearch, AdversarialOrders) {
  Random random(24);
  const int64_t keys = 4000;
  for (int order = 0; order < 7; ++order) {
    for (const double alpha : {1.25, 1.5, 1.6, 2.0, 4.0}) {
      SCOPED_TRACE("order " + std::to_string(order) + " alpha " + std::to_string(alpha));
      AttentionCase data({1, 1, 1, 3, keys, 1, 2}, {}, DType::kFloat32, alpha, &random);
      data.query.SetValues({1.0, 0.5, -1.0});
      for (int64_t j = 0; j < keys; ++j) {
        const auto x = static_cast<double>(j);
        const double scores[] = {1e-3 * x,                  // rising
                                 -1e-3 * x,                 // falling
                                 j < 3000 ? 1.0 : 0.0,      // ties behind the first keys
                                 j % 3 == 0 ? 2.0 : 0.0,    // two levels at the edge
                                 j == 0 ? 1e6 : -1e-6 * x,  // one giant, seen last
                                 j < 100 ? 5.0 : 1e-3 * x,  // a crowd, seen last
                                 std::ldexp(1.0, -static_cast<int>(j % 120))};
        data.key.Set({0, 0, j, 0}, scores[order]);
      }
      RunBothWaysAndCompare(data, DType::kFloat32);
      if (HasFatalFailure()) return;
    }
  }
}

// NaN and infinities are found wherever they are, and stay in the rows that see them.
TEST(AttentionSearch, NotANumber) {
  SCOPED_TRACE(SeedMessage());
  Random random(25);
  const int64_t queries = 60;
  const int64_t keys = 1600;
  for (const double bad : {kNaN, HUGE_VAL, -HUGE_VAL}) {
    for (const int64_t key : {0, 31, 32, 700, 1100, 1570, 1599}) {
      AttentionFeatures features;
      features.causal = true;
      AttentionCase data({1, 1, 1, queries, keys, 16, 4}, features, DType::kFloat32, 1.5, &random);
      data.key.Set({0, 0, key, 3}, bad);
      AttentionResults results(data.shape(), DType::kFloat32, nullptr);
      RunBothWays(data, DType::kFloat32, &results);
      if (HasFatalFailure()) return;
      for (int64_t i = 0; i < queries; ++i) {
        // The product is ±∞; −∞ is a mask.
        const double product = bad * data.query.Get({0, 0, i, 3});
        const bool touched = key <= i + keys - queries && !(product < 0.0);
        ASSERT_EQ(std::isnan(results.output.Get({0, 0, i, 0})), touched) << key << " " << i;
      }
    }
  }
  AttentionCase data({1, 1, 1, queries, keys, 16, 4}, {}, DType::kFloat32, 1.5, &random);
  data.query.Set({0, 0, 17, 2}, kNaN);
  AttentionResults results(data.shape(), DType::kFloat32, nullptr);
  RunBothWays(data, DType::kFloat32, &results);
  for (int64_t i = 0; i < queries; ++i) {
    ASSERT_EQ(std::isnan(results.output.Get({0, 0, i, 0})), i == 17) << i;
  }
}

// Position bias makes far blocks zero, to either side.
TEST(AttentionSearch, PositionBias) {
  SCOPED_TRACE(SeedMessage());
  Random random(26);
  for (const double slope : {1e-4, 0.003, 0.1, 1.0, 20.0}) {
    for (const bool causal : {false, true}) {
      for (const bool softcap : {false, true}) {
        for (const int64_t queries : {40, 2500}) {
          AttentionFeatures features;
          features.causal = causal;
          features.alibi = true;
          features.softcap = softcap;
          AttentionCase data({1, 1, 1, queries, 2500, 8, 4}, features, DType::kFloat32, 1.5,
                             &random);
          data.alibi_slopes.SetValues({slope});
          std::ostringstream trace;
          trace << "slope " << slope << " causal " << causal << " softcap " << softcap;
          SCOPED_TRACE(trace.str());
          AttentionResults results(data.shape(), DType::kFloat32, nullptr);
          RunBothWays(data, DType::kFloat32, &results);
          if (HasFatalFailure()) return;
          if (queries == 40) ExpectMatchesReference(data, data.problem(), results, true);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// Rows whose support is most of their keys.
TEST(AttentionSearch, DenseRows) {
  SCOPED_TRACE(SeedMessage());
  Random random(27);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat64}) {
    for (const double alpha : {1.1, 1.25, 1.5, 1.9, 2.0, 2.5}) {
      for (const int64_t keys : {30, 700, 1700}) {
        AttentionFeatures features;
        features.causal = keys != 700;
        features.key_mask = keys == 700;
        AttentionCase data({1, 1, 1, 30, keys, 24, 20}, features, dtype, alpha, &random);
        data.query.SetValues(random.GaussVector(static_cast<size_t>(data.query.size()), 0.05));
        std::ostringstream trace;
        trace << NameOf(dtype) << " alpha " << alpha << " keys " << keys;
        SCOPED_TRACE(trace.str());
        RunBothWaysAndCompare(data, dtype);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// A value that is NaN or infinite counts only where its probability is positive, also in dense
// products.
TEST(AttentionSearch, BadValuesInDenseRows) {
  Random random(28);
  const int64_t queries = 40;
  for (const int64_t keys : {200, 1200}) {
    AttentionFeatures features;
    features.causal = true;
    AttentionCase data({1, 1, 1, queries, keys, 8, 16}, features, DType::kFloat32, 1.5, &random);
    data.query.SetValues(random.GaussVector(static_cast<size_t>(data.query.size()), 0.01));
    const int64_t bad_key = keys - 11;
    data.value.Set({0, 0, bad_key, 3}, kNaN);
    data.value.Set({0, 0, bad_key, 4}, HUGE_VAL);
    AttentionResults results(data.shape(), DType::kFloat32, nullptr);
    RunBothWays(data, DType::kFloat32, &results);
    if (HasFatalFailure()) return;
    for (int64_t i = 0; i < queries; ++i) {
      const bool sees = bad_key <= i + keys - queries;
      ASSERT_EQ(std::isnan(results.output.Get({0, 0, i, 3})), sees) << i;
      ASSERT_EQ(std::isinf(results.output.Get({0, 0, i, 4})), sees) << i;
      ASSERT_TRUE(std::isfinite(results.output.Get({0, 0, i, 5}))) << i;
    }
  }
}

// The newest keys are peaked and the older ones all alike: lists that turn out too long.
TEST(AttentionSearch, ListsThatBecomeDense) {
  SCOPED_TRACE(SeedMessage());
  Random random(29);
  for (const double alpha : {1.3, 1.5, 2.0}) {
    AttentionCase data({1, 1, 1, 20, 3000, 4, 6}, {}, DType::kFloat32, alpha, &random);
    for (int64_t j = 0; j < 3000; ++j) {
      for (int64_t e = 0; e < 4; ++e) {
        data.key.Set({0, 0, j, e}, j < 2300 ? 1.0 : 3.0 * random.Gauss() - 2.0);
      }
    }
    for (int64_t i = 0; i < 20; ++i) {
      for (int64_t e = 0; e < 4; ++e) data.query.Set({0, 0, i, e}, 2.0);
    }
    SCOPED_TRACE("alpha " + std::to_string(alpha));
    RunBothWaysAndCompare(data, DType::kFloat32);
    if (HasFatalFailure()) return;
  }
}

TEST(AttentionSearch, SameBitsForAnyNumberOfThreads) {
  SCOPED_TRACE(SeedMessage());
  Random random(30);
  for (const double deviation : {0.05, 1.0}) {
    AttentionFeatures features;
    features.causal = true;
    features.alibi = true;
    AttentionCase data({1, 4, 2, 120, 2100, 16, 16}, features, DType::kFloat32, 1.5, &random);
    data.query.SetValues(random.GaussVector(static_cast<size_t>(data.query.size()), deviation));
    data.alibi_slopes.SetValues({0.0, 0.01, 0.5, 0.0});
    AttentionResults one(data.shape(), DType::kFloat32, nullptr);
    ASSERT_TRUE(IsOk(AttentionForward(data.problem(), one.views(true), Options(true, 1))));
    for (const int threads : {2, 3, 5}) {
      AttentionResults many(data.shape(), DType::kFloat32, nullptr);
      ASSERT_TRUE(IsOk(AttentionForward(data.problem(), many.views(true), Options(true, threads))));
      EXPECT_EQ(one.output.bytes(), many.output.bytes());
      EXPECT_EQ(one.threshold.bytes(), many.threshold.bytes());
      EXPECT_EQ(one.support.key_index, many.support.key_index);
      EXPECT_EQ(one.support.probability, many.support.probability);
    }
  }
}

}  // namespace
}  // namespace flash_entmax
