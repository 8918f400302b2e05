// The screens by themselves: they never leave out a key whose product is above the limit.

#include "cpu/screening.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/attention_panel.h"
#include "cpu/screen_int7.h"
#include "cpu/screen_int8.h"
#include "testing/random.h"

namespace flash_entmax::cpu {
namespace {

using testing::Random;

// A tile of random numbers or of the caller's, and what a screen lets through of it.
struct ScreenedTile {
  ScreenedTile(Screening kind, size_t head_size) : screening(kind), depth(head_size) {
    const PanelShape shape = GetPanelShape<float>();
    rows = static_cast<size_t>(kind == Screening::kInt8 ? kInt8Rows : shape.rows_per_group);
    keys = static_cast<size_t>(kind == Screening::kInt8 ? kInt8Keys : shape.keys_per_block);
    stride = (depth + keys - 1) / keys * keys;
    query.resize(rows * stride);
    key.resize(depth * keys);
    std::fill_n(limit, 16, HUGE_VALF);
  }

  float& Query(size_t row, size_t e) { return query[row * stride + e]; }
  float& Key(size_t j, size_t e) { return key[e * keys + j]; }

  void Fill(double query_size, double key_size, Random* random) {
    for (size_t r = 0; r < rows; ++r) {
      for (size_t e = 0; e < depth; ++e) {
        Query(r, e) = static_cast<float>(query_size * random->Gauss());
      }
    }
    for (float& x : key) x = static_cast<float>(key_size * random->Gauss());
  }

  double Product(size_t row, size_t j) {
    double product = 0.0;
    for (size_t e = 0; e < depth; ++e) {
      product += static_cast<double>(Query(row, e)) * static_cast<double>(Key(j, e));
    }
    return product;
  }

  size_t Bytes(size_t count) const {
    return static_cast<size_t>(
        ScreenBytes(screening, static_cast<int64_t>(count), static_cast<int64_t>(depth)));
  }

  bool RoundQueries(const MatrixUnit* unit, std::vector<uint8_t>* rounded, ScreenRows* out) const {
    if (screening == Screening::kInt7) {
      return RoundQueriesInt7(query.data(), stride, depth, rounded->data(), out);
    }
    return RoundQueriesInt8(query.data(), stride, depth, unit != nullptr && unit->Serves(depth),
                            reinterpret_cast<int8_t*>(rounded->data()), out);
  }

  // Bit j of element r: whether key j may be above the limit of row r.
  std::vector<uint32_t> Screen(const MatrixUnit* unit) {
    KeyBlockBound bound;
    for (size_t j = 0; j < keys; ++j) {
      double square = 0.0;
      for (size_t e = 0; e < depth; ++e) square += std::pow(static_cast<double>(Key(j, e)), 2.0);
      const float norm = NormFromSquare(square, static_cast<int64_t>(depth));
      if (!(norm <= bound.norm)) bound.norm = norm;  // So that NaN stays.
    }
    std::vector<uint8_t> rounded_query(Bytes(rows));
    std::vector<uint8_t> rounded_keys(Bytes(keys));
    ScreenRows screen_rows;
    const auto hits = std::make_unique<ScreenHits>();
    constexpr uint32_t kTag = 640;
    EXPECT_TRUE(RoundQueries(unit, &rounded_query, &screen_rows));
    if (screening == Screening::kInt8) {
      RoundKeysInt8(key.data(), depth, rounded_keys.data(), &bound);
      ScreenTileInt8(screen_rows, reinterpret_cast<const int8_t*>(rounded_query.data()), bound,
                     rounded_keys.data(), depth, limit, slack, kTag, hits.get());
      FinishHits(hits.get());
    } else {
      RoundKeysInt7(key.data(), depth, rounded_keys.data(), &bound);
      ScreenTileInt7(screen_rows, rounded_query.data(), bound, rounded_keys.data(), depth, limit,
                     slack, kTag, hits.get());
    }
    std::vector<uint32_t> bits(rows, 0);
    EXPECT_LE(hits->count, rows);
    for (size_t i = 0; i < hits->count; ++i) {
      const uint32_t row = hits->where[i] - kTag;
      EXPECT_LT(row, rows);
      if (row < rows) bits[row] = hits->above[i];
    }
    return bits;
  }

  Screening screening;
  size_t depth;
  size_t rows = 0;
  size_t keys = 0;
  size_t stride = 0;
  std::vector<float> query;  // [rows][stride]
  std::vector<float> key;    // [depth][keys]
  float limit[16];
  float slack = 1e-6f;
};

// Screens random tiles. Nothing above a limit may be left out, and of what is not above at most
// `passing` may be let through.
void CheckRandomTiles(Screening screening, double passing) {
  SCOPED_TRACE(testing::SeedMessage());
  Random random(41);
  const MatrixUnit unit;
  int64_t found = 0;
  int64_t above = 0;
  int64_t all = 0;
  for (int round = 0; round < 400; ++round) {
    ScreenedTile tile(screening, static_cast<size_t>(round % 4 == 0 ? 64 * random.Integer(1, 3)
                                                                    : random.Integer(1, 130)));
    const double query_size = std::pow(10.0, random.Uniform(-12.0, 12.0));
    const double key_size = std::pow(10.0, random.Uniform(-12.0, 12.0));
    tile.Fill(query_size, key_size, &random);
    if (round % 5 == 0) tile.Key(0, 0) *= 50.0f;
    if (round % 7 == 0) std::fill_n(tile.query.begin(), tile.depth, 0.0f);
    const double spread = query_size * key_size * std::sqrt(static_cast<double>(tile.depth));
    for (size_t r = 0; r < tile.rows; ++r) {
      tile.limit[r] = static_cast<float>(spread * random.Uniform(-1.0, 3.0));
    }
    if (round % 11 == 0) tile.limit[3] = -HUGE_VALF;
    if (round % 13 == 0) tile.limit[4] = HUGE_VALF;
    if (round % 17 == 0) std::fill_n(tile.limit, tile.rows, 0.0f);
    const std::vector<uint32_t> bits = tile.Screen(round % 2 == 0 ? &unit : nullptr);
    for (size_t r = 0; r < tile.rows; ++r) {
      for (size_t j = 0; j < tile.keys; ++j) {
        const bool hit = ((bits[r] >> j) & 1u) != 0;
        found += hit ? 1 : 0;
        ++all;
        if (tile.Product(r, j) > static_cast<double>(tile.limit[r])) {
          ++above;
          ASSERT_TRUE(hit) << "round " << round << " row " << r << " key " << j;
        }
      }
    }
  }
  EXPECT_GT(above, 0);
  EXPECT_LE(static_cast<double>(found - above), passing * static_cast<double>(all));
}

// The largest sums that there are: every element is the largest one.
void CheckLargestSums(Screening screening) {
  for (const size_t depth : {size_t{1}, size_t{63}, size_t{64}, static_cast<size_t>(8191),
                             static_cast<size_t>(kMaxScreenDepth)}) {
    ScreenedTile tile(screening, depth);
    for (size_t r = 0; r < tile.rows; ++r) {
      const float sign = r % 2 == 0 ? 1.0f : -1.0f;
      for (size_t e = 0; e < depth; ++e) tile.Query(r, e) = sign * 0.37f;
    }
    for (size_t j = 0; j < tile.keys; ++j) {
      for (size_t e = 0; e < depth; ++e) tile.Key(j, e) = j % 2 == 0 ? 2.9f : -2.9f;
    }
    // Halfway between the products of either sign, and below both: any wrap of a sum is seen.
    for (const bool all : {false, true}) {
      const auto lowest = static_cast<float>(-std::abs(tile.Product(0, 0)) * 1.01);
      std::fill_n(tile.limit, tile.rows, all ? lowest : 0.0f);
      const std::vector<uint32_t> bits = tile.Screen(nullptr);
      for (size_t r = 0; r < tile.rows; ++r) {
        for (size_t j = 0; j < tile.keys; ++j) {
          ASSERT_EQ(((bits[r] >> j) & 1u) != 0, all || tile.Product(r, j) > 0.0)
              << "depth " << depth << " row " << r << " key " << j;
        }
      }
    }
  }
}

// Rounding errors of one operand in line with the other one, and limits one float below a product.
// Random numbers never come near the bounds of the errors.
void CheckErrorsInLine(Screening screening) {
  SCOPED_TRACE(testing::SeedMessage());
  Random random(44);
  // What is nearly half a step of the integers beside an element of 1.
  const double query_step = 0.499 / 127.0;
  const double key_step = 0.499 / (screening == Screening::kInt8 ? 127.0 : 63.0);
  for (int round = 0; round < 600; ++round) {
    ScreenedTile tile(screening, static_cast<size_t>(random.Integer(2, round % 3 == 0 ? 200 : 20)));
    tile.slack = 0.0f;
    // Among them those whose scales have an infinite product.
    const double query_size = round % 4 < 2 ? 1.0 : std::pow(10.0, random.Uniform(-21.0, -15.0));
    const double key_size = round % 4 < 2 ? 1.0 : std::pow(10.0, random.Uniform(-21.0, -15.0));
    const bool query_has_errors = round % 2 == 0;
    // One key with errors among exact ones: the block's bound must come from it.
    const auto inexact = static_cast<size_t>(random.Integer(0, static_cast<int>(tile.keys) - 1));
    for (size_t e = 0; e < tile.depth; ++e) {
      const double sign = random.Integer(0, 1) == 0 ? 1.0 : -1.0;
      for (size_t r = 0; r < tile.rows; ++r) {
        const double x = query_has_errors && e > 0 ? query_step * sign : sign;
        tile.Query(r, e) = static_cast<float>(query_size * x);
      }
      for (size_t j = 0; j < tile.keys; ++j) {
        const double x = !query_has_errors && e > 0 && j == inexact ? key_step * sign : sign;
        tile.Key(j, e) = static_cast<float>(key_size * (j % 3 == 1 ? -x : x));
      }
    }
    for (size_t r = 0; r < tile.rows; ++r) {
      tile.limit[r] = std::nextafter(static_cast<float>(tile.Product(r, inexact)), -HUGE_VALF);
    }
    if (round % 5 == 0) tile.limit[1] = std::nanf("");
    const std::vector<uint32_t> bits = tile.Screen(nullptr);
    for (size_t r = 0; r < tile.rows; ++r) {
      for (size_t j = 0; j < tile.keys; ++j) {
        if (tile.Product(r, j) <= static_cast<double>(tile.limit[r])) continue;
        ASSERT_TRUE(((bits[r] >> j) & 1u) != 0)
            << "round " << round << " row " << r << " key " << j;
      }
    }
  }
}

// A block whose norm is too large, or NaN, is not rounded, and then nothing of it may be left out.
void CheckBlocksThatAreNotRounded(Screening screening) {
  for (const float bad : {3e18f, HUGE_VALF, std::nanf("")}) {
    ScreenedTile tile(screening, 8);
    std::fill(tile.query.begin(), tile.query.end(), 1.0f);
    std::fill(tile.key.begin(), tile.key.end(), bad);
    std::fill_n(tile.limit, tile.rows, 2e18f);
    for (const uint32_t row : tile.Screen(nullptr)) {
      ASSERT_EQ(row, static_cast<uint32_t>((uint64_t{1} << tile.keys) - 1)) << bad;
    }
  }
}

class Screen : public ::testing::TestWithParam<Screening> {
 protected:
  void SetUp() override {
    if (GetParam() == Screening::kInt8 && !CanScreenInt8()) {
      GTEST_SKIP() << "this machine has no 8-bit dot product";
    }
    if (GetParam() == Screening::kInt7 && !CanScreenInt7()) {
      GTEST_SKIP() << "this instruction set has no pmaddubsw";
    }
  }
};

TEST_P(Screen, LeavesOutNothingAboveTheLimit) { CheckRandomTiles(GetParam(), 0.2); }

TEST_P(Screen, ErrorsInLine) { CheckErrorsInLine(GetParam()); }

TEST_P(Screen, LargestSums) { CheckLargestSums(GetParam()); }

TEST_P(Screen, BlocksThatAreNotRounded) { CheckBlocksThatAreNotRounded(GetParam()); }

TEST_P(Screen, RefusesRowsThatAreNotFinite) {
  for (const float bad : {HUGE_VALF, -HUGE_VALF, std::nanf(""), 1e30f}) {
    ScreenedTile tile(GetParam(), 8);
    std::fill(tile.query.begin(), tile.query.end(), 1.0f);
    tile.Query(2, 5) = bad;
    std::vector<uint8_t> rounded(tile.Bytes(tile.rows));
    ScreenRows rows;
    EXPECT_FALSE(tile.RoundQueries(nullptr, &rounded, &rows));
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, Screen, ::testing::Values(Screening::kInt8, Screening::kInt7),
                         [](const auto& kind) {
                           return kind.param == Screening::kInt8 ? "Int8" : "Int7";
                         });

// Otherwise sums of products of bytes would saturate.
TEST(ScreenInt7, FourIntegersOfARowFitIntoASum) {
  if (!CanScreenInt7()) GTEST_SKIP() << "this instruction set has no pmaddubsw";
  SCOPED_TRACE(testing::SeedMessage());
  Random random(43);
  int largest_sum = 0;
  int largest = 0;
  for (int round = 0; round < 300; ++round) {
    ScreenedTile tile(Screening::kInt7, static_cast<size_t>(random.Integer(1, 130)));
    // From nearly equal elements, which fill the sums, to a few large ones, which do not.
    const double power = random.Uniform(0.0, 4.0);
    for (size_t r = 0; r < tile.rows; ++r) {
      for (size_t e = 0; e < tile.depth; ++e) {
        const double x = random.Uniform(-1.0, 1.0);
        tile.Query(r, e) = static_cast<float>(std::copysign(std::pow(std::abs(x), power), x));
      }
    }
    std::vector<uint8_t> rounded(tile.Bytes(tile.rows));
    ScreenRows rows;
    ASSERT_TRUE(tile.RoundQueries(nullptr, &rounded, &rows));
    for (size_t r = 0; r < tile.rows; ++r) {
      const auto size = [&](size_t e) {
        const uint8_t byte = rounded[e / 4 * 4 * tile.rows + 4 * r + e % 4];
        return std::abs(static_cast<int>(static_cast<int8_t>(byte)));
      };
      for (size_t e = 0; e < tile.Bytes(1); e += e % 8 == 0 ? 2 : 6) {
        const int sum = size(e) + size(e + 1) + size(e + 4) + size(e + 5);
        ASSERT_LE(sum * 127, 32767) << "round " << round << " row " << r << " element " << e;
        largest_sum = std::max(largest_sum, sum);
        largest = std::max(largest, size(e));
      }
    }
  }
  // The room is used: of 258, and of 127.
  EXPECT_GE(largest_sum, 255);
  EXPECT_EQ(largest, 127);
}

TEST(ScreenInt8, MatrixUnitAndVectorsFindTheSame) {
  const MatrixUnit unit;
  if (!unit.Serves(64)) GTEST_SKIP() << "this machine has no matrix unit for bytes";
  SCOPED_TRACE(testing::SeedMessage());
  Random random(42);
  constexpr size_t kTiles = 40;
  for (const size_t depth : {size_t{64}, size_t{128}, size_t{256}}) {
    std::vector<float> query(kInt8Rows * depth);
    for (float& x : query) x = static_cast<float>(random.Gauss());
    std::vector<int8_t> rounded_query[2];
    ScreenRows rows[2];
    const auto hits = std::make_unique<std::array<ScreenHits, 2>>();
    for (const size_t matrix : {0, 1}) {
      rounded_query[matrix].resize(kInt8Rows * depth);
      ASSERT_TRUE(RoundQueriesInt8(query.data(), depth, depth, matrix == 1,
                                   rounded_query[matrix].data(), &rows[matrix]));
    }
    float limit[16];
    std::fill_n(limit, 16, HUGE_VALF);
    for (int r = 0; r < kInt8Rows; ++r) {
      limit[r] =
          static_cast<float>(std::sqrt(static_cast<double>(depth)) * random.Uniform(0.0, 4.0));
    }
    // All of them stay until FinishHits().
    std::vector<std::vector<uint8_t>> blocks(kTiles / 2);
    for (size_t tile = 0; tile < kTiles; tile += 2) {
      std::vector<float> keys(depth * kInt8Keys);
      for (float& x : keys) x = static_cast<float>(random.Gauss());
      std::vector<uint8_t>& rounded_keys = blocks[tile / 2];
      rounded_keys.resize(depth * kInt8Keys);
      KeyBlockBound bound;
      bound.norm = 2.0f * std::sqrt(static_cast<float>(depth));
      RoundKeysInt8(keys.data(), depth, rounded_keys.data(), &bound);
      // Twice, as two groups of rows would.
      for (const size_t again : {0, 1}) {
        for (const size_t matrix : {0, 1}) {
          ScreenTileInt8(rows[matrix], rounded_query[matrix].data(), bound, rounded_keys.data(),
                         depth, limit, 1e-6f, static_cast<uint32_t>(16 * (tile + again)),
                         &(*hits)[matrix]);
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

}  // namespace
}  // namespace flash_entmax::cpu
