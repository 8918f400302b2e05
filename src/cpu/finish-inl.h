// The end of a row: exact threshold, probabilities, output, and what the caller wants to keep.

#if defined(FLASH_ENTMAX_SRC_CPU_FINISH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_ENTMAX_SRC_CPU_FINISH_INL_H_
#undef FLASH_ENTMAX_SRC_CPU_FINISH_INL_H_
#else
#define FLASH_ENTMAX_SRC_CPU_FINISH_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/attention_panel.h"
#include "cpu/candidates-inl.h"
#include "cpu/compress-inl.h"
#include "cpu/prefetch.h"
#include "cpu/threshold-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// out = Σ probability·values[key] over the list.
template <typename T>
void AccumulateValues(const CandidateList<T>& list, const T* probability, const PackedHead<T>& head,
                      T* HWY_RESTRICT out) {
  constexpr size_t kChunk = 4;
  const hn::ScalableTag<T> d;
  const size_t lanes = hn::Lanes(d);
  const auto padded = static_cast<size_t>(head.value_width);
  size_t e = 0;
  for (; e + kChunk * lanes <= padded; e += kChunk * lanes) {
    auto a0 = hn::Zero(d);
    auto a1 = a0;
    auto a2 = a0;
    auto a3 = a0;
    for (size_t i = 0; i < list.count; ++i) {
      const T* HWY_RESTRICT v = head.values + list.key[i] * head.value_stride + e;
      const auto p = hn::Set(d, probability[i]);
      a0 = hn::MulAdd(p, hn::LoadU(d, v), a0);
      a1 = hn::MulAdd(p, hn::LoadU(d, v + lanes), a1);
      a2 = hn::MulAdd(p, hn::LoadU(d, v + 2 * lanes), a2);
      a3 = hn::MulAdd(p, hn::LoadU(d, v + 3 * lanes), a3);
    }
    hn::StoreU(a0, d, out + e);
    hn::StoreU(a1, d, out + e + lanes);
    hn::StoreU(a2, d, out + e + 2 * lanes);
    hn::StoreU(a3, d, out + e + 3 * lanes);
  }
  for (; e < padded; e += lanes) {
    auto sum = hn::Zero(d);
    for (size_t i = 0; i < list.count; ++i) {
      const T* HWY_RESTRICT v = head.values + list.key[i] * head.value_stride + e;
      sum = hn::MulAdd(hn::Set(d, probability[i]), hn::LoadU(d, v), sum);
    }
    hn::StoreU(sum, d, out + e);
  }
}

// Probabilities of scores in T at a solved level, and u without the level's factor.
template <CurveKind kKind, typename T>
HWY_INLINE hn::Vec<DoubleTag> EvaluateLevel(DoubleTag d, hn::Vec<DoubleTag> distance,
                                            const Level& level, hn::Vec<DoubleTag>* u) {
  const auto at = VectorLevel<kKind, DoubleTag>::Of(d, level, T{});
  hn::Vec<DoubleTag> p;
  if (at.from_base()) {
    at.template Evaluate<true>(d, distance, &p, u);
  } else {
    at.template Evaluate<false>(d, distance, &p, u);
  }
  return hn::Mul(p, hn::Set(d, level.factor));
}

template <typename T>
HWY_INLINE hn::Vec<hn::Rebind<T, DoubleTag>> ToScores(hn::Vec<DoubleTag> x) {
  if constexpr (std::is_same_v<T, float>) {
    return hn::DemoteTo(hn::Rebind<float, DoubleTag>(), x);
  } else {
    return x;
  }
}

// Probabilities of the list, in T, with room for a vector more; drops the candidates that turn out
// to be zero.
template <CurveKind kKind, typename T>
void Probabilities(const Solution& solution, CandidateList<T>* list, T* probability) {
  const DoubleTag d;
  const hn::Rebind<T, DoubleTag> dt;
  const hn::Rebind<int32_t, DoubleTag> di;
  const size_t lanes = hn::Lanes(d);
  T* scores = list->score.data();
  int32_t* keys = list->key.data();
  const size_t count = list->count;
  const auto max = hn::Set(d, static_cast<double>(list->max));
  size_t kept = 0;
  for (size_t i = 0; i < count; i += lanes) {
    const auto distance = hn::Sub(max, LoadScores(d, scores + i));
    hn::Vec<DoubleTag> unused;
    auto p = EvaluateLevel<kKind, T>(d, distance, solution.level, &unused);
    if (solution.second.factor > 0.0) {
      p = hn::Add(p, EvaluateLevel<kKind, T>(d, distance, solution.second, &unused));
    }
    // Behind the end stands −∞, whose probability is zero. Written in place as Prune() does.
    const auto value = ToScores<T>(p);
    const auto positive = hn::Gt(value, hn::Zero(dt));
    const auto score = hn::LoadU(dt, scores + i);
    const auto key = hn::LoadU(di, keys + i);
    hn::StoreU(CompressLanes(dt, value, positive), dt, probability + kept);
    kept += CompressEntries(dt, di, score, key, positive, scores + kept, keys + kept);
  }
  list->count = kept;
}

// Probabilities are reported in float; positive ones stay positive.
template <typename T>
float ReportedProbability(T probability) {
  return std::max(static_cast<float>(probability), std::numeric_limits<float>::denorm_min());
}

template <typename T>
void AppendSupport(const CandidateList<T>& list, const T* probability, PanelMemory<T>* memory) {
  const size_t first = memory->support_key.size();
  memory->support_size.push_back(static_cast<int64_t>(list.count));
  // Lists run from new key blocks to old ones; the support is reported in ascending order.
  std::vector<size_t> order(list.count);
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return list.key[a] < list.key[b]; });
  memory->support_key.resize(first + list.count);
  memory->support_probability.resize(first + list.count);
  for (size_t i = 0; i < list.count; ++i) {
    memory->support_key[first + i] = list.key[order[i]];
    memory->support_probability[first + i] = ReportedProbability(probability[order[i]]);
  }
}

// A row without a distribution: it sees no key, or one of its scores is NaN or +∞.
template <typename T>
void FinishWithoutThreshold(bool not_a_number, int64_t row, bool want_support, int64_t width,
                            PanelMemory<T>* memory) {
  memory->threshold[static_cast<size_t>(row)] = std::numeric_limits<double>::quiet_NaN();
  std::fill_n(memory->output.data() + row * width, width,
              not_a_number ? std::numeric_limits<T>::quiet_NaN() : T{0});
  if (want_support) memory->support_size.push_back(0);
  if (memory->saved != nullptr) {
    not_a_number ? memory->saved->AddNotANumber() : memory->saved->AddEmpty();
  }
}

// Exact threshold and probabilities of one row from its candidates; nothing if it has no threshold.
template <CurveKind kKind, typename T>
std::optional<Solution> SolveRow(const PanelInput<T>& input, CandidateList<T>* list,
                                 AlignedVector<T>* probability) {
  if (list->not_a_number || list->count == 0) return std::nullopt;
  WriteListEnd(list);
  const Curve& curve = input.curve;
  const double max = static_cast<double>(list->max);
  const Solution solution =
      kKind == CurveKind::kGeneral
          ? SolveLean<kKind>(list->score.data(), list->count, curve, max, list->offset)
          : SolveCurve<kKind>(list->score.data(), list->count, curve, max, list->offset);
  const size_t room = list->count + ListPadding<T>();
  if (probability->size() < room) probability->resize(room);
  Probabilities<kKind>(solution, list, probability->data());
  // The values arrive while the next row is solved.
  for (size_t i = 0; i < std::min<size_t>(list->count, 64); ++i) {
    PrefetchRow(input.head.values + list->key[i] * input.head.value_stride, input.head.value_width);
  }
  return solution;
}

// Output of a row, solved if it has a threshold, and what is kept of it.
template <typename T>
void EmitRow(const PanelInput<T>& input, int64_t row, bool want_support,
             const CandidateList<T>& list, const std::optional<Solution>& solution,
             const T* probability, PanelMemory<T>* memory) {
  if (!solution) {
    return FinishWithoutThreshold(list.not_a_number, row, want_support, input.head.value_width,
                                  memory);
  }
  memory->threshold[static_cast<size_t>(row)] = solution->threshold;
  AccumulateValues(list, probability, input.head,
                   memory->output.data() + row * input.head.value_width);
  if (memory->saved != nullptr) {
    memory->saved->Add(static_cast<double>(list.max), LevelNumber(input.curve, solution->level),
                       list.key.data(), probability, static_cast<int64_t>(list.count));
  }
  if (want_support) AppendSupport(list, probability, memory);
}

// Finishes `rows` rows of the panel from `first` on.
template <CurveKind kKind, typename T>
void FinishRows(const PanelInput<T>& input, int64_t first, int64_t rows, bool want_support,
                CandidateList<T>* lists, PanelMemory<T>* memory) {
  std::optional<Solution> solution[2];
  for (int64_t r = 0; r <= rows; ++r) {
    if (r < rows) {
      solution[r % 2] = SolveRow<kKind>(input, &lists[r], &memory->probability[r % 2]);
    }
    if (r == 0) continue;
    const int64_t before = (r - 1) % 2;
    EmitRow(input, first + r - 1, want_support, lists[r - 1], solution[before],
            memory->probability[before].data(), memory);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#endif  // FLASH_ENTMAX_SRC_CPU_FINISH_INL_H_
