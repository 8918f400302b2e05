// The 8-bit screen by itself: it never leaves out a key whose product is above the limit.

#include "cpu/screen_int8.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <vector>

#include "testing/random.h"

namespace flash_entmax::cpu {
namespace {

using testing::Random;

TEST(ScreenInt8, LeavesOutNothingAboveTheLimit) {
  if (!CanScreen()) GTEST_SKIP() << "this machine has no 8-bit dot product";
  SCOPED_TRACE(testing::SeedMessage());
  Random random(41);
  const MatrixUnit unit;
  int64_t found = 0;
  int64_t above = 0;
  int64_t all = 0;
  for (int round = 0; round < 400; ++round) {
    const auto depth =
        static_cast<size_t>(round % 4 == 0 ? 64 * random.Integer(1, 3) : random.Integer(1, 130));
    const double query_size = std::pow(10.0, random.Uniform(-12.0, 12.0));
    const double key_size = std::pow(10.0, random.Uniform(-12.0, 12.0));
    std::vector<float> query(kScreenRows * depth);
    std::vector<float> keys(depth * kScreenKeys);
    for (float& x : query) x = static_cast<float>(query_size * random.Gauss());
    for (float& x : keys) x = static_cast<float>(key_size * random.Gauss());
    if (round % 5 == 0) keys[0] *= 50.0f;
    if (round % 7 == 0) std::fill_n(query.begin(), depth, 0.0f);
    const auto padded = static_cast<size_t>(ScreenDepth(static_cast<int64_t>(depth)));
    std::vector<int8_t> rounded_query(kScreenRows * padded);
    std::vector<uint8_t> rounded_keys(padded * kScreenKeys);
    ScreenRows rows;
    const bool matrix = round % 2 == 0 && unit.Serves(depth);
    ASSERT_TRUE(RoundQueries(query.data(), depth, depth, matrix, rounded_query.data(), &rows));
    KeyBlockBound bound;
    for (int j = 0; j < kScreenKeys; ++j) {
      double square = 0.0;
      for (size_t e = 0; e < depth; ++e) {
        const auto x = static_cast<double>(keys[e * kScreenKeys + static_cast<size_t>(j)]);
        square += x * x;
      }
      bound.norm = std::max(bound.norm, NormFromSquare(square, static_cast<int64_t>(depth)));
    }
    RoundKeys(keys.data(), depth, rounded_keys.data(), &bound);
    float limit[16];
    std::fill_n(limit, 16, HUGE_VALF);
    const double spread = query_size * key_size * std::sqrt(static_cast<double>(depth));
    for (int r = 0; r < kScreenRows; ++r) {
      limit[r] = static_cast<float>(spread * random.Uniform(-1.0, 3.0));
    }
    if (round % 11 == 0) limit[3] = -HUGE_VALF;
    if (round % 13 == 0) limit[4] = HUGE_VALF;
    if (round % 17 == 0) std::fill_n(limit, kScreenRows, 0.0f);
    const auto hits = std::make_unique<ScreenHits>();
    ScreenTile(rows, rounded_query.data(), bound, rounded_keys.data(), depth, limit, 1e-6f, 640,
               hits.get());
    FinishHits(hits.get());
    std::vector<uint32_t> bits(kScreenRows, 0);
    ASSERT_LE(hits->count, static_cast<size_t>(kScreenRows));
    for (size_t i = 0; i < hits->count; ++i) {
      ASSERT_GE(hits->where[i], 640u);
      ASSERT_LT(hits->where[i], 640u + kScreenRows);
      bits[hits->where[i] - 640] = hits->above[i];
    }
    for (size_t r = 0; r < kScreenRows; ++r) {
      for (size_t j = 0; j < kScreenKeys; ++j) {
        double product = 0.0;
        for (size_t e = 0; e < depth; ++e) {
          product += static_cast<double>(query[r * depth + e]) *
                     static_cast<double>(keys[e * kScreenKeys + j]);
        }
        const bool hit = ((bits[r] >> j) & 1u) != 0;
        found += hit ? 1 : 0;
        ++all;
        if (product > static_cast<double>(limit[r])) {
          ++above;
          ASSERT_TRUE(hit) << "round " << round << " row " << r << " key " << j;
        }
      }
    }
  }
  // And it is good for something: it lets through few that are not above.
  EXPECT_LE(static_cast<double>(found - above), 0.2 * static_cast<double>(all));
}

TEST(ScreenInt8, MatrixUnitAndVectorsFindTheSame) {
  const MatrixUnit unit;
  if (!unit.Serves(64)) GTEST_SKIP() << "this machine has no matrix unit for bytes";
  SCOPED_TRACE(testing::SeedMessage());
  Random random(42);
  constexpr size_t kTiles = 40;
  for (const size_t depth : {size_t{64}, size_t{128}, size_t{256}}) {
    std::vector<float> query(kScreenRows * depth);
    for (float& x : query) x = static_cast<float>(random.Gauss());
    std::vector<int8_t> rounded_query[2];
    ScreenRows rows[2];
    const auto hits = std::make_unique<std::array<ScreenHits, 2>>();
    for (const size_t matrix : {0, 1}) {
      rounded_query[matrix].resize(kScreenRows * depth);
      ASSERT_TRUE(RoundQueries(query.data(), depth, depth, matrix == 1,
                               rounded_query[matrix].data(), &rows[matrix]));
    }
    float limit[16];
    std::fill_n(limit, 16, HUGE_VALF);
    for (int r = 0; r < kScreenRows; ++r) {
      limit[r] =
          static_cast<float>(std::sqrt(static_cast<double>(depth)) * random.Uniform(0.0, 4.0));
    }
    // All of them stay until FinishHits().
    std::vector<std::vector<uint8_t>> blocks(kTiles / 2);
    for (size_t tile = 0; tile < kTiles; tile += 2) {
      std::vector<float> keys(depth * kScreenKeys);
      for (float& x : keys) x = static_cast<float>(random.Gauss());
      std::vector<uint8_t>& rounded_keys = blocks[tile / 2];
      rounded_keys.resize(depth * kScreenKeys);
      KeyBlockBound bound;
      bound.norm = 2.0f * std::sqrt(static_cast<float>(depth));
      RoundKeys(keys.data(), depth, rounded_keys.data(), &bound);
      // Twice, as two groups of rows would.
      for (const size_t again : {0, 1}) {
        for (const size_t matrix : {0, 1}) {
          ScreenTile(rows[matrix], rounded_query[matrix].data(), bound, rounded_keys.data(), depth,
                     limit, 1e-6f, static_cast<uint32_t>(16 * (tile + again)), &(*hits)[matrix]);
        }
      }
    }
    FinishHits(&(*hits)[1]);
    EXPECT_TRUE((*hits)[0].count > 0);
    ASSERT_EQ((*hits)[0].count, (*hits)[1].count);
    for (size_t i = 0; i < (*hits)[0].count; ++i) {
      ASSERT_EQ((*hits)[0].above[i], (*hits)[1].above[i]);
      ASSERT_EQ((*hits)[0].where[i], (*hits)[1].where[i]);
    }
  }
}

TEST(ScreenInt8, RefusesWhatIsNotFinite) {
  if (!CanScreen()) GTEST_SKIP() << "this machine has no 8-bit dot product";
  for (const float bad : {HUGE_VALF, -HUGE_VALF, std::nanf(""), 1e30f}) {
    std::vector<float> query(kScreenRows * 8, 1.0f);
    query[37] = bad;
    std::vector<int8_t> rounded(kScreenRows * 8);
    ScreenRows rows;
    EXPECT_FALSE(RoundQueries(query.data(), 8, 8, false, rounded.data(), &rows));
  }
}

}  // namespace
}  // namespace flash_entmax::cpu
