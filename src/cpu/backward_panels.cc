#include "cpu/backward_panels.h"

#include <algorithm>

#include "cpu/backward_inputs.h"
#include "cpu/backward_kernels.h"

namespace flash_entmax::cpu {
namespace {

// Pairs of a dense phase that there should be at least, so that threads have work.
constexpr int64_t kDensePairs = 32;

// Rows of one head in the dense way.
struct RowPart {
  int64_t sequence, head, first, end;
};

}  // namespace

std::vector<BackwardPanel> ListBackwardPanels(const ResolvedAttention& resolved,
                                              const SavedLayout& layout, void* saved) {
  std::vector<BackwardPanel> panels;
  for (int64_t s = 0; s < static_cast<int64_t>(resolved.sequences.size()); ++s) {
    const Sequence& sequence = resolved.sequences[static_cast<size_t>(s)];
    const PositionMask& mask = sequence.mask;
    for (int64_t head = 0; head < resolved.heads; ++head) {
      for (int64_t first = 0; first < mask.query_length; first += layout.rows_per_panel) {
        BackwardPanel panel;
        panel.sequence = s;
        panel.head = head;
        panel.group = GroupOf(resolved, s, head);
        panel.first_query = first;
        panel.queries = std::min(layout.rows_per_panel, mask.query_length - first);
        panel.row = FirstRowOf(resolved, sequence, head) + first;
        const SavedRow* rows = layout.Rows(saved) + panel.row;
        for (int64_t r = 0; r < panel.queries; ++r) {
          panel.entries += rows[r].count;
          panel.visible += std::max<int64_t>(0, mask.End(first + r) - mask.First(first + r));
          if (rows[r].count > 0 && rows[r].begin == SavedRow::kNotKept) panel.all_kept = false;
        }
        panels.push_back(panel);
      }
    }
  }
  return panels;
}

std::vector<std::vector<DensePair>> ListDensePhases(const ResolvedAttention& resolved,
                                                    const std::vector<uint8_t>& dense) {
  const auto sequences = static_cast<int64_t>(resolved.sequences.size());
  const auto mask_of = [&](int64_t s) -> const PositionMask& {
    return resolved.sequences[static_cast<size_t>(s)].mask;
  };
  const auto any_dense = [&](int64_t s, int64_t head, int64_t first, int64_t end) {
    const uint8_t* rows =
        dense.data() + FirstRowOf(resolved, resolved.sequences[static_cast<size_t>(s)], head);
    return std::find(rows + first, rows + end, uint8_t{1}) != rows + end;
  };
  int64_t heads = 0;  // With dense rows, in all sequences.
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t head = 0; head < resolved.heads; ++head) {
      if (any_dense(s, head, 0, mask_of(s).query_length)) ++heads;
    }
  }
  if (heads == 0) return {};
  const int64_t parts = (kDensePairs + heads - 1) / heads;
  const auto part_size = [parts](int64_t length) {
    return PaddedWidth((length + parts - 1) / parts, kDenseBlock);
  };
  std::vector<std::vector<RowPart>> rows_of(static_cast<size_t>(sequences * resolved.kv_heads));
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t queries = mask_of(s).query_length;
    for (int64_t head = 0; head < resolved.heads; ++head) {
      auto& rows = rows_of[static_cast<size_t>(GroupOf(resolved, s, head))];
      for (int64_t first = 0; first < queries; first += part_size(queries)) {
        const int64_t end = std::min(first + part_size(queries), queries);
        if (any_dense(s, head, first, end)) rows.push_back({s, head, first, end});
      }
    }
  }
  // In phase t the row part a of a group meets its key part (a + t) mod the larger of both numbers.
  std::vector<std::vector<DensePair>> phases;
  for (const std::vector<RowPart>& rows : rows_of) {
    if (rows.empty()) continue;
    const PositionMask& mask = mask_of(rows[0].sequence);
    if (mask.key_length == 0) continue;
    const int64_t step = part_size(mask.key_length);
    const int64_t key_parts = (mask.key_length + step - 1) / step;
    const int64_t size = std::max(static_cast<int64_t>(rows.size()), key_parts);
    if (phases.size() < static_cast<size_t>(size)) phases.resize(static_cast<size_t>(size));
    for (int64_t phase = 0; phase < size; ++phase) {
      for (size_t a = 0; a < rows.size(); ++a) {
        const RowPart& part = rows[a];
        const int64_t first = (static_cast<int64_t>(a) + phase) % size * step;
        const int64_t end = std::min(first + step, mask.key_length);
        if (first >= end || mask.First(part.first) >= end || mask.End(part.end - 1) <= first) {
          continue;
        }
        phases[static_cast<size_t>(phase)].push_back(
            {part.sequence, part.head, part.first, part.end, first, end});
      }
    }
  }
  return phases;
}

}  // namespace flash_entmax::cpu
