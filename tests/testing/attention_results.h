// Attention results beside the reference's, with bounds derived from rounding.

#ifndef FLASH_ENTMAX_TESTS_TESTING_ATTENTION_RESULTS_H_
#define FLASH_ENTMAX_TESTS_TESTING_ATTENTION_RESULTS_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "flash_entmax/attention.h"
#include "reference/attention_reference.h"
#include "testing/attention_case.h"
#include "testing/compare.h"
#include "testing/random.h"
#include "testing/status.h"
#include "testing/stored_tensor.h"

namespace flash_entmax::testing {

// Storage of what a call produces, poisoned.
struct AttentionResults {
  StoredTensor output;
  StoredTensor threshold;
  AttentionSupport support;

  AttentionResults(const AttentionShape& shape, DType dtype, Random* layout)
      : output(dtype, {shape.batch, shape.heads, shape.queries, shape.value_size}, layout),
        threshold(DType::kFloat64, {shape.batch, shape.heads, shape.queries}, layout) {}

  AttentionOutputs views(bool with_support) {
    return {output.mutable_view(), threshold.mutable_view(), with_support ? &support : nullptr};
  }
};

inline double Alpha(const AttentionProblem& problem, int64_t head) {
  return problem.alpha_per_head
             ? ReadElement(problem.alpha_per_head, head * problem.alpha_per_head.strides[0])
             : problem.alpha;
}

// Largest |query|·|key| product sum of a row: what rounding of its scores is relative to.
inline double ScoreMagnitude(const AttentionCase& data, const AttentionProblem& problem, int64_t b,
                             int64_t h, int64_t i) {
  const AttentionShape& shape = data.shape();
  const double scale =
      problem.scale ? *problem.scale : 1.0 / std::sqrt(static_cast<double>(shape.head_size));
  const int64_t kv_head = h / (shape.heads / shape.kv_heads);
  double largest = 0.0;
  for (int64_t j = 0; j < shape.keys; ++j) {
    double sum = 0.0;
    for (int64_t e = 0; e < shape.head_size; ++e) {
      sum += std::fabs(data.query.Get({b, h, i, e}) * data.key.Get({b, kv_head, j, e}));
    }
    if (std::isfinite(sum)) largest = std::max(largest, std::fabs(scale) * sum);
  }
  double factor = 1.0;
  if (problem.query_scale) {
    factor = std::fabs(GetBroadcast(data.query_scale, {b, h, i}));
  }
  return largest * std::max(factor, 1.0) + static_cast<double>(shape.keys) + 8.0;
}

// Compares every row of `results` with the reference. A score carries an error of δ from rounding;
// a probability then moves by p^(2−α)·δ, an output by that times the values, and the support may
// differ only by keys whose score is within δ of the threshold.
inline void ExpectMatchesReference(const AttentionCase& data, const AttentionProblem& problem,
                                   const AttentionResults& results, bool with_support) {
  const AttentionShape& shape = data.shape();
  const DType dtype = results.output.dtype();
  const double epsilon = dtype == DType::kFloat64 ? 0x1p-52 : 0x1p-23;
  double largest_value = 0.0;
  for (const double v : data.value.Values()) {
    if (std::isfinite(v)) largest_value = std::max(largest_value, std::fabs(v));
  }
  int64_t row = 0;
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t h = 0; h < shape.heads; ++h) {
      const double alpha = Alpha(problem, h);
      for (int64_t i = 0; i < shape.queries; ++i, ++row) {
        SCOPED_TRACE("row " + std::to_string(b) + " " + std::to_string(h) + " " +
                     std::to_string(i) + " alpha " + std::to_string(alpha));
        const reference::AttentionRow want = reference::AttentionForwardRow(problem, b, h, i);
        const double delta = 4.0 * epsilon * static_cast<double>(shape.head_size + 8) *
                             ScoreMagnitude(data, problem, b, h, i);
        double sensitivity = 0.0;  // Σ p^(2−α), with p as large as rounding can make it.
        for (const double p : want.probability) {
          const double raised =
              p > 0.0 ? std::max(p, std::pow(delta, 1.0 / std::max(alpha - 1.0, 1e-9))) : 0.0;
          if (raised > 0.0) sensitivity += std::pow(raised, 2.0 - alpha);
        }
        sensitivity = std::isnan(sensitivity) ? 1.0 : std::max(sensitivity, 1.0);
        for (int64_t e = 0; e < shape.value_size; ++e) {
          const double got = results.output.Get({b, h, i, e});
          const double exact = want.output[static_cast<size_t>(e)];
          const double bound = 4.0 * delta * sensitivity * largest_value +
                               EpsilonOf(dtype) * std::fabs(exact) + 2.0 * RoundingNearZero(dtype);
          ASSERT_LE(Error(got, exact), bound) << got << " instead of " << exact;
        }
        const double tau = results.threshold.Get({b, h, i});
        ASSERT_LE(Error(tau, want.threshold), 4.0 * std::max(1.0, alpha) * delta);
        if (!with_support) continue;
        const int64_t begin = results.support.row_offsets[static_cast<size_t>(row)];
        const int64_t end = results.support.row_offsets[static_cast<size_t>(row) + 1];
        std::vector<double> got(want.probability.size(), 0.0);
        for (int64_t entry = begin; entry < end; ++entry) {
          const int32_t key = results.support.key_index[static_cast<size_t>(entry)];
          ASSERT_GE(key, entry == begin
                             ? 0
                             : results.support.key_index[static_cast<size_t>(entry) - 1] + 1);
          ASSERT_LT(static_cast<size_t>(key), got.size());
          got[static_cast<size_t>(key)] =
              static_cast<double>(results.support.probability[static_cast<size_t>(entry)]);
          ASSERT_GT(got[static_cast<size_t>(key)], 0.0);
        }
        if (std::isnan(want.threshold)) {
          ASSERT_EQ(begin, end);
          continue;
        }
        for (size_t j = 0; j < got.size(); ++j) {
          const double p = want.probability[j];
          const double top = std::max(p, got[j]);
          const double slope =
              top > 0.0
                  ? std::pow(std::max(top, std::pow(delta, 1.0 / std::max(alpha - 1.0, 1e-9))),
                             2.0 - alpha)
                  : 0.0;
          ASSERT_LE(Error(got[j], p), 4.0 * delta * std::max(slope, p) + 2e-7 * p + 1e-37);
          // A key whose score is clear of the threshold is in both supports or in neither.
          const double margin = (alpha - 1.0) * want.score[j] - want.threshold;
          if (alpha > 1.0 && std::fabs(margin) > 8.0 * std::max(1.0, alpha) * delta) {
            ASSERT_EQ(got[j] > 0.0, margin > 0.0) << "key " << j;
          }
        }
      }
    }
  }
}

inline void RunAndCompare(const AttentionCase& data, DType dtype, bool with_support, Random* layout,
                          int num_threads = 0) {
  AttentionResults results(data.shape(), dtype, layout);
  const AttentionProblem problem = data.problem();
  ASSERT_TRUE(IsOk(AttentionForward(problem, results.views(with_support), {num_threads})));
  ASSERT_TRUE(results.output.GapsAreIntact());
  ASSERT_TRUE(results.threshold.GapsAreIntact());
  ExpectMatchesReference(data, problem, results, with_support);
}

}  // namespace flash_entmax::testing

#endif  // FLASH_ENTMAX_TESTS_TESTING_ATTENTION_RESULTS_H_
