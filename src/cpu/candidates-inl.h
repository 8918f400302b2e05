// The candidate list of a row: appending hits, raising the bound, pruning.

#if defined(FLASH_ENTMAX_SRC_CPU_CANDIDATES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_ENTMAX_SRC_CPU_CANDIDATES_INL_H_
#undef FLASH_ENTMAX_SRC_CPU_CANDIDATES_INL_H_
#else
#define FLASH_ENTMAX_SRC_CPU_CANDIDATES_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/attention_panel.h"
#include "cpu/scores-inl.h"
#include "cpu/threshold-inl.h"
#include "cpu/tile-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// A list's bound is first raised when it holds this many candidates, and then whenever it has grown
// by half, but by at least this many.
constexpr size_t kRefineStep = 32;
// Newton steps when a bound is raised: it will be raised again, so the last digits do not pay.
constexpr int kRefineNewtonSteps = 2;

// Room behind the last candidate: one tile row is written at a time, and sums read whole vectors.
template <typename T>
constexpr size_t ListPadding() {
  return 2 * TileWidth<T>() + HWY_MAX_BYTES / sizeof(T);
}

template <typename T>
void WriteListEnd(CandidateList<T>* list) {
  const hn::ScalableTag<T> d;
  const auto lowest = hn::Set(d, -Infinity<T>());
  hn::StoreU(lowest, d, list->score.data() + list->count);
  hn::StoreU(lowest, d, list->score.data() + list->count + hn::Lanes(d));
}

// The bound that belongs to max and offset, rounded down past the errors of the comparison.
template <typename T>
T BoundOf(const CandidateList<T>& list, const Curve& curve) {
  const double max = static_cast<double>(list.max);
  const double reach = curve.Reach(list.offset);
  const double slack =
      (std::abs(max) + reach) * 2.0 * static_cast<double>(std::numeric_limits<T>::epsilon());
  return static_cast<T>(max - reach - slack);
}

// Drops the candidates at or below the bound.
template <typename T>
void Prune(CandidateList<T>* list) {
  const hn::ScalableTag<T> d;
  const hn::Rebind<int32_t, decltype(d)> di;
  const size_t lanes = hn::Lanes(d);
  const auto limit = hn::Set(d, list->bound);
  size_t kept = 0;
  for (size_t i = 0; i < list->count; i += lanes) {
    const auto score = hn::LoadU(d, list->score.data() + i);
    // In place: what is written never reaches what has not been read. Behind the end stands −∞.
    const auto above = hn::Gt(score, limit);
    HWY_ALIGN T scores[HWY_MAX_BYTES / sizeof(T)];
    HWY_ALIGN int32_t keys[HWY_MAX_BYTES / sizeof(T)];
    const size_t size = hn::CountTrue(d, above);
    if (size == 0) continue;
    hn::Store(hn::Compress(score, above), d, scores);
    uint8_t bits[8] = {};
    hn::StoreMaskBits(d, above, bits);
    const auto key = hn::LoadU(di, list->key.data() + i);
    hn::StoreU(hn::Compress(key, hn::LoadMaskBits(di, bits)), di, keys);
    std::copy_n(scores, size, list->score.data() + kept);
    std::copy_n(keys, size, list->key.data() + kept);
    kept += size;
  }
  list->count = kept;
  WriteListEnd(list);
}

// Raises the bound by Newton's method from the left and prunes the list.
template <CurveKind kKind, typename T>
void Refine(const Curve& curve, CandidateList<T>* list) {
  WriteListEnd(list);
  list->offset =
      RaiseLowerBound<kKind>(list->score.data(), list->count, curve, static_cast<double>(list->max),
                             list->offset, kRefineNewtonSteps);
  list->bound = std::max(list->bound, BoundOf(*list, curve));
  Prune(list);
  list->refine_at = list->count + std::max(kRefineStep, list->count / 2);
}

// Takes a larger maximum. The offset counts from the maximum, so it falls as the maximum rises:
// λ = max + c stays.
template <typename T>
void RaiseMax(T max, const Curve& curve, CandidateList<T>* list) {
  const double lambda = static_cast<double>(list->max) + list->offset;
  list->max = max;
  list->offset = std::max(0.0, lambda - static_cast<double>(max));
  list->bound = std::max(list->bound, BoundOf(*list, curve));
}

// Appends the scores of one row and one key block that are above the row's bound.
template <CurveKind kKind, typename T>
void AppendHits(const T* HWY_RESTRICT scores, int32_t first_key, const Curve& curve,
                CandidateList<T>* list) {
  const hn::ScalableTag<T> d;
  const hn::Rebind<int32_t, decltype(d)> di;
  const size_t lanes = hn::Lanes(d);
  if (list->not_a_number) return;
  auto max = hn::LoadU(d, scores);
  auto ordered = hn::Eq(max, max);
  for (size_t i = lanes; i < TileWidth<T>(); i += lanes) {
    const auto s = hn::LoadU(d, scores + i);
    ordered = hn::And(ordered, hn::Eq(s, s));
    max = hn::Max(max, s);
  }
  const T block_max = hn::GetLane(hn::MaxOfLanes(d, max));
  if (!hn::AllTrue(d, ordered) || block_max == Infinity<T>()) {
    list->not_a_number = true;
    list->bound = Infinity<T>();
    return;
  }
  if (block_max > list->max) RaiseMax(block_max, curve, list);
  if (list->score.size() < list->count + ListPadding<T>()) {
    const size_t size = 2 * list->score.size() + ListPadding<T>();
    list->score.resize(size);
    list->key.resize(size);
  }
  const auto limit = hn::Set(d, list->bound);
  for (size_t i = 0; i < TileWidth<T>(); i += lanes) {
    const auto s = hn::LoadU(d, scores + i);
    const auto above = hn::Gt(s, limit);
    hn::StoreU(hn::Compress(s, above), d, list->score.data() + list->count);
    uint8_t bits[8] = {};
    hn::StoreMaskBits(d, above, bits);
    const auto key = hn::Iota(di, first_key + static_cast<int32_t>(i));
    hn::StoreU(hn::Compress(key, hn::LoadMaskBits(di, bits)), di, list->key.data() + list->count);
    list->count += hn::CountTrue(d, above);
  }
  if (list->count >= list->refine_at) Refine<kKind>(curve, list);
}

template <typename T>
void ResetList(CandidateList<T>* list) {
  if (list->score.size() < ListPadding<T>()) {
    list->score.resize(512 + ListPadding<T>());
    list->key.resize(list->score.size());
  }
  list->count = 0;
  list->refine_at = kRefineStep;
  list->bound = -Infinity<T>();
  list->max = -Infinity<T>();
  list->offset = 0.0;
  list->not_a_number = false;
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#endif  // FLASH_ENTMAX_SRC_CPU_CANDIDATES_INL_H_
