// Every bit pattern of the 16-bit types, and the rounding of floats to them.

#include "math/half.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "testing/random.h"

namespace flash_entmax {
namespace {

using testing::Random;
using testing::SeedMessage;

constexpr uint32_t kPatterns = 65536;

// A 16-bit type by the width of its mantissa, decoded from its definition.
struct Format {
  int mantissa_bits;
  int bias;
};
constexpr Format kBFloat16Format{7, 127};
constexpr Format kFloat16Format{10, 15};

double Decode(const Format& format, uint32_t bits) {
  const uint32_t mantissa = bits & ((1u << format.mantissa_bits) - 1u);
  const int exponent = static_cast<int>((bits & 0x7FFFu) >> format.mantissa_bits);
  const int top = (0x7FFF >> format.mantissa_bits);
  double value = 0.0;
  if (exponent == top) {
    value = mantissa == 0 ? std::numeric_limits<double>::infinity() : std::nan("");
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - format.bias - format.mantissa_bits);
  } else {
    value = std::ldexp(mantissa + (1u << format.mantissa_bits),
                       exponent - format.bias - format.mantissa_bits);
  }
  return (bits & 0x8000u) != 0 ? -value : value;
}

// The pattern that x ≥ 0 rounds to: nearest, ties to the even pattern. Positive patterns are in
// the order of their values; infinity stands where the next larger number would.
uint32_t NearestPattern(const Format& format, double x) {
  const uint32_t infinity = 0x7FFFu & ~((1u << format.mantissa_bits) - 1u);
  uint32_t low = 0;  // Decode(low) ≤ x < Decode(high)
  uint32_t high = infinity;
  if (std::isinf(x)) return infinity;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (Decode(format, middle) <= x ? low : high) = middle;
  }
  const double below = Decode(format, low);
  const double above =
      high == infinity ? 2.0 * below - Decode(format, low - 1) : Decode(format, high);
  if (x - below != above - x) return x - below < above - x ? low : high;
  return low % 2 == 0 ? low : high;
}

// Both types behind one interface.
struct BFloat16Ops {
  static constexpr Format kFormat = kBFloat16Format;
  static float Widen(uint32_t bits) { return ToFloat(BFloat16{static_cast<uint16_t>(bits)}); }
  static uint32_t Narrow(float x) { return ToBFloat16(x).bits; }
};
struct Float16Ops {
  static constexpr Format kFormat = kFloat16Format;
  static float Widen(uint32_t bits) { return ToFloat(Float16{static_cast<uint16_t>(bits)}); }
  static uint32_t Narrow(float x) { return ToFloat16(x).bits; }
};

template <typename Ops>
class HalfTest : public ::testing::Test {
 protected:
  // Checks x and −x.
  static void ExpectRoundsToNearest(float x) {
    const uint32_t want = NearestPattern(Ops::kFormat, std::fabs(static_cast<double>(x)));
    ASSERT_EQ(Ops::Narrow(std::fabs(x)), want) << std::hexfloat << x;
    ASSERT_EQ(Ops::Narrow(-std::fabs(x)), want | 0x8000u) << std::hexfloat << x;
  }
};

using Types = ::testing::Types<BFloat16Ops, Float16Ops>;
TYPED_TEST_SUITE(HalfTest, Types);

TYPED_TEST(HalfTest, EveryPatternHasItsValue) {
  for (uint32_t bits = 0; bits < kPatterns; ++bits) {
    const double want = Decode(TypeParam::kFormat, bits);
    const auto got = static_cast<double>(TypeParam::Widen(bits));
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(got)) << bits;
    } else {
      ASSERT_EQ(std::bit_cast<uint64_t>(got), std::bit_cast<uint64_t>(want)) << bits;
    }
  }
}

TYPED_TEST(HalfTest, EveryPatternSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < kPatterns; ++bits) {
    const float value = TypeParam::Widen(bits);
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(TypeParam::Widen(TypeParam::Narrow(value)))) << bits;
    } else {
      ASSERT_EQ(TypeParam::Narrow(value), bits);
    }
  }
}

TYPED_TEST(HalfTest, RoundsMidpointsToEvenAndTheirNeighboursAway) {
  for (uint32_t bits = 0; bits + 1 < kPatterns / 2; ++bits) {
    const double here = Decode(TypeParam::kFormat, bits);
    const double next = Decode(TypeParam::kFormat, bits + 1);
    if (!std::isfinite(next)) break;
    const auto midpoint = static_cast<float>(0.5 * (here + next));  // Exact.
    this->ExpectRoundsToNearest(midpoint);
    this->ExpectRoundsToNearest(std::nextafter(midpoint, 0.0f));
    this->ExpectRoundsToNearest(std::nextafter(midpoint, std::numeric_limits<float>::infinity()));
  }
}

TYPED_TEST(HalfTest, RoundsRandomFloatsToNearest) {
  SCOPED_TRACE(SeedMessage());
  Random random(1);
  for (int i = 0; i < 300000; ++i) {
    const auto x = std::bit_cast<float>(static_cast<uint32_t>(random.Bits()));
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(TypeParam::Widen(TypeParam::Narrow(x))));
    } else {
      this->ExpectRoundsToNearest(x);
    }
    // Most random patterns are far outside float16's range; these are not.
    this->ExpectRoundsToNearest(
        static_cast<float>(random.Gauss() * std::exp2(random.Uniform(-28, 17))));
  }
}

TYPED_TEST(HalfTest, OverflowsToInfinityAtHalfAStepBeyondTheLargest) {
  const uint32_t infinity = TypeParam::Narrow(std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isinf(TypeParam::Widen(infinity)));
  const double largest = Decode(TypeParam::kFormat, infinity - 1);
  const double step = largest - Decode(TypeParam::kFormat, infinity - 2);
  const auto limit = static_cast<float>(largest + 0.5 * step);
  EXPECT_EQ(TypeParam::Narrow(std::nextafter(limit, 0.0f)), infinity - 1);
  EXPECT_EQ(TypeParam::Narrow(limit), infinity);
  EXPECT_EQ(TypeParam::Narrow(std::numeric_limits<float>::max()), infinity);
}

}  // namespace
}  // namespace flash_entmax
