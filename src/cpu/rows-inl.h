// Walking a row of any length in vectors, without touching memory behind its end.

#if defined(FLASH_ENTMAX_SRC_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_ENTMAX_SRC_CPU_ROWS_INL_H_
#undef FLASH_ENTMAX_SRC_CPU_ROWS_INL_H_
#else
#define FLASH_ENTMAX_SRC_CPU_ROWS_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <limits>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// The last, incomplete vector of a row, with −∞ behind its end.
template <class D, typename T = hn::TFromD<D>>
hn::Vec<D> LoadTail(D d, const T* p, size_t count) {
  HWY_ALIGN T buffer[HWY_MAX_BYTES / sizeof(T)];
  std::fill_n(buffer, hn::Lanes(d), -std::numeric_limits<T>::infinity());
  for (size_t i = 0; i < count && i < hn::Lanes(d); ++i) buffer[i] = p[i];
  return hn::Load(d, buffer);
}

template <class D, typename T = hn::TFromD<D>>
void StoreTail(D d, hn::Vec<D> v, T* p, size_t count) {
  HWY_ALIGN T buffer[HWY_MAX_BYTES / sizeof(T)];
  hn::Store(v, d, buffer);
  for (size_t i = 0; i < count && i < hn::Lanes(d); ++i) p[i] = buffer[i];
}

// Calls body(vector of scores, first index, how many of its lanes are real) over a row.
template <class D, typename T, class Body>
HWY_INLINE void ForEachVector(D d, const T* HWY_RESTRICT scores, size_t n, const Body& body) {
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) body(hn::LoadU(d, scores + i), i, lanes);
  if (i < n) body(LoadTail(d, scores + i, n - i), i, n - i);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#endif  // FLASH_ENTMAX_SRC_CPU_ROWS_INL_H_
