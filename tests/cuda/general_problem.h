// A problem for the kernels of the general engine: inputs drawn at random and, in double, what the
// forward and the backward make of them.
#ifndef FLASH_ENTMAX_TESTS_CUDA_GENERAL_PROBLEM_H_
#define FLASH_ENTMAX_TESTS_CUDA_GENERAL_PROBLEM_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "general/problem.h"
#include "testing/random.h"

namespace flash_entmax::cuda {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <class Element>
Element Bad() {
  return Element(kNan);
}

struct Settings {
  int batch = 2, heads = 3, queries = 90, keys = 90, size = 32, value_size = 32;
  bool causal = true;
  int left = GeneralProblem::kUnlimited, right = GeneralProblem::kUnlimited;
  float alpha = 1.5f;
  float scale = 0.1767767f;
  float deviation = 1.0f;           // of the scores
  float gradient_deviation = 1.0f;  // of the output's gradient
  std::vector<float> alpha_per_head, slopes;
  std::vector<int> key_lengths;
  float first_factor = 0.0f;  // query_scale of the rows: this, a little more, …; 0: none
};

// Tensors are contiguous: batch, head, row, column.
template <class ElementType>
class RandomProblem {
 public:
  using Element = ElementType;
  struct Results {
    std::vector<double> output, mean;  // mean: of V under u = p^(2 - alpha)
    std::vector<double> query, key, value, query_scale, slopes;  // the last two: a number a row
  };

  explicit RandomProblem(const Settings& settings) : s(settings) {
    testing::Random random;
    const auto fill = [&](int rows, int columns, double deviation) {
      std::vector<Element> tensor;
      for (int i = 0; i < s.batch * s.heads * rows * columns; ++i) {
        tensor.push_back(Element(static_cast<float>(deviation * random.Gauss())));
      }
      return tensor;
    };
    query = fill(s.queries, s.size, s.deviation);
    key = fill(s.keys, s.size, 1.0);
    value = fill(s.keys, s.value_size, 1.0);
    output_gradient = fill(s.queries, s.value_size, s.gradient_deviation);
    if (s.first_factor != 0.0f) {
      for (int i = 0; i < Rows(); ++i) {
        query_scale.push_back(s.first_factor * (1.0f + 0.1f * static_cast<float>(i % 7)));
      }
    }
  }

  int Rows() const { return s.batch * s.heads * s.queries; }

  // Thresholds, output, means and, if wanted, gradients.
  void Solve(bool gradients) {
    const auto rows = static_cast<size_t>(Rows());
    threshold.assign(rows, kNan);
    want = {};
    want.output.resize(output_gradient.size());
    want.mean.resize(output_gradient.size());
    want.query.resize(query.size());
    want.key.resize(key.size());
    want.value.resize(value.size());
    want.query_scale.resize(rows);
    want.slopes.resize(rows);
    for (int row = 0; row < Rows(); ++row) SolveRow(row, gradients);
  }

  // In the Frobenius norm, relative to the reference; absolute where that is zero. Infinite if
  // something that is not finite in the reference is something else here.
  template <class Number>
  static double Error(const std::vector<Number>& got, const std::vector<double>& expected) {
    if (got.size() != expected.size()) return kInfinity;
    double difference = 0.0, size = 0.0;
    for (size_t i = 0; i < got.size(); ++i) {
      const auto x = static_cast<double>(static_cast<float>(got[i]));
      if (std::isfinite(expected[i])) {
        difference += (x - expected[i]) * (x - expected[i]);
        size += expected[i] * expected[i];
      } else if (std::isnan(expected[i]) ? !std::isnan(x) : x != expected[i]) {
        return kInfinity;
      }
    }
    return std::sqrt(size > 0.0 ? difference / size : difference);
  }

  // Rows, counted over the whole tensor, with a number that is not finite.
  static std::vector<int> BadRows(const std::vector<Element>& tensor, int columns) {
    std::vector<int> rows;
    for (size_t i = 0; i < tensor.size(); ++i) {
      const int row = static_cast<int>(i) / columns;
      const bool known = !rows.empty() && rows.back() == row;
      if (!known && !std::isfinite(static_cast<float>(tensor[i]))) rows.push_back(row);
    }
    return rows;
  }

  Settings s;
  std::vector<Element> query, key, value, output_gradient;
  std::vector<float> query_scale;
  std::vector<float> threshold;  // NaN in rows without a distribution
  Results want;

 protected:
  StridedTensor Strided(std::vector<Element>& tensor, int rows, int columns) const {
    StridedTensor view;
    view.data = tensor.data();
    view.row = columns;
    view.head = static_cast<int64_t>(rows) * columns;
    view.batch = view.head * s.heads;
    view.vectors = columns % 8 == 0;
    return view;
  }

  // Points into this object.
  GeneralProblem MakeProblem() const {
    GeneralProblem problem;
    problem.batch = problem.sequences = s.batch;
    problem.heads = problem.kv_heads = s.heads;
    problem.queries = problem.longest_query = s.queries;
    problem.keys = problem.longest_key = s.keys;
    problem.head_dim = s.size;
    problem.value_dim = s.value_size;
    problem.alpha = s.alpha;
    problem.scale = s.scale;
    problem.causal = s.causal;
    problem.window_left = s.left;
    problem.window_right = s.right;
    if (!s.alpha_per_head.empty()) problem.alpha_per_head = s.alpha_per_head.data();
    if (!s.key_lengths.empty()) problem.key_lengths = s.key_lengths.data();
    if (!s.slopes.empty()) problem.slopes = s.slopes.data();
    if (!query_scale.empty()) {
      problem.query_scale = query_scale.data();
      problem.query_scale_stride[0] = static_cast<int64_t>(s.heads) * s.queries;
      problem.query_scale_stride[1] = s.queries;
      problem.query_scale_stride[2] = 1;
    }
    return problem;
  }

 private:
  // A key that a row sees.
  struct Seen {
    int key;  // row of the tensor
    double distance, dot, z, p, u;
  };

  static double Power(double x, double exponent) {
    return exponent == 2.0 ? x * x : exponent == 1.0 ? x : std::pow(x, exponent);
  }
  // p and u at a threshold.
  static void Weigh(double order, double tau, std::vector<Seen>* seen) {
    for (Seen& x : *seen) {
      const double w = x.z - tau;
      x.p = w > 0.0 ? Power(w, 1.0 / order) : 0.0;
      x.u = w > 0.0 ? Power(w, 1.0 / order - 1.0) : 0.0;
    }
  }
  // NaN if there is no distribution.
  static double ThresholdOf(double order, const std::vector<Seen>& seen) {
    double high = -kInfinity;
    for (const Seen& x : seen) {
      if (std::isnan(x.z) || x.z == kInfinity) return kNan;
      high = std::max(high, x.z);
    }
    if (high == -kInfinity) return kNan;
    double low = high - 1.0;
    std::vector<double> near;
    for (const Seen& x : seen) {
      if (x.z > low) near.push_back(x.z);
    }
    for (int step = 0; step < 60; ++step) {
      const double middle = 0.5 * (low + high);
      double sum = 0.0;
      for (const double z : near) sum += Power(std::max(z - middle, 0.0), 1.0 / order);
      (sum >= 1.0 ? low : high) = middle;
    }
    return low;
  }

  void SolveRow(int row, bool gradients) {
    const int i = row % s.queries, head = row / s.queries % s.heads;
    const int entry = row / s.queries / s.heads;
    const double order = double{s.alpha_per_head.empty() ? s.alpha : s.alpha_per_head[head]} - 1.0;
    const double slope = s.slopes.empty() ? 0.0f : s.slopes[head];
    const double factor = double{s.scale} * double{query_scale.empty() ? 1.0f : query_scale[row]};
    const int keys = s.key_lengths.empty() ? s.keys : s.key_lengths[entry];
    const int position = i + keys - s.queries;
    std::vector<Seen> seen;
    for (int j = 0; j < keys; ++j) {
      if (j < position - s.left || j > position + (s.causal ? 0 : s.right)) continue;
      Seen x = {};
      x.key = (entry * s.heads + head) * s.keys + j;
      x.distance = std::abs(position - j);
      x.dot = Dot(query, row, key, x.key, s.size);
      x.z = order * (factor * x.dot - slope * x.distance);
      seen.push_back(x);
    }
    if (seen.empty()) return;
    const double tau = ThresholdOf(order, seen);
    threshold[row] = static_cast<float>(tau);
    Weigh(order, tau, &seen);
    AddOutput(row, std::isnan(tau), seen);
    if (!gradients || std::isnan(tau)) return;
    Weigh(order, threshold[row], &seen);  // The backward knows no more of it.
    AddGradients(row, factor, seen);
  }

  void AddOutput(int row, bool bad, const std::vector<Seen>& seen) {
    double u_sum = 0.0;
    for (const Seen& x : seen) u_sum += x.u;
    for (int c = 0; c < s.value_size; ++c) {
      double output = bad ? double{kNan} : 0.0, mean = output;
      for (const Seen& x : seen) {
        // What has no weight has no part, whatever its value.
        const double v = At(value, x.key * s.value_size + c);
        if (x.p > 0.0) output += x.p * v;
        if (x.u > 0.0) mean += x.u / u_sum * v;
      }
      want.output[row * s.value_size + c] = output;
      want.mean[row * s.value_size + c] = mean;
    }
  }

  void AddGradients(int row, double factor, const std::vector<Seen>& seen) {
    double u_sum = 0.0, u_gradient = 0.0;
    std::vector<double> dp;
    for (const Seen& x : seen) {
      dp.push_back(Dot(output_gradient, row, value, x.key, s.value_size));
      u_sum += x.u;
      if (x.u > 0.0) u_gradient += x.u * dp.back();
    }
    for (size_t k = 0; k < seen.size(); ++k) {
      const Seen& x = seen[k];
      if (x.u == 0.0) continue;
      const double ds = x.u * (dp[k] - u_gradient / u_sum);
      want.query_scale[row] += ds * double{s.scale} * x.dot;
      want.slopes[row] -= ds * x.distance;
      for (int c = 0; c < s.size; ++c) {
        want.query[row * s.size + c] += factor * ds * At(key, x.key * s.size + c);
        want.key[x.key * s.size + c] += factor * ds * At(query, row * s.size + c);
      }
      for (int c = 0; c < s.value_size; ++c) {
        want.value[x.key * s.value_size + c] += x.p * At(output_gradient, row * s.value_size + c);
      }
    }
  }

  static double At(const std::vector<Element>& tensor, int at) {
    return static_cast<double>(static_cast<float>(tensor[static_cast<size_t>(at)]));
  }
  static double Dot(const std::vector<Element>& x, int x_row, const std::vector<Element>& y,
                    int y_row, int columns) {
    double sum = 0.0;
    for (int c = 0; c < columns; ++c) {
      sum += At(x, x_row * columns + c) * At(y, y_row * columns + c);
    }
    // In float a large one is infinite.
    constexpr double kMost = std::numeric_limits<float>::max();
    return std::abs(sum) > kMost ? std::copysign(kInfinity, sum) : sum;
  }
};

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_TESTS_CUDA_GENERAL_PROBLEM_H_
