// Gradients of the mappings over one row.

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/mapping_rows.h"
#include "cpu/targets.h"
#include "math/deformed_exp.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/mapping_backward.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h, which includes this file once for every instruction set.
#include "cpu/rows-inl.h"
#include "cpu/threshold-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

// u = p^(2−α) on the support, else 0.
template <CurveKind kKind, class D, class V>
HWY_INLINE V Sensitivity(D d, V p, double alpha) {
  const V zero = hn::Zero(d);
  using T = hn::TFromD<D>;
  if constexpr (kKind == CurveKind::kSoftmax) {
    return p;
  } else if constexpr (kKind == CurveKind::kSquare) {
    return hn::Sqrt(p);
  } else if constexpr (kKind == CurveKind::kSparsemax) {
    return hn::IfThenElseZero(hn::Gt(p, zero), hn::Set(d, T{1}));
  } else {
    const auto positive = hn::Gt(p, zero);
    const V log_p = hn::Log(d, hn::IfThenElse(positive, p, hn::Set(d, T{1})));
    const V power = hn::Exp(d, hn::Mul(log_p, hn::Set(d, static_cast<T>(2.0 - alpha))));
    return hn::IfThenElseZero(positive, power);
  }
}

template <CurveKind kKind, typename T>
void EntmaxBackward(const T* p, const T* g, size_t n, double alpha, T* out, double* grad_alpha) {
  const hn::ScalableTag<T> d;
  const size_t lanes = hn::Lanes(d);
  const DoubleTag d64;
  const hn::Rebind<T, DoubleTag> half;
  // Sums in double, over vectors of half as many lanes when T is float.
  auto sum_u = hn::Zero(d64);
  auto sum_ug = hn::Zero(d64);
  auto ordered = hn::FirstN(half, hn::Lanes(half));
  const auto add = [&](const T* p_i, const T* g_i) HWY_ATTR {
    const auto probability = hn::LoadU(half, p_i);
    const auto gradient = hn::LoadU(half, g_i);
    const auto both = hn::Add(probability, gradient);
    ordered = hn::And(ordered, hn::Eq(both, both));
    HWY_ALIGN T u_buffer[HWY_MAX_BYTES / sizeof(T)];
    hn::Store(Sensitivity<kKind>(half, probability, alpha), half, u_buffer);
    const auto u = LoadScores(d64, u_buffer);
    // g outside the support does not matter, not even if it is infinite.
    const auto kept = hn::IfThenElseZero(hn::Gt(u, hn::Zero(d64)), LoadScores(d64, g_i));
    sum_u = hn::Add(sum_u, u);
    sum_ug = hn::MulAdd(u, kept, sum_ug);
  };
  const size_t step = hn::Lanes(d64);
  size_t i = 0;
  for (; i + step <= n; i += step) add(p + i, g + i);
  if (i < n) {
    HWY_ALIGN T p_tail[HWY_MAX_BYTES / sizeof(T)] = {};
    HWY_ALIGN T g_tail[HWY_MAX_BYTES / sizeof(T)] = {};
    std::copy_n(p + i, n - i, p_tail);
    std::copy_n(g + i, n - i, g_tail);
    add(p_tail, g_tail);
  }
  if (!hn::AllTrue(half, ordered)) {
    std::fill_n(out, n, std::numeric_limits<T>::quiet_NaN());
    if (grad_alpha != nullptr) *grad_alpha = std::numeric_limits<double>::quiet_NaN();
    return;
  }
  const double total = hn::GetLane(hn::SumOfLanes(d64, sum_u));
  // A row without a support has nothing that could change.
  const double mean = total > 0.0 ? hn::GetLane(hn::SumOfLanes(d64, sum_ug)) / total : 0.0;
  if (grad_alpha != nullptr) {
    *grad_alpha = 0.0;
    for (size_t j = 0; j < n; ++j) {
      if (!(p[j] > T{0})) continue;
      const double centred = static_cast<double>(g[j]) - mean;
      *grad_alpha += DeformedExpAlphaPartial(alpha, static_cast<double>(p[j])) * centred;
    }
  }
  const auto vmean = hn::Set(d, static_cast<T>(mean));
  const auto zero = hn::Zero(d);
  ForEachVector(d, p, n, [&](auto v, size_t j, size_t count) HWY_ATTR {
    const auto u = Sensitivity<kKind>(d, hn::Max(v, zero), alpha);
    const auto gradient = count == lanes ? hn::LoadU(d, g + j) : LoadTail(d, g + j, count);
    const auto grad = hn::IfThenElseZero(hn::Gt(u, zero), hn::Mul(u, hn::Sub(gradient, vmean)));
    if (count == lanes) {
      hn::StoreU(grad, d, out + j);
    } else {
      StoreTail(d, grad, out + j, count);
    }
  });
}

template <typename T>
void MapRowBackwardImpl(const T* p, const T* g, int64_t length, const RowMapping& mapping, T* out,
                        double* grad_alpha) {
  const size_t n = static_cast<size_t>(length);
  switch (Curve::Entmax(mapping.alpha).kind) {
    case CurveKind::kSoftmax:
      return EntmaxBackward<CurveKind::kSoftmax>(p, g, n, mapping.alpha, out, grad_alpha);
    case CurveKind::kSquare:
      return EntmaxBackward<CurveKind::kSquare>(p, g, n, mapping.alpha, out, grad_alpha);
    case CurveKind::kSparsemax:
      return EntmaxBackward<CurveKind::kSparsemax>(p, g, n, mapping.alpha, out, grad_alpha);
    case CurveKind::kGeneral:
      return EntmaxBackward<CurveKind::kGeneral>(p, g, n, mapping.alpha, out, grad_alpha);
  }
}

// Highway's tables hold plain functions.
void BackwardFloat(const float* p, const float* g, int64_t n, const RowMapping& mapping, float* out,
                   double* grad_alpha) {
  MapRowBackwardImpl(p, g, n, mapping, out, grad_alpha);
}
void BackwardDouble(const double* p, const double* g, int64_t n, const RowMapping& mapping,
                    double* out, double* grad_alpha) {
  MapRowBackwardImpl(p, g, n, mapping, out, grad_alpha);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_entmax::cpu {

HWY_EXPORT(BackwardFloat);
HWY_EXPORT(BackwardDouble);

namespace {

// The sums of normmax's and budget's gradients are short; plain loops serve.
template <typename T>
void NormmaxBackward(const T* p, const T* g, int64_t n, double alpha, T* out) {
  const auto weight = [&](double x) { return x > 0.0 ? std::pow(x, 2.0 - alpha) : 0.0; };
  double mean = 0.0;   // p·g
  double power = 0.0;  // Σ p^α
  double check = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double x = static_cast<double>(p[i]);
    const double y = static_cast<double>(g[i]);
    if (std::isnan(x) || std::isnan(y)) check = std::numeric_limits<double>::quiet_NaN();
    if (x > 0.0) {
      mean += x * y;
      power += std::pow(x, alpha);
    }
  }
  // ‖p‖^(α−1)/(α−1)
  const double factor = std::pow(power, (alpha - 1.0) / alpha) / (alpha - 1.0) + check;
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double x = static_cast<double>(p[i]);
    if (x > 0.0) total += factor * weight(x) * (static_cast<double>(g[i]) - mean);
  }
  for (int64_t i = 0; i < n; ++i) {
    const double x = static_cast<double>(p[i]);
    double grad = check;
    if (x > 0.0) grad += factor * weight(x) * (static_cast<double>(g[i]) - mean) - x * total;
    out[i] = static_cast<T>(grad);
  }
}

template <typename T>
void BudgetBackward(const T* p, const T* g, int64_t n, T* out) {
  double sum = 0.0;
  double active = 0.0;
  double check = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(p[i]) || std::isnan(g[i])) check = std::numeric_limits<double>::quiet_NaN();
    if (p[i] > T{0} && p[i] < T{1}) {
      sum += static_cast<double>(g[i]);
      active += 1.0;
    }
  }
  const double mean = active > 0.0 ? sum / active : 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const bool moves = p[i] > T{0} && p[i] < T{1};
    out[i] = static_cast<T>(check + (moves ? static_cast<double>(g[i]) - mean : 0.0));
  }
}

template <typename T, typename Entmax>
void DispatchBackward(const T* p, const T* g, int64_t n, const RowMapping& mapping, T* out,
                      double* grad_alpha, const Entmax& entmax) {
  switch (mapping.kind) {
    case MappingKind::kEntmax:
      return entmax(p, g, n, mapping, out, grad_alpha);
    case MappingKind::kNormmax:
      return NormmaxBackward(p, g, n, mapping.alpha, out);
    case MappingKind::kBudget:
      return BudgetBackward(p, g, n, out);
  }
}

}  // namespace

template <>
void MapRowBackward<float>(const float* p, const float* g, int64_t n, const RowMapping& mapping,
                           float* grad_scores, double* grad_alpha) {
  DispatchBackward(p, g, n, mapping, grad_scores, grad_alpha, [](auto... arguments) {
    HWY_DYNAMIC_DISPATCH(BackwardFloat)(arguments...);
  });
}

template <>
void MapRowBackward<double>(const double* p, const double* g, int64_t n, const RowMapping& mapping,
                            double* grad_scores, double* grad_alpha) {
  DispatchBackward(p, g, n, mapping, grad_scores, grad_alpha, [](auto... arguments) {
    HWY_DYNAMIC_DISPATCH(BackwardDouble)(arguments...);
  });
}

}  // namespace flash_entmax::cpu
#endif  // HWY_ONCE
