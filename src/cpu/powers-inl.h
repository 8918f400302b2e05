// p and u = p^(2−α) of a curve as functions of a score's distance from the maximum, in vectors.

#if defined(FLASH_ENTMAX_SRC_CPU_POWERS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_ENTMAX_SRC_CPU_POWERS_INL_H_
#undef FLASH_ENTMAX_SRC_CPU_POWERS_INL_H_
#else
#define FLASH_ENTMAX_SRC_CPU_POWERS_INL_H_
#endif

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/curve.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DoubleTag = hn::ScalableTag<double>;
using FloatTag = hn::ScalableTag<float>;

// A vector of scores in the type that is computed in, from scores of that type or a narrower one.
HWY_INLINE hn::Vec<DoubleTag> LoadScores(DoubleTag d, const double* p) { return hn::LoadU(d, p); }
HWY_INLINE hn::Vec<DoubleTag> LoadScores(DoubleTag d, const float* p) {
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<float, DoubleTag>(), p));
}
HWY_INLINE hn::Vec<FloatTag> LoadScores(FloatTag d, const float* p) { return hn::LoadU(d, p); }

// The whole number n ≥ 2 that `exponent` is, or 0: α = 1.25 and its like need no logarithm. Numbers
// within rounding of α − 1 count: they change p by less than its own rounding.
inline int WholeExponent(double exponent) {
  const double nearest = std::nearbyint(exponent);
  const bool whole = nearest >= 2.0 && nearest <= 16.0 && std::abs(exponent - nearest) <= 4e-15;
  return whole ? static_cast<int>(nearest) : 0;
}

// The numbers of RoughPower() for a type. Polynomials, highest power first, interpolate log2(1 +
// f)/f on [√½ − 1, √2 − 1] and 2^r on [−½, ½] in Chebyshev's points.
template <typename T>
struct RoughPowerTerms;
template <>
struct RoughPowerTerms<float> {
  static constexpr int kMantissa = 23;
  static constexpr int32_t kBias = 127;
  static constexpr int32_t kRootOfHalf = 0x3F3504F3;  // The bits of √½.
  static constexpr float kSmallest = 1.1754944e-38f;  // Normal number.
  static constexpr float kLog[] = {-0.142759734f, 0.232652579f, -0.249271822f, 0.287288882f,
                                   -0.360225182f, 0.480916708f, -0.721352931f, 1.44269499f};
  static constexpr float kPower[] = {0.00133908634f, 0.00967603192f, 0.0555035711f,
                                     0.240221075f,   0.693147188f,   1.0f};
};
template <>
struct RoughPowerTerms<double> {
  static constexpr int kMantissa = 52;
  static constexpr int64_t kBias = 1023;
  static constexpr int64_t kRootOfHalf = 0x3FE6A09E667F3BCD;
  static constexpr double kSmallest = 2.2250738585072014e-308;
  static constexpr double kLog[] = {
      -0.0680628759039059609, 0.131137437536866836, -0.134789287383660427, 0.13062890256021096,
      -0.14252340755410016,   0.160182261302960264, -0.180432685210201169, 0.20610869528306625,
      -0.240446626777273036,  0.28853876232996746,  -0.360673789771006957, 0.480898349072796079,
      -0.721347520343086323,  1.44269504088620331};
  static constexpr double kPower[] = {
      1.3255224878668817e-6,  0.0000153100794022492974, 0.000154034558524538394,
      0.00133334505680006457, 0.00961812915940255819,   0.0555041094120593299,
      0.240226506958129882,   0.693147180545933455,     1.0};
};

// The polynomial with these coefficients, highest power first.
template <class D, typename T, size_t kCount, class V = hn::Vec<D>>
HWY_INLINE V Polynomial(D d, V x, const T (&coefficient)[kCount]) {
  V sum = hn::Set(d, coefficient[0]);
  HWY_UNROLL(16)  // At least kCount, which the compiler does not take here.
  for (size_t i = 1; i < kCount; ++i) sum = hn::MulAdd(x, sum, hn::Set(d, coefficient[i]));
  return sum;
}

// x^exponent for x in [0, 1] (exponent > 0) or [1, ∞) (exponent < 0). 0 where x is below the
// smallest normal number or the result would be.
// In float to about 2e-7·|exponent|: for bounds, which allow for it, and for weights of dense rows,
// which are no better in float. In double to about 2e-12·|exponent|: for scores in float, whose own
// rounding moves p by far more; a third of the cost of a logarithm and an exponential to the last
// digit.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V RoughPower(D d, V x, hn::TFromD<D> exponent) {
  using T = hn::TFromD<D>;
  using Terms = RoughPowerTerms<T>;
  const hn::RebindToSigned<D> di;
  // x = 2^e·(1 + f) with 1 + f in [√½, √2).
  const auto bits = hn::BitCast(di, x);
  const auto e = hn::ShiftRight<Terms::kMantissa>(hn::Sub(bits, hn::Set(di, Terms::kRootOfHalf)));
  const auto f =
      hn::Sub(hn::BitCast(d, hn::Sub(bits, hn::ShiftLeft<Terms::kMantissa>(e))), hn::Set(d, T{1}));
  const auto log = hn::MulAdd(f, Polynomial(d, f, Terms::kLog), hn::ConvertTo(d, e));
  const auto y =
      hn::Max(hn::Mul(log, hn::Set(d, exponent)), hn::Set(d, -static_cast<T>(Terms::kBias)));
  const auto whole = hn::Round(y);
  const auto power = Polynomial(d, hn::Sub(y, whole), Terms::kPower);
  const auto scale = hn::BitCast(d, hn::ShiftLeft<Terms::kMantissa>(hn::Add(
                                        hn::ConvertTo(di, whole), hn::Set(di, Terms::kBias))));
  return hn::IfThenElseZero(hn::Ge(x, hn::Set(d, Terms::kSmallest)), hn::Mul(power, scale));
}

// Above it RoughPower() would be too rough.
constexpr double kMaxRoughExponent = 32.0;

inline bool UsesRoughPower(double exponent) {
  return std::abs(exponent) > 1.0 && std::abs(exponent) <= kMaxRoughExponent &&
         WholeExponent(exponent) == 0;
}

// p and u = p^(2−α) of one curve, as functions of y = m·c + slope·δ (of x = c + δ at m = 0). Lanes
// outside the support, and δ = ∞, give 0. V is a vector of float or double.
template <CurveKind kKind, class D, class V = hn::Vec<D>>
HWY_INLINE void EvaluateCurve(D d, V y, double exponent, V* p, V* u) {
  using T = hn::TFromD<D>;
  const V zero = hn::Zero(d);
  const V one = hn::Set(d, T{1});
  if constexpr (kKind == CurveKind::kSoftmax) {
    *p = hn::Exp(d, hn::Neg(y));
    *u = *p;
  } else if constexpr (kKind == CurveKind::kSparsemax) {
    *p = hn::Max(hn::Sub(one, y), zero);
    *u = hn::IfThenElseZero(hn::Gt(*p, zero), one);
  } else if constexpr (kKind == CurveKind::kSquare) {
    *u = hn::Max(hn::Sub(one, y), zero);
    *p = hn::Mul(*u, *u);
  } else {
    const V t = hn::Sub(one, y);
    if (const int power = WholeExponent(exponent); power != 0) {
      const V base = hn::Max(t, zero);
      *u = base;
      for (int i = 2; i < power; ++i) *u = hn::Mul(*u, base);
      *p = hn::Mul(*u, base);
      return;
    }
    const auto inside =
        hn::And(hn::Gt(t, zero), hn::Lt(hn::Abs(y), hn::Set(d, hwy::HighestValue<T>())));
    // Lanes outside are moved to y = 0, where the logarithm is harmless.
    const V log_t = hn::Log1p(d, hn::IfThenElseZero(inside, hn::Neg(y)));
    const V power = hn::Exp(d, hn::Mul(log_t, hn::Set(d, static_cast<T>(exponent))));
    *p = hn::IfThenElseZero(inside, power);
    *u = hn::IfThenElseZero(inside, hn::Div(power, t));
  }
}

// How the powers of kGeneral are made from t = p^m, decided once for many scores of type T.
struct PowerWay {
  int whole = 0;       // By this many multiplications.
  bool rough = false;  // By RoughPower(): for scores in float alone.

  template <typename T>
  static PowerWay Of(double exponent) {
    return {WholeExponent(exponent), std::is_same_v<T, float> && UsesRoughPower(exponent)};
  }
  // Otherwise by EvaluateCurve(): where t is near 1 and its power high, y = 1 − t has more digits.
  bool from_base() const { return whole != 0 || rough; }
};

// p and u from t = (1 − m·c) − slope·δ, negative outside the support; not for kSoftmax. A large
// support makes 1 − m·c small, and every t with it: rounded once before, t keeps digits that 1 −
// (m·c + slope·δ) has lost.
template <CurveKind kKind, class D, class V = hn::Vec<D>>
HWY_INLINE void EvaluateBase(D d, V t, double exponent, const PowerWay& way, V* p, V* u) {
  using T = hn::TFromD<D>;
  const V zero = hn::Zero(d);
  t = hn::Max(t, zero);
  if constexpr (kKind == CurveKind::kSparsemax) {
    *p = t;
    *u = hn::IfThenElseZero(hn::Gt(t, zero), hn::Set(d, T{1}));
  } else if constexpr (kKind == CurveKind::kSquare) {
    *u = t;
    *p = hn::Mul(t, t);
  } else if (way.whole != 0) {
    *u = t;
    for (int i = 2; i < way.whole; ++i) *u = hn::Mul(*u, t);
    *p = hn::Mul(*u, t);
  } else if (exponent > 0.0) {
    *u = RoughPower(d, t, static_cast<T>(exponent - 1.0));
    *p = hn::Mul(*u, t);
  } else {  // α < 1: t ≥ 1, and p is larger than u.
    *p = RoughPower(d, t, static_cast<T>(exponent));
    *u = hn::Div(*p, t);
  }
}

// A level in the form that many scores are evaluated in.
template <CurveKind kKind, class D>
struct VectorLevel {
  using T = hn::TFromD<D>;
  hn::Vec<D> slope;
  hn::Vec<D> shift;
  hn::Vec<D> top;  // 1 − shift
  double exponent;
  PowerWay way;

  // `Score` is the type of the scores, which says how precise powers have to be.
  template <typename Score>
  static HWY_INLINE VectorLevel Of(D d, const Level& level, Score /*score*/) {
    return {hn::Set(d, static_cast<T>(level.slope)), hn::Set(d, static_cast<T>(level.shift)),
            hn::Set(d, static_cast<T>(1.0 - level.shift)), level.exponent,
            PowerWay::Of<Score>(level.exponent)};
  }

  // Whether EvaluateBase() serves; the same for every score.
  bool from_base() const {
    return kKind != CurveKind::kSoftmax && (kKind != CurveKind::kGeneral || way.from_base());
  }

  // p and u at a distance, without the level's factor. kFromBase is from_base().
  template <bool kFromBase>
  HWY_INLINE void Evaluate(D d, hn::Vec<D> distance, hn::Vec<D>* p, hn::Vec<D>* u) const {
    if constexpr (kFromBase && kKind != CurveKind::kSoftmax) {
      EvaluateBase<kKind>(d, hn::NegMulAdd(slope, distance, top), exponent, way, p, u);
    } else {
      EvaluateCurve<kKind>(d, hn::MulAdd(distance, slope, shift), exponent, p, u);
    }
  }
};

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#endif  // FLASH_ENTMAX_SRC_CPU_POWERS_INL_H_
