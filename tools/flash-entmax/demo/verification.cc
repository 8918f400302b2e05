#include "demo/verification.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <set>
#include <utility>

#include "cpu/parallel.h"
#include "reference/attention_reference.h"

namespace flash_entmax::cli {
namespace {

// Rounding of one operation.
constexpr double kUnit = 0.5 * static_cast<double>(std::numeric_limits<float>::epsilon());

struct RowComparison {
  double error = 0.0;
  double bound = 0.0;
  bool equal_support = true;
  bool possible_support = true;
};

RowComparison CompareRow(const Retrieval& retrieval, const RetrievalSetting& setting,
                         int64_t position, std::span<const float> output,
                         std::span<const KeptKey> kept) {
  const Stretch row = {position, position + 1};
  const AttentionProblem problem = retrieval.ProblemOf(row, setting);
  const reference::AttentionRow expected = reference::AttentionForwardRow(problem, 0, 0, 0);
  const double score_error = setting.scale * static_cast<double>(retrieval.head_size() + 2) * kUnit;
  RowComparison result;
  for (size_t b = 0; b < output.size(); ++b) {
    const double error = std::fabs(static_cast<double>(output[b]) - expected.output[b]);
    // Written so that NaN stays.
    if (!(error <= result.error)) result.error = error;
  }
  double sensitivity = 0.0;
  size_t next = 0;
  const int64_t first_key = Retrieval::FirstKey(row, setting);
  for (size_t j = 0; j < expected.probability.size(); ++j) {
    const double p = expected.probability[j];
    if (p > 0.0) sensitivity += std::pow(p, 2.0 - setting.alpha);
    const bool is_kept =
        next < kept.size() && kept[next].position == first_key + static_cast<int64_t>(j);
    if (is_kept) ++next;
    if (is_kept == (p > 0.0)) continue;
    result.equal_support = false;
    const double margin =
        setting.alpha == 1.0
            ? 0.0
            : std::fabs((setting.alpha - 1.0) * expected.score[j] - expected.threshold);
    const bool at_threshold =
        setting.alpha > 1.0 && margin <= (setting.alpha - 1.0) * 2.0 * score_error;
    const bool vanishes = p < static_cast<double>(std::numeric_limits<float>::min());
    if (!at_threshold && !(vanishes && !is_kept)) result.possible_support = false;
  }
  if (next != kept.size()) result.equal_support = result.possible_support = false;
  result.bound = 2.0 * score_error * sensitivity + 8.0 * kUnit;
  return result;
}

std::vector<int64_t> RandomPositions(const Stretch& positions, int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<int64_t> any(positions.first, positions.end - 1);
  std::set<int64_t> chosen;
  while (static_cast<int64_t>(chosen.size()) < std::min(count, positions.size())) {
    chosen.insert(any(random));
  }
  return {chosen.begin(), chosen.end()};
}

}  // namespace

Expected<Verification> Verify(const Retrieval& retrieval, const Prediction& prediction,
                              const RetrievalSetting& setting, int64_t rows, uint64_t seed) {
  const std::vector<int64_t> positions = RandomPositions(prediction.positions, rows, seed);
  std::vector<std::vector<KeptKey>> kept(positions.size());
  for (size_t n = 0; n < positions.size(); ++n) {
    if (!prediction.row_offsets.empty()) {
      const std::span<const KeptKey> keys = prediction.KeptAt(positions[n]);
      kept[n].assign(keys.begin(), keys.end());
      continue;
    }
    Expected<Prediction> row = retrieval.Predict({positions[n], positions[n] + 1}, setting,
                                                 /*want_support=*/true);
    if (!row.ok()) return row.status();
    kept[n] = std::move(row->kept);
  }
  std::vector<RowComparison> comparisons(positions.size());
  const auto count = static_cast<int64_t>(positions.size());
  cpu::ParallelFor(count, /*grain=*/1, retrieval.threads(), [&](int64_t first, int64_t last, int) {
    for (int64_t n = first; n < last; ++n) {
      const auto row = static_cast<size_t>(n);
      comparisons[row] = CompareRow(retrieval, setting, positions[row],
                                    prediction.DistributionAt(positions[row]), kept[row]);
    }
  });
  Verification result;
  result.rows = count;
  result.passed = true;
  for (const RowComparison& comparison : comparisons) {
    if (!(comparison.error <= result.largest_error) || result.bound == 0.0) {
      result.largest_error = comparison.error;
      result.bound = comparison.bound;
    }
    result.equal_supports += comparison.equal_support ? 1 : 0;
    result.possible_supports += comparison.possible_support ? 1 : 0;
    result.passed =
        result.passed && comparison.error <= comparison.bound && comparison.possible_support;
  }
  return result;
}

}  // namespace flash_entmax::cli
