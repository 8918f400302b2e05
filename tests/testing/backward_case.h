// An attention problem with memory for its gradients, run forward and backward, and the comparison
// with the reference.

#ifndef FLASH_ENTMAX_TESTS_TESTING_BACKWARD_CASE_H_
#define FLASH_ENTMAX_TESTS_TESTING_BACKWARD_CASE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "flash_entmax/attention.h"
#include "reference/attention_reference.h"
#include "testing/attention_case.h"
#include "testing/compare.h"
#include "testing/random.h"
#include "testing/report.h"
#include "testing/stored_tensor.h"

namespace flash_entmax::testing {

// Memory aligned to 64 bytes, filled with 0xFF.
class AlignedBytes {
 public:
  explicit AlignedBytes(int64_t bytes) : memory_(static_cast<size_t>(bytes) + 64, 0xFF) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    data_ = memory_.data() + (64 - address % 64) % 64;
  }
  uint8_t* data() const { return data_; }

 private:
  std::vector<uint8_t> memory_;
  uint8_t* data_;
};

// Errors allowed, relative to the largest element of a gradient; 0 chooses by type.
struct BackwardTolerance {
  double relative = 0.0;
};

class BackwardCase {
 public:
  BackwardCase(AttentionCase problem, Random* random, Random* layout = nullptr)
      : data(std::move(problem)) {
    const AttentionShape& shape = data.shape();
    const DType dtype = data.query.dtype();
    output = StoredTensor(dtype, {shape.batch, shape.heads, shape.queries, shape.value_size});
    grad_output = StoredTensor(dtype, output.shape(), layout);
    grad_output.SetValues(random->GaussVector(static_cast<size_t>(grad_output.size())));
    query = StoredTensor(dtype, data.query.shape(), layout);
    key = StoredTensor(dtype, data.key.shape(), layout);
    value = StoredTensor(dtype, data.value.shape(), layout);
    alpha = StoredTensor(DType::kFloat64, {shape.heads}, layout);
    alibi_slopes = StoredTensor(DType::kFloat64, {shape.heads}, layout);
    const AttentionProblem views = data.problem();
    if (views.bias) bias = StoredTensor(DType::kFloat64, data.bias.shape(), layout);
    if (views.query_scale) {
      query_scale = StoredTensor(DType::kFloat64, data.query_scale.shape(), layout);
    }
    ResetViews();
  }

  // All gradients that the problem has.
  void ResetViews() {
    const AttentionProblem views = data.problem();
    gradients = {};
    gradients.output = grad_output.view();
    gradients.query = query.mutable_view();
    gradients.key = key.mutable_view();
    gradients.value = value.mutable_view();
    gradients.alpha = alpha.mutable_view();
    if (views.bias) gradients.bias = bias.mutable_view();
    if (views.alibi_slopes) gradients.alibi_slopes = alibi_slopes.mutable_view();
    if (views.query_scale) gradients.query_scale = query_scale.mutable_view();
  }

  Status Run(AttentionOptions options) {
    options.save_for_backward = true;
    const AttentionProblem problem = data.problem();
    const Expected<AttentionPlan> plan = PlanAttention(problem, options);
    if (!plan.ok()) return plan.status();
    const AlignedBytes memory(plan->saved_bytes);
    const AttentionBuffer saved{memory.data(), plan->saved_bytes};
    AttentionOutputs outputs;
    outputs.output = output.mutable_view();
    if (Status status = AttentionForward(problem, outputs, options, saved); !status.ok()) {
      return status;
    }
    return AttentionBackward(problem, gradients, options, saved);
  }

  // Σ output·grad_output by the reference.
  double Loss() const {
    const std::vector<double> values = reference::AttentionForward(data.problem()).output;
    const std::vector<double> weights = grad_output.Values();
    double sum = 0.0;
    for (size_t i = 0; i < values.size(); ++i) sum += values[i] * weights[i];
    return sum;
  }

  // Empty if every gradient that was asked for is the reference's and no gap was written to.
  std::string Disagreements(const BackwardTolerance& tolerance) const {
    const AttentionProblem problem = data.problem();
    const AttentionShape& shape = data.shape();
    const reference::AttentionGradients want =
        reference::AttentionBackward(problem, grad_output.Values());
    Report report;
    const auto compare = [&](const std::string& name, const MutableTensorView& view,
                             const StoredTensor& got, const std::vector<double>& expected) {
      if (!view) return;
      if (!got.GapsAreIntact()) report.Add(name + ": wrote between its elements");
      const DType computed = data.query.dtype();
      double relative = computed == DType::kFloat64 ? 1e-11 : 3e-5;
      if (tolerance.relative != 0.0) relative = tolerance.relative;
      // Gradients may vanish by cancellation: what is added is of the order of dO·V, and in α of
      // that times log²p.
      const double floor = name == "alpha" ? 10.0 : 1.0;
      double largest = 0.0;
      for (const double x : expected) {
        if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
      }
      const std::vector<double> values = got.Values();
      if (values.size() != expected.size()) report.Add(name + ": wrong size");
      for (size_t i = 0; i < std::min(values.size(), expected.size()); ++i) {
        const double bound = relative * std::max(largest, floor) +
                             EpsilonOf(got.dtype()) * std::fabs(expected[i]) +
                             2.0 * RoundingNearZero(got.dtype());
        report.Expect(name + " " + std::to_string(i), values[i], expected[i], bound);
      }
    };
    compare("query", gradients.query, query, want.query);
    compare("key", gradients.key, key, want.key);
    compare("value", gradients.value, value, want.value);
    compare("alpha", gradients.alpha, alpha, want.alpha);
    compare("alibi_slopes", gradients.alibi_slopes, alibi_slopes, want.alibi_slopes);
    if (problem.query_scale) {
      compare("query_scale", gradients.query_scale, query_scale,
              Reduced(want.query_scale, {shape.batch, shape.heads, shape.queries},
                      query_scale.shape()));
    }
    if (problem.bias) {
      compare(
          "bias", gradients.bias, bias,
          Reduced(want.bias, {shape.batch, shape.heads, shape.queries, shape.keys}, bias.shape()));
    }
    return report.text();
  }

  AttentionCase data;
  StoredTensor output, grad_output;
  StoredTensor query, key, value, alpha, bias, alibi_slopes, query_scale;
  AttentionGradients gradients;

 private:
  // Row-major values of shape `full`, summed to a shape that broadcasts to it.
  static std::vector<double> Reduced(const std::vector<double>& values, const Index& full,
                                     const Index& own) {
    std::vector<double> sums(static_cast<size_t>(Product(own)), 0.0);
    for (size_t i = 0; i < values.size(); ++i) {
      const Index index = Unravel(full, static_cast<int64_t>(i));
      int64_t flat = 0;
      for (size_t d = 0; d < own.size(); ++d) {
        const int64_t at = own[d] == 1 ? 0 : index[index.size() - own.size() + d];
        flat = flat * own[d] + at;
      }
      sums[static_cast<size_t>(flat)] += values[i];
    }
    return sums;
  }
};

}  // namespace flash_entmax::testing

#endif  // FLASH_ENTMAX_TESTS_TESTING_BACKWARD_CASE_H_
