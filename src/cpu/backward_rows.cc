// The sparse way of attention's backward pass: work in proportion to the support.
//
// Row pass. A query row is owned by one thread. With p and the keys of its support, saved by the
// forward pass or found again:
//     u = p^(2−α),  dP_j = dO·V_j,  δ = Σ u·dP / Σ u,  dS = u·(dP − δ)
// (Peters, Niculae & Martins 2019, proposition 2), through the cap dS·(1 − tanh²), and
// dQ = factor·Σ dS_j·K_j. Rows of V and K are gathered from the caches; those of K, and of V for
// the next row, are prefetched while the present row computes. The gradient in α is
// Σ ∂p_j/∂α·(dP_j − δ), with the partial at fixed s − λ (DESIGN.md, "Gradient in α").
//
// Rows whose support was not kept: find-support-inl.h.
//
// Column pass. Each entry carries (key, row, p, factor·dS) to the owner of its key, which adds
// p·dO_row to dV and factor·dS·q_row to dK in the order of rows. The keys of one owner are few
// enough for both to stay in its second-level cache; rows come in ascending order, so dO and q are
// read nearly in sequence.
//
// Memory traffic an entry: one row of V, K, dO and q each, and one of dK and dV read and written.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/backward_kernels.h"
#include "cpu/prefetch.h"
#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward_rows.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h, which includes this file once for every instruction set.
#include "cpu/backward-inl.h"
#include "cpu/find-support-inl.h"
#include "cpu/scores-inl.h"
#include "cpu/threshold-inl.h"
#include "cpu/tile-inl.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

// u = p^(2−α) in double, 0 where p is.
template <CurveKind kKind>
HWY_INLINE hn::Vec<DoubleTag> Sensitivity(DoubleTag d, hn::Vec<DoubleTag> p, double alpha) {
  const auto positive = hn::Gt(p, hn::Zero(d));
  if constexpr (kKind == CurveKind::kSoftmax) return p;
  if constexpr (kKind == CurveKind::kSquare) return hn::Sqrt(p);
  if constexpr (kKind == CurveKind::kSparsemax) {
    return hn::IfThenElseZero(positive, hn::Set(d, 1.0));
  }
  const auto log_p = hn::Log(d, hn::IfThenElse(positive, p, hn::Set(d, 1.0)));
  // For α > 2 it grows without bound as p falls.
  const auto exponent = hn::Min(hn::Mul(log_p, hn::Set(d, 2.0 - alpha)), hn::Set(d, 640.0));
  return hn::IfThenElseZero(positive, hn::Exp(d, exponent));
}

// out[i] = left · rows[key[i]], four rows at a time.
template <typename T>
void Dots(const T* HWY_RESTRICT left, const RowsView<const T>& rows, const int32_t* key,
          size_t count, int64_t width, T* HWY_RESTRICT out) {
  const hn::ScalableTag<T> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const T* r0 = rows.Row(key[i]);
    const T* r1 = rows.Row(key[i + 1]);
    const T* r2 = rows.Row(key[i + 2]);
    const T* r3 = rows.Row(key[i + 3]);
    auto a0 = hn::Zero(d);
    auto a1 = a0;
    auto a2 = a0;
    auto a3 = a0;
    for (int64_t e = 0; e < width; e += lanes) {
      const auto l = hn::LoadU(d, left + e);
      a0 = hn::MulAdd(l, hn::LoadU(d, r0 + e), a0);
      a1 = hn::MulAdd(l, hn::LoadU(d, r1 + e), a1);
      a2 = hn::MulAdd(l, hn::LoadU(d, r2 + e), a2);
      a3 = hn::MulAdd(l, hn::LoadU(d, r3 + e), a3);
    }
    out[i] = hn::GetLane(hn::SumOfLanes(d, a0));
    out[i + 1] = hn::GetLane(hn::SumOfLanes(d, a1));
    out[i + 2] = hn::GetLane(hn::SumOfLanes(d, a2));
    out[i + 3] = hn::GetLane(hn::SumOfLanes(d, a3));
  }
  for (; i < count; ++i) {
    const T* r = rows.Row(key[i]);
    auto a = hn::Zero(d);
    for (int64_t e = 0; e < width; e += lanes) {
      a = hn::MulAdd(hn::LoadU(d, left + e), hn::LoadU(d, r + e), a);
    }
    out[i] = hn::GetLane(hn::SumOfLanes(d, a));
  }
}

// out = Σ weight[i]·rows[key[i]].
template <typename T>
void WeightedSum(const T* HWY_RESTRICT weight, const RowsView<const T>& rows, const int32_t* key,
                 size_t count, int64_t width, T* HWY_RESTRICT out) {
  const hn::ScalableTag<T> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t e = 0;
  for (; e + 4 * lanes <= width; e += 4 * lanes) {
    auto a0 = hn::Zero(d);
    auto a1 = a0;
    auto a2 = a0;
    auto a3 = a0;
    for (size_t i = 0; i < count; ++i) {
      const T* HWY_RESTRICT r = rows.Row(key[i]) + e;
      const auto w = hn::Set(d, weight[i]);
      a0 = hn::MulAdd(w, hn::LoadU(d, r), a0);
      a1 = hn::MulAdd(w, hn::LoadU(d, r + lanes), a1);
      a2 = hn::MulAdd(w, hn::LoadU(d, r + 2 * lanes), a2);
      a3 = hn::MulAdd(w, hn::LoadU(d, r + 3 * lanes), a3);
    }
    hn::StoreU(a0, d, out + e);
    hn::StoreU(a1, d, out + e + lanes);
    hn::StoreU(a2, d, out + e + 2 * lanes);
    hn::StoreU(a3, d, out + e + 3 * lanes);
  }
  for (; e < width; e += lanes) {
    auto a = hn::Zero(d);
    for (size_t i = 0; i < count; ++i) {
      a = hn::MulAdd(hn::Set(d, weight[i]), hn::LoadU(d, rows.Row(key[i]) + e), a);
    }
    hn::StoreU(a, d, out + e);
  }
}

// Sets what a row owns, where it does not come from a support.
template <typename T>
void FillRow(const BackwardHead<T>& head, int64_t row, double value, T* grad_query) {
  if (grad_query != nullptr) {
    std::fill_n(grad_query, head.query_width, static_cast<T>(value));
  }
  if (head.grad_alpha != nullptr) head.grad_alpha[row] = value;
  if (head.grad_slope != nullptr) head.grad_slope[row] = value;
  if (head.grad_query_scale != nullptr) head.grad_query_scale[row] = value;
}

// 1 − tanh² of the capped products, for the entries of a row.
template <typename T>
void MultiplyByCapSlope(const BackwardHead<T>& head, int64_t row, const int32_t* key, size_t count,
                        BackwardMemory<T>* memory) {
  const hn::ScalableTag<T> d;
  const size_t lanes = hn::Lanes(d);
  ScaleQueries(head, row, 1, 1, head.query_width, &memory->query);
  std::fill(memory->product.begin(), memory->product.end(), T{0});
  Dots(memory->query.data(), head.key, key, count, head.query_width, memory->product.data());
  const auto cap = hn::Set(d, head.scores.modifiers.softcap);
  for (size_t i = 0; i < count; i += lanes) {
    const auto t = hn::Tanh(d, hn::Div(hn::LoadU(d, &memory->product[i]), cap));
    const auto slope = hn::NegMulAdd(t, t, hn::Set(d, T{1}));
    hn::StoreU(hn::Mul(slope, hn::LoadU(d, &memory->grad_score[i])), d, &memory->grad_score[i]);
  }
}

// One row with its support.
template <CurveKind kKind, typename T>
void RowGradient(const BackwardHead<T>& head, int64_t row, const int32_t* key, const T* probability,
                 size_t count, bool want_entries, bool want_grad_score, T* grad_query,
                 BackwardMemory<T>* memory) {
  const DoubleTag d;
  const size_t lanes = hn::Lanes(d);
  const size_t padded = count + size_t{2} * HWY_MAX_BYTES / sizeof(T);
  if (memory->probability.size() < padded) {
    memory->probability.resize(padded);
    memory->sensitivity.resize(padded);
    memory->grad_probability.resize(padded);
    memory->grad_score.resize(padded);
    memory->product.resize(padded);
  }
  T* p = memory->probability.data();
  T* dp = memory->grad_probability.data();
  T* ds = memory->grad_score.data();
  double* u = memory->sensitivity.data();
  std::copy_n(probability, count, p);
  std::fill_n(p + count, HWY_MAX_BYTES / sizeof(T), T{0});
  std::fill_n(dp + count, HWY_MAX_BYTES / sizeof(T), T{0});
  if (grad_query != nullptr) {
    for (size_t i = 0; i < count; ++i) PrefetchRow(head.key.Row(key[i]), head.query_width);
  }
  Dots(head.grad_output.Row(row), head.value, key, count, head.value_width, dp);
  auto sum_u = hn::Zero(d);
  auto sum_ug = hn::Zero(d);
  for (size_t i = 0; i < count; i += lanes) {
    const auto weight = Sensitivity<kKind>(d, LoadScores(d, p + i), head.alpha);
    hn::StoreU(weight, d, u + i);
    sum_u = hn::Add(sum_u, weight);
    sum_ug = hn::MulAdd(weight, LoadScores(d, dp + i), sum_ug);
  }
  const double delta = Total(d, sum_ug) / Total(d, sum_u);
  const auto mean = hn::Set(d, delta);
  for (size_t i = 0; i < count; i += lanes) {
    StoreAs(d, hn::Mul(hn::LoadU(d, u + i), hn::Sub(LoadScores(d, dp + i), mean)), ds + i);
  }
  if (head.grad_alpha != nullptr) {
    auto sum = hn::Zero(d);
    for (size_t i = 0; i < count; i += lanes) {
      const auto partial = AlphaPartial(d, LoadScores(d, p + i), head.alpha - 1.0);
      sum = hn::MulAdd(partial, hn::Sub(LoadScores(d, dp + i), mean), sum);
    }
    head.grad_alpha[row] = Total(d, sum);
  }
  if (head.grad_slope != nullptr) {
    const int64_t position = head.scores.mask.Position(row);
    double sum = 0.0;
    for (size_t i = 0; i < count; ++i) {
      sum -= static_cast<double>(ds[i]) * static_cast<double>(std::abs(position - key[i]));
    }
    head.grad_slope[row] = sum;
  }
  if (want_grad_score) {
    memory->entry_grad_score.insert(memory->entry_grad_score.end(), ds, ds + count);
  }
  if (head.scores.modifiers.softcap != T{0}) MultiplyByCapSlope(head, row, key, count, memory);
  const double factor = head.factor[row];
  if (grad_query != nullptr) {
    T* out = grad_query;
    WeightedSum(ds, head.key, key, count, head.query_width, out);
    if (head.grad_query_scale != nullptr) {
      const T* query = head.query.Row(row);
      double sum = 0.0;
      for (int64_t e = 0; e < head.scores.head_size; ++e) {
        sum += static_cast<double>(query[e]) * static_cast<double>(out[e]);
      }
      head.grad_query_scale[row] = head.scale * sum;
    }
    for (int64_t e = 0; e < head.query_width; ++e) {
      out[e] = static_cast<T>(factor * static_cast<double>(out[e]));
    }
  }
  if (want_entries) {
    const size_t first = memory->entries.size();
    memory->entries.resize(first + count);
    ColumnEntry<T>* entry = memory->entries.data() + first;
    for (size_t i = 0; i < count; ++i) {
      entry[i] = {key[i], static_cast<int32_t>(row), p[i],
                  static_cast<T>(factor * static_cast<double>(ds[i]))};
    }
  }
}

template <CurveKind kKind, typename T>
void RowsOfKind(const BackwardHead<T>& head, int64_t first, int64_t queries,
                const SavedPanel<T>& saved, bool want_entries, bool want_grad_score,
                BackwardMemory<T>* memory) {
  memory->entries.clear();
  memory->entry_grad_score.clear();
  bool find = false;
  for (int64_t r = 0; r < queries; ++r) {
    const SavedRow& row = saved.row[r];
    find = find || (row.count > 0 && row.begin == SavedRow::kNotKept && head.dense[first + r] == 0);
  }
  if (find) FindSupport<kKind>(head, first, queries, saved, memory);
  for (int64_t r = 0; r < queries; ++r) {
    const SavedRow& row = saved.row[r];
    if (head.dense[first + r] != 0) continue;
    T* grad_query = memory->grad_query.data == nullptr ? nullptr : memory->grad_query.Row(r);
    if (row.not_a_number()) {
      FillRow(head, first + r, std::numeric_limits<double>::quiet_NaN(), grad_query);
      continue;
    }
    const int32_t* key = saved.key + row.begin;
    const T* probability = saved.probability + row.begin;
    auto count = static_cast<size_t>(row.count);
    if (row.begin == SavedRow::kNotKept) {
      const auto& found = memory->found[static_cast<size_t>(r)];
      key = found.key.data();
      probability = found.score.data();
      count = found.count;
    }
    if (count == 0) {
      FillRow(head, first + r, 0.0, grad_query);
      continue;
    }
    if (r + 1 < queries && saved.row[r + 1].begin != SavedRow::kNotKept) {
      const SavedRow& next = saved.row[r + 1];
      for (int32_t i = 0; i < next.count; ++i) {
        PrefetchRow(head.value.Row(saved.key[next.begin + i]), head.value_width);
      }
    }
    RowGradient<kKind>(head, first + r, key, probability, count, want_entries, want_grad_score,
                       grad_query, memory);
  }
}

template <typename T>
void BackwardRowsImpl(const BackwardHead<T>& head, int64_t first, int64_t queries,
                      const SavedPanel<T>& saved, bool want_entries, bool want_grad_score,
                      BackwardMemory<T>* memory) {
  switch (head.scores.curve.kind) {
    case CurveKind::kSoftmax:
      return RowsOfKind<CurveKind::kSoftmax>(head, first, queries, saved, want_entries,
                                             want_grad_score, memory);
    case CurveKind::kSquare:
      return RowsOfKind<CurveKind::kSquare>(head, first, queries, saved, want_entries,
                                            want_grad_score, memory);
    case CurveKind::kSparsemax:
      return RowsOfKind<CurveKind::kSparsemax>(head, first, queries, saved, want_entries,
                                               want_grad_score, memory);
    case CurveKind::kGeneral:
      return RowsOfKind<CurveKind::kGeneral>(head, first, queries, saved, want_entries,
                                             want_grad_score, memory);
  }
}

// target += weight·source. kVectors is the width in vectors where it is known, else 0.
template <int kVectors, typename T>
HWY_INLINE void AddScaled(T weight, const T* HWY_RESTRICT source, int64_t width,
                          T* HWY_RESTRICT target) {
  const hn::ScalableTag<T> d;
  const auto w = hn::Set(d, weight);
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  if constexpr (kVectors != 0) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t e = v * lanes;
      hn::StoreU(hn::MulAdd(w, hn::LoadU(d, source + e), hn::LoadU(d, target + e)), d, target + e);
    }
  } else {
    for (int64_t e = 0; e < width; e += lanes) {
      hn::StoreU(hn::MulAdd(w, hn::LoadU(d, source + e), hn::LoadU(d, target + e)), d, target + e);
    }
  }
}

template <int kVectors, typename T>
void AddColumns(const BackwardHead<T>& head, const ColumnEntry<T>* entries, int64_t count) {
  constexpr int64_t kAhead = 12;  // Entries between a prefetch and its use.
  const RowsView<T> grad_key = head.grad_key;
  const RowsView<T> grad_value = head.grad_value;
  const RowsView<const T> query = head.query;
  const RowsView<const T> grad_output = head.grad_output;
  const int64_t query_width = head.query_width;
  const int64_t value_width = head.value_width;
  const bool want_key = grad_key.data != nullptr;
  const bool want_value = grad_value.data != nullptr;
  const auto prefetch = [&](const ColumnEntry<T>& entry) HWY_ATTR {
    if (want_key) {
      PrefetchRow(grad_key.Row(entry.key), query_width);
      PrefetchRow(query.Row(entry.row), query_width);
    }
    if (want_value) {
      PrefetchRow(grad_value.Row(entry.key), value_width);
      PrefetchRow(grad_output.Row(entry.row), value_width);
    }
  };
  for (int64_t i = 0; i < std::min(count, kAhead); ++i) prefetch(entries[i]);
  for (int64_t i = 0; i < count; ++i) {
    const ColumnEntry<T>& entry = entries[i];
    if (i + kAhead < count) prefetch(entries[i + kAhead]);
    if (want_value) {
      AddScaled<kVectors>(entry.probability, grad_output.Row(entry.row), value_width,
                          grad_value.Row(entry.key));
    }
    if (want_key) {
      AddScaled<kVectors>(entry.weight, query.Row(entry.row), query_width, grad_key.Row(entry.key));
    }
  }
}

template <typename T>
void BackwardColumnsImpl(const BackwardHead<T>& head, const ColumnEntry<T>* entries,
                         int64_t count) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(hn::ScalableTag<T>()));
  const int64_t width = head.query_width == head.value_width ? head.query_width : 0;
  if (width == 4 * lanes) return AddColumns<4>(head, entries, count);
  if (width == 8 * lanes) return AddColumns<8>(head, entries, count);
  AddColumns<0>(head, entries, count);
}

// Highway's tables hold plain functions.
void RowsFloat(const BackwardHead<float>& head, int64_t first, int64_t queries,
               const SavedPanel<float>& saved, bool want_entries, bool want_grad_score,
               BackwardMemory<float>* memory) {
  BackwardRowsImpl(head, first, queries, saved, want_entries, want_grad_score, memory);
}
void RowsDouble(const BackwardHead<double>& head, int64_t first, int64_t queries,
                const SavedPanel<double>& saved, bool want_entries, bool want_grad_score,
                BackwardMemory<double>* memory) {
  BackwardRowsImpl(head, first, queries, saved, want_entries, want_grad_score, memory);
}
void ColumnsFloat(const BackwardHead<float>& head, const ColumnEntry<float>* entries,
                  int64_t count) {
  BackwardColumnsImpl(head, entries, count);
}
void ColumnsDouble(const BackwardHead<double>& head, const ColumnEntry<double>* entries,
                   int64_t count) {
  BackwardColumnsImpl(head, entries, count);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_entmax::cpu {

HWY_EXPORT(RowsFloat);
HWY_EXPORT(RowsDouble);
HWY_EXPORT(ColumnsFloat);
HWY_EXPORT(ColumnsDouble);

template <>
void BackwardRows<float>(const BackwardHead<float>& head, int64_t first, int64_t queries,
                         const SavedPanel<float>& saved, bool want_entries, bool want_grad_score,
                         BackwardMemory<float>* memory) {
  HWY_DYNAMIC_DISPATCH(RowsFloat)
  (head, first, queries, saved, want_entries, want_grad_score, memory);
}
template <>
void BackwardRows<double>(const BackwardHead<double>& head, int64_t first, int64_t queries,
                          const SavedPanel<double>& saved, bool want_entries, bool want_grad_score,
                          BackwardMemory<double>* memory) {
  HWY_DYNAMIC_DISPATCH(RowsDouble)
  (head, first, queries, saved, want_entries, want_grad_score, memory);
}
template <>
void BackwardColumns<float>(const BackwardHead<float>& head, const ColumnEntry<float>* entries,
                            int64_t count) {
  HWY_DYNAMIC_DISPATCH(ColumnsFloat)(head, entries, count);
}
template <>
void BackwardColumns<double>(const BackwardHead<double>& head, const ColumnEntry<double>* entries,
                             int64_t count) {
  HWY_DYNAMIC_DISPATCH(ColumnsDouble)(head, entries, count);
}

}  // namespace flash_entmax::cpu
#endif  // HWY_ONCE
