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
#include "cpu/compress-inl.h"
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

// Drops the candidates from `first` on that are at or below the bound.
template <typename T>
void Prune(size_t first, CandidateList<T>* list) {
  const hn::ScalableTag<T> d;
  const hn::Rebind<int32_t, decltype(d)> di;
  const size_t lanes = hn::Lanes(d);
  const auto limit = hn::Set(d, list->bound);
  T* scores = list->score.data();
  int32_t* keys = list->key.data();
  const size_t count = list->count;
  size_t kept = first;
  for (size_t i = first; i < count; i += lanes) {
    const auto score = hn::LoadU(d, scores + i);
    const auto above = hn::Gt(score, limit);
    // In place, in whole vectors: what is written never reaches what has not been read, because
    // kept ≤ i. Behind the end stands −∞.
    const auto key = hn::LoadU(di, keys + i);
    kept += CompressEntries(d, di, score, key, above, scores + kept, keys + kept);
  }
  list->count = kept;
  WriteListEnd(list);
}

// Raises the bound by Newton's method from the left and prunes the list.
template <CurveKind kKind, typename T>
void Refine(const Curve& curve, CandidateList<T>* list) {
  WriteListEnd(list);
  list->offset =
      RaiseLowerBoundIn<kKind, T>(list->score.data(), list->count, curve,
                                  static_cast<double>(list->max), list->offset, kRefineNewtonSteps);
  list->bound = std::max(list->bound, BoundOf(*list, curve));
  Prune(0, list);
  list->scored = list->count;
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

// Makes room for the keys of one more tile.
template <typename T>
HWY_INLINE void MakeRoom(CandidateList<T>* list) {
  if (list->score.size() >= list->count + ListPadding<T>()) return;
  const size_t size = 2 * list->score.size() + ListPadding<T>();
  list->score.resize(size);
  list->key.resize(size);
}

// Takes the scores that were written behind the first `scored` candidates: drops those at or below
// the bound, takes a new maximum, and raises the bound. Everything that a list does with its new
// keys happens here, so that a row's result depends on its scores above its bounds and on nothing
// else, such as the keys that a test in low precision let through.
template <CurveKind kKind, typename T>
void TakeScores(const Curve& curve, CandidateList<T>* list) {
  const hn::ScalableTag<T> d;
  if (list->not_a_number) list->count = list->scored = 0;
  if (list->count == list->scored) return;
  WriteListEnd(list);
  const size_t lanes = hn::Lanes(d);
  const auto infinity = hn::Set(d, Infinity<T>());
  auto max = hn::Set(d, list->max);
  auto finite = hn::FirstN(d, lanes);
  for (size_t i = list->scored; i < list->count; i += lanes) {
    const auto s = hn::LoadU(d, list->score.data() + i);
    finite = hn::And(finite, hn::Lt(s, infinity));
    max = hn::Max(max, s);
  }
  if (!hn::AllTrue(d, finite)) {
    list->not_a_number = true;
    list->bound = Infinity<T>();
    list->count = list->scored = 0;
    return;
  }
  const T new_max = hn::GetLane(hn::MaxOfLanes(d, max));
  Prune(list->scored, list);
  if (list->count == list->scored) return;
  if (new_max > list->max) RaiseMax(new_max, curve, list);
  list->scored = list->count;
  if (list->count >= list->refine_at) Refine<kKind>(curve, list);
}

template <typename T>
void ResetList(CandidateList<T>* list) {
  if (list->score.size() < ListPadding<T>()) {
    list->score.resize(512 + ListPadding<T>());
    list->key.resize(list->score.size());
  }
  list->count = list->scored = 0;
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
