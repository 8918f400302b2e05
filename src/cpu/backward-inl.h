// What the sparse and the dense way of the backward pass share.

#if defined(FLASH_ENTMAX_SRC_CPU_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_ENTMAX_SRC_CPU_BACKWARD_INL_H_
#undef FLASH_ENTMAX_SRC_CPU_BACKWARD_INL_H_
#else
#define FLASH_ENTMAX_SRC_CPU_BACKWARD_INL_H_
#endif

#include <algorithm>
#include <cstddef>

#include "cpu/backward_kernels.h"
#include "cpu/threshold-inl.h"
#include "cpu/tile-inl.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// −p·(log p)²·φ₂(−m·log p) with φ₂(z) = (e^z − 1 − z)/z²: ∂p/∂α at fixed s − λ, for 0 < p; 0 at
// p = 0. The scalar form and its source are in math/deformed_exp.h.
HWY_INLINE hn::Vec<DoubleTag> AlphaPartial(DoubleTag d, hn::Vec<DoubleTag> p, double m) {
  const auto positive = hn::Gt(p, hn::Zero(d));
  const auto one = hn::Set(d, 1.0);
  const auto log_p = hn::Log(d, hn::IfThenElse(positive, p, one));
  const auto z = hn::Mul(hn::Set(d, -m), log_p);
  // Inside [−1, 1] the series, elsewhere the closed form; z is kept off 0 for the latter.
  const auto small = hn::Le(hn::Abs(z), one);
  const auto inner = hn::IfThenElseZero(small, z);
  auto series = one;
  for (int k = 20; k >= 3; --k) {
    series = hn::MulAdd(hn::Mul(series, inner), hn::Set(d, 1.0 / k), one);
  }
  series = hn::Mul(series, hn::Set(d, 0.5));
  const auto outer = hn::IfThenElse(small, one, z);
  const auto closed =
      hn::Div(hn::Sub(hn::Sub(hn::Exp(d, outer), one), outer), hn::Mul(outer, outer));
  const auto phi = hn::IfThenElse(small, series, closed);
  return hn::IfThenElseZero(positive, hn::Neg(hn::Mul(hn::Mul(p, log_p), hn::Mul(log_p, phi))));
}

HWY_INLINE void StoreAs(DoubleTag d, hn::Vec<DoubleTag> v, double* p) { hn::StoreU(v, d, p); }
HWY_INLINE void StoreAs(DoubleTag /*d*/, hn::Vec<DoubleTag> v, float* p) {
  const hn::Rebind<float, DoubleTag> narrow;
  hn::StoreU(hn::DemoteTo(narrow, v), narrow, p);
}

template <class D>
HWY_INLINE double Total(D d, hn::Vec<D> v) {
  return static_cast<double>(hn::GetLane(hn::SumOfLanes(d, v)));
}

// The query rows [first, first + rows) times their factors, as the forward pass rounds them; zeros
// up to `padded` rows of `width`.
template <typename T>
void ScaleQueries(const BackwardHead<T>& head, int64_t first, int64_t rows, int64_t padded,
                  int64_t width, std::vector<T>* out) {
  out->resize(static_cast<size_t>(padded * width));
  std::fill(out->begin(), out->end(), T{0});
  for (int64_t r = 0; r < rows; ++r) {
    const T* query = head.query.Row(first + r);
    const double factor = head.factor[first + r];
    T* target = out->data() + r * width;
    for (int64_t e = 0; e < head.scores.head_size; ++e) {
      target[e] = static_cast<T>(factor * static_cast<double>(query[e]));
    }
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#endif  // FLASH_ENTMAX_SRC_CPU_BACKWARD_INL_H_
