// One panel of query rows of exact α-entmax attention on a CPU.
//
// α > 1, one pass over the keys (algorithm: DESIGN.md, "One dense product"). A panel is a few
// groups of query rows; a group is as tall as the register tile. Every row has a bound: a threshold
// of keys seen so far, which never exceeds the final one and only rises (facts F1 and F2), so that
// whatever it excludes is an exact zero.
//   1. Opening (opening-inl.h): exact scores of the first half a thousand keys. The maxima of
//      disjoint sets of them give all rows of a group their first bounds at once, without lists;
//      the scores above become the rows' candidate lists. A row that has no more keys ends here.
//   2. Search (search-inl.h), in chunks that double: which of the chunk's keys may be above the
//      bounds? Blocks whose largest possible score is not, by their norm and position, are skipped;
//      the others are tested by a register tile of products of 7- or 8-bit integers with a
//      certified error (screening.h), or of T where the machine or the numbers do not allow that. A
//      tile leaves nothing behind but the few keys that passed.
//   3. After a chunk the keys that passed are scored exactly, each alone, from rows of the keys;
//      those above the bound join the list, and two Newton steps raise the bound. A chunk sees the
//      bounds as they were at its start, so results do not depend on how its keys were tested.
//   4. The threshold is solved on each list in double, and the output summed over the support
//      (finish-inl.h).
// A group whose lists hold a good part of the keys changes to dense products (dense-inl.h).
//
// Keys are visited from the newest to the oldest: in causal rows the newest are the likeliest to
// hold the maximum, and order is free. With a position bias the visit starts at the query's own
// position, and ends where the bias alone proves the rest zero.
//
// Memory traffic: of the keys one byte an element a panel, from the second- or third-level
// cache, and of the few keys that pass and of the support the rows; nothing of size n².
//
// α = 1 runs as flash softmax: softmax-inl.h. α < 1 has no zeros, and takes the dense products.

#include "cpu/attention_panel.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attention_panel.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h, which includes this file once for every instruction set.
#include "cpu/candidates-inl.h"
#include "cpu/dense-inl.h"
#include "cpu/finish-inl.h"
#include "cpu/opening-inl.h"
#include "cpu/scores-inl.h"
#include "cpu/search-inl.h"
#include "cpu/softmax-inl.h"
#include "cpu/threshold-inl.h"
#include "cpu/tile-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

// Key blocks whose scores start a panel's lists. Their scores take the room of the first-level
// cache, and their threshold is not far below that of a row of many thousand keys.
constexpr int64_t kOpeningBlocks = 16;
// A group of rows is dense when its lists hold more than one key in this many.
constexpr int64_t kDenseShare = 8;
// The same where powers are expensive, which makes every score that is kept expensive.
constexpr int64_t kGeneralDenseShare = 3;
// And where the first keys are all there are, so that their scores have been made already.
constexpr int64_t kShortDenseShare = 16;

// When the first groups of a panel, this many, have turned out dense by far, the others are taken
// to be, unseen: their first scores would be made a second time.
constexpr int64_t kDenseOpenings = 2;

// Where a panel starts and how far it has to go.
template <typename T>
Visit MakeVisit(const PanelInput<T>& input) {
  const int64_t last_row = input.first_query + input.queries - 1;
  const BlockRange range = VisibleBlocks(input, input.first_query, last_row);
  Visit visit{range.first, range.end, range.end - 1};
  if (input.modifiers.slope != T{0}) {
    // The keys at the query's own position have no bias against them.
    const int64_t own = input.mask.Position(last_row) / static_cast<int64_t>(TileWidth<T>());
    visit.start = std::clamp(own, range.first, std::max(range.first, range.end - 1));
  }
  return visit;
}

template <typename T>
int64_t OpeningBlocks(const PanelInput<T>& input, const Visit& visit) {
  int64_t blocks = kOpeningBlocks;
  if (input.modifiers.slope != T{0}) {
    // With a steep position bias no key further away than a few times 1/slope counts.
    const double reach = 64.0 / static_cast<double>(input.modifiers.slope);
    const double wanted = static_cast<double>(input.queries) + reach;
    const double width = static_cast<double>(TileWidth<T>());
    blocks = static_cast<int64_t>(
        std::clamp(std::ceil(wanted / width) + 1.0, 2.0, static_cast<double>(blocks)));
  }
  return std::min(blocks, visit.count());
}

inline int64_t DenseShare(const Curve& curve, bool short_rows) {
  if (curve.kind == CurveKind::kGeneral && WholeExponent(curve.exponent) == 0) {
    return kGeneralDenseShare;
  }
  return short_rows ? kShortDenseShare : kDenseShare;
}

// Whether lists cost more than dense products for the group, after the blocks of `seen`.
template <typename T>
bool IsDense(const PanelInput<T>& input, const GroupSearch<T>& group, const BlockRange& seen) {
  size_t listed = 0;
  int64_t visible = 0;
  for (int64_t r = 0; r < group.rows; ++r) {
    listed += group.lists[r].count;
    visible += VisibleKeys(input, group.first_row + r, seen);
  }
  return static_cast<int64_t>(listed) * DenseShare(input.curve, false) > visible;
}

// Norms of a group, and room for its lists.
template <typename T>
void PrepareGroup(const PanelInput<T>& input, int64_t index, PanelMemory<T>* memory,
                  GroupSearch<T>* group) {
  group->first_row = input.first_query + index * kTileRows;
  group->rows = std::min<int64_t>(kTileRows, input.queries - index * kTileRows);
  group->query = input.query + index * kTileRows * input.query_stride;
  group->lists = memory->lists.data() + index * kTileRows;
  for (int64_t r = 0; r < kTileRows; ++r) {
    ResetList(&group->lists[r]);
    const T* row = group->query + r * input.query_stride;
    const hn::ScalableTag<T> d;
    auto square = hn::Zero(d);
    for (int64_t e = 0; e < input.query_stride; e += static_cast<int64_t>(hn::Lanes(d))) {
      const auto x = hn::LoadU(d, row + e);
      square = hn::MulAdd(x, x, square);
    }
    group->norm[r] = static_cast<T>(NormFromSquare(
        static_cast<double>(hn::GetLane(hn::SumOfLanes(d, square))), input.head_size));
  }
  std::fill_n(group->limit, kPaddedRows, Infinity<T>());
}

// The rows of a group as small integers, if its keys are screened.
template <typename T>
void RoundGroup(const PanelInput<T>& input, int64_t index, const MatrixUnit& unit,
                PanelMemory<T>* memory, GroupSearch<T>* group) {
  if constexpr (std::is_same_v<T, float>) {
    const Screening screening = input.table.screening;
    if (screening == Screening::kNone || input.modifiers.bias) return;
    uint8_t* rounded = memory->rounded_query.data() +
                       index * ScreenBytes(screening, int64_t{kTileRows}, input.head_size);
    const auto stride = static_cast<size_t>(input.query_stride);
    const auto depth = static_cast<size_t>(input.head_size);
    const bool can =
        screening == Screening::kInt8
            ? RoundQueriesInt8(group->query, stride, depth, unit.Serves(depth),
                               reinterpret_cast<int8_t*>(rounded), &group->screen_rows)
            : RoundQueriesInt7Impl(group->query, stride, depth, rounded, &group->screen_rows);
    if (can) group->rounded_query = rounded;
  }
}

// The blocks of the visit that can still matter: with a position bias, those near enough that some
// row's largest possible product less the bias is above its bound.
template <typename T>
BlockRange ReachOf(const PanelInput<T>& input, const Visit& visit, const GroupSearch<T>* groups,
                   int64_t group_count) {
  if (input.modifiers.slope == T{0} || input.modifiers.bias) return {visit.first, visit.end};
  const auto slope = static_cast<double>(input.modifiers.slope);
  const auto width = static_cast<int64_t>(TileWidth<T>());
  BlockRange range{visit.end, visit.first};
  for (int64_t g = 0; g < group_count; ++g) {
    if (groups[g].dense) continue;
    for (int64_t r = 0; r < groups[g].rows; ++r) {
      const CandidateList<T>& list = groups[g].lists[r];
      if (list.not_a_number) continue;
      double largest =
          static_cast<double>(groups[g].norm[r]) * static_cast<double>(input.table.largest_norm);
      if (input.modifiers.softcap != T{0}) {
        largest = std::min(largest, static_cast<double>(input.modifiers.softcap));
      }
      // One more key for rounding, and its share of the numbers' sizes.
      const double bound = static_cast<double>(list.bound);
      const double room = (largest - bound + 1e-5 * (largest + std::abs(bound))) / slope + 2.0;
      const int64_t position = input.mask.Position(groups[g].first_row + r);
      // Written so that NaN and infinities reach everywhere.
      if (!(room < 0x1p40)) return {visit.first, visit.end};
      if (!(room >= 0.0)) continue;
      const auto keys = static_cast<int64_t>(room);
      range.first = std::min(range.first, std::max(visit.first, (position - keys) / width));
      range.end = std::max(range.end, std::min(visit.end, (position + keys) / width + 1));
    }
  }
  return range;
}

// Looks for candidates in the visited blocks [begin, end).
template <CurveKind kKind, typename T>
void SearchChunk(const PanelInput<T>& input, const Visit& visit, int64_t begin, int64_t end,
                 const BlockRange& reach, GroupSearch<T>* groups, int64_t group_count,
                 PanelMemory<T>* memory) {
  const auto width = static_cast<int64_t>(TileWidth<T>());
  const int64_t last_row = input.first_query + input.queries - 1;
  const BlockRange chunk = visit.Stretch(begin, end - 1);
  const bool all_visible = chunk.first * width >= input.mask.First(last_row) &&
                           chunk.end * width <= input.mask.End(input.first_query);
  // A position bias changes along the chunk, so its limits are made for a few blocks at a time.
  constexpr int64_t kBlocksPerLimit = 8;
  const int64_t span = input.modifiers.slope != T{0} ? kBlocksPerLimit : end - begin;
  for (int64_t first = begin; first < end; first += span) {
    const int64_t last = std::min(first + span, end) - 1;
    const BlockRange stretch = visit.Stretch(first, last);
    if (stretch.end <= reach.first || stretch.first >= reach.end) continue;
    for (int64_t g = 0; g < group_count; ++g) {
      SetLimits(input, stretch.first * width, stretch.end * width, &groups[g]);
    }
    for (int64_t i = first; i <= last; ++i) {
      const int64_t block = visit.Block(i);
      if (block < reach.first || block >= reach.end) continue;
      const int64_t first_key = block * width;
      for (int64_t g = 0; g < group_count; ++g) {
        GroupSearch<T>& group = groups[g];
        if (group.dense || first_key >= input.mask.End(group.first_row + group.rows - 1) ||
            first_key + width <= input.mask.First(group.first_row)) {
          continue;
        }
        if constexpr (std::is_same_v<T, float>) {
          const bool screen =
              group.rounded_query != nullptr && input.table.bounds[block].norm < kLargestScreenNorm;
          // In the order of the visit, also where the two tests mix.
          if (screen ? !memory->hits.HasRoom() : !memory->hits.IsEmpty()) {
            TakeHits(input, all_visible, groups, &memory->hits);
          }
          if (screen) {
            ScreenBlock(input, block, g, group, &memory->hits);
            continue;
          }
        }
        TestBlock(input, block, &group);
      }
    }
  }
  if constexpr (std::is_same_v<T, float>) {
    TakeHits(input, all_visible, groups, &memory->hits);
  }
  for (int64_t g = 0; g < group_count; ++g) {
    if (!groups[g].dense) ScoreNewKeys<kKind>(input, &groups[g]);
  }
}

template <CurveKind kKind, typename T>
void FinishLists(const PanelInput<T>& input, const GroupSearch<T>& group, bool want_support,
                 PanelMemory<T>* memory) {
  FinishRows<kKind>(input, group.first_row - input.first_query, group.rows, want_support,
                    group.lists, memory);
}

template <CurveKind kKind, typename T>
void CandidatePanel(const PanelInput<T>& input, bool want_support, PanelMemory<T>* memory) {
  const int64_t group_count = (input.queries + kTileRows - 1) / kTileRows;
  const auto rows_padded = static_cast<size_t>(group_count * kTileRows);
  if (memory->lists.size() < rows_padded) memory->lists.resize(rows_padded);
  memory->hits.Clear();
  const MatrixUnit unit;
  GroupSearch<T> groups[kGroupsPerPanel];
  const Visit visit = MakeVisit(input);
  const int64_t opening = OpeningBlocks(input, visit);
  const BlockRange first = opening > 0 ? visit.Stretch(0, opening - 1) : BlockRange{};
  const bool short_rows = opening == visit.count();
  double lambda = -std::numeric_limits<double>::infinity();
  bool dense_by_far = !short_rows;
  for (int64_t g = 0; g < group_count; ++g) {
    GroupSearch<T>& group = groups[g];
    PrepareGroup(input, g, memory, &group);
    if (dense_by_far && g >= kDenseOpenings) {
      group.dense = true;
      continue;
    }
    RoundGroup(input, g, unit, memory, &group);
    if (opening > 0) {
      const double kept =
          OpenGroup<kKind>(input, first, DenseShare(input.curve, short_rows), &group, memory);
      dense_by_far = dense_by_far && kept > 2.0;
    }
    if (!short_rows) continue;
    // These scores are all there are.
    if (group.dense) {
      FinishDense<kKind>(input, group, group.rows, first, want_support, &lambda, memory);
    } else {
      FinishLists<kKind>(input, group, want_support, memory);
    }
  }
  if (short_rows) return;
  // Chunks grow with what has been seen: a bound is stale for at most as many keys as made it.
  for (int64_t begin = opening; begin < visit.count();) {
    const BlockRange reach = ReachOf(input, visit, groups, group_count);
    if (reach.end <= reach.first) break;
    // Beyond the reach nothing is looked at; the visit goes on where it turns upwards.
    const int64_t turn = visit.start - visit.first + 1;
    if (begin < turn && visit.Block(begin) < reach.first) {
      begin = turn;
      continue;
    }
    if (begin >= turn && visit.Block(begin) >= reach.end) break;
    const int64_t end = std::min(visit.count(), 2 * begin);
    SearchChunk<kKind>(input, visit, begin, end, reach, groups, group_count, memory);
    for (int64_t g = 0; g < group_count; ++g) {
      if (!groups[g].dense) {
        groups[g].dense = IsDense(input, groups[g], visit.Stretch(0, end - 1));
      }
    }
    begin = end;
  }
  for (int64_t g = 0; g < group_count;) {
    if (groups[g].dense) {
      g += DenseGroups<kKind>(input, groups + g, group_count - g, want_support, &lambda, memory);
    } else {
      FinishLists<kKind>(input, groups[g++], want_support, memory);
    }
  }
}

// α < 1: every visible key has weight, so there is nothing to search for.
template <typename T>
void DensePanel(const PanelInput<T>& input, bool want_support, PanelMemory<T>* memory) {
  const int64_t group_count = (input.queries + kTileRows - 1) / kTileRows;
  const auto rows_padded = static_cast<size_t>(group_count * kTileRows);
  if (memory->lists.size() < rows_padded) memory->lists.resize(rows_padded);
  GroupSearch<T> groups[kGroupsPerPanel];
  double lambda = -std::numeric_limits<double>::infinity();
  for (int64_t g = 0; g < group_count; ++g) {
    PrepareGroup(input, g, memory, &groups[g]);
    groups[g].dense = true;
  }
  for (int64_t g = 0; g < group_count;) {
    g += DenseGroups<CurveKind::kGeneral>(input, groups + g, group_count - g, want_support, &lambda,
                                          memory);
  }
}

template <typename T>
void RunPanelImpl(const PanelInput<T>& input, bool want_support, PanelMemory<T>* memory) {
  const int64_t rows = (input.queries + kTileRows - 1) / kTileRows * kTileRows;
  memory->output.resize(static_cast<size_t>(rows * input.head.value_width));
  memory->threshold.resize(static_cast<size_t>(rows));
  memory->support_size.clear();
  memory->support_key.clear();
  memory->support_probability.clear();
  memory->mean_rows = memory->mean_entries = 0;
  if (memory->saved != nullptr) memory->means.resize(memory->output.size());
  switch (input.curve.kind) {
    case CurveKind::kSoftmax:
      // The support of softmax is every key, so reporting it needs the lists.
      if (!want_support) return SoftmaxPanel(input, memory);
      return CandidatePanel<CurveKind::kSoftmax>(input, want_support, memory);
    case CurveKind::kSquare:
      return CandidatePanel<CurveKind::kSquare>(input, want_support, memory);
    case CurveKind::kSparsemax:
      return CandidatePanel<CurveKind::kSparsemax>(input, want_support, memory);
    case CurveKind::kGeneral:
      if (input.curve.m < 0.0) return DensePanel(input, want_support, memory);
      return CandidatePanel<CurveKind::kGeneral>(input, want_support, memory);
  }
}

template <typename T>
PanelShape PanelShapeImpl() {
  return {kTileRows, static_cast<int>(TileWidth<T>()), static_cast<int>(TileWidth<T>())};
}

// Highway's tables hold plain functions.
void RunPanelFloat(const PanelInput<float>& input, bool want_support, PanelMemory<float>* memory) {
  RunPanelImpl(input, want_support, memory);
}
void RunPanelDouble(const PanelInput<double>& input, bool want_support,
                    PanelMemory<double>* memory) {
  RunPanelImpl(input, want_support, memory);
}
PanelShape PanelShapeFloat() { return PanelShapeImpl<float>(); }
PanelShape PanelShapeDouble() { return PanelShapeImpl<double>(); }

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_entmax::cpu {

HWY_EXPORT(RunPanelFloat);
HWY_EXPORT(RunPanelDouble);
HWY_EXPORT(PanelShapeFloat);
HWY_EXPORT(PanelShapeDouble);

template <>
PanelShape GetPanelShape<float>() {
  return HWY_DYNAMIC_DISPATCH(PanelShapeFloat)();
}
template <>
PanelShape GetPanelShape<double>() {
  return HWY_DYNAMIC_DISPATCH(PanelShapeDouble)();
}
template <>
void RunPanel<float>(const PanelInput<float>& input, bool want_support,
                     PanelMemory<float>* memory) {
  HWY_DYNAMIC_DISPATCH(RunPanelFloat)(input, want_support, memory);
}
template <>
void RunPanel<double>(const PanelInput<double>& input, bool want_support,
                      PanelMemory<double>* memory) {
  HWY_DYNAMIC_DISPATCH(RunPanelDouble)(input, want_support, memory);
}

}  // namespace flash_entmax::cpu
#endif  // HWY_ONCE
