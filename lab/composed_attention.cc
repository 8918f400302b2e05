// Attention as compositions of tensor operations; attention.h says which and why.

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "attention.h"

namespace flash_entmax::lab {
namespace {

// Without gradients, scores of at most this many elements exist at a time.
constexpr int64_t kMostScores = int64_t{1} << 26;
constexpr int64_t kMostBandRows = 1024;

// −slope·(i − j) of query rows first … first + count − 1: [heads or 1, count, first + count], −∞
// where j > i.
at::Tensor PositionBias(const AttentionInputs& inputs, int64_t first, int64_t count,
                        at::ScalarType type) {
  const auto options = inputs.qkv.options().dtype(at::kFloat);
  const at::Tensor key = at::arange(first + count, options);
  const at::Tensor distance = at::arange(first, first + count, options).unsqueeze(1) - key;
  at::Tensor bias = at::zeros_like(distance).unsqueeze(0);
  if (inputs.slopes.defined()) {
    bias = -inputs.slopes.to(at::kFloat).view({-1, 1, 1}) * distance;
  }
  return bias.masked_fill(distance < 0, -INFINITY).to(type);
}

// [batch, heads, length, head_size] of a query [batch, length, heads, head_size], with its own
// factor.
at::Tensor ScaledQuery(const AttentionInputs& inputs, const at::Tensor& query) {
  const at::Tensor result = query.transpose(1, 2);
  if (!inputs.query_scale.defined()) return result;
  return result * inputs.query_scale.transpose(1, 2).unsqueeze(3).to(result.scalar_type());
}

// [batch, heads, length, head_size]; the query with its own factor.
at::Tensor Part(const AttentionInputs& inputs, int64_t part) {
  const at::Tensor result = inputs.qkv.select(2, part);
  return part == 0 ? ScaledQuery(inputs, result) : result.transpose(1, 2);
}

// Causal softmax attention of one head with a bias −slope·distance: [batch, length, head_size].
//
// With B a bound of all |scores| a key at distance w has at most exp(2B − slope·w) of the weight of
// the row's own key. Keys further away than the reach w = (2B + log n + 24·log 2)/slope weigh less
// than 2^−24 together, which float32 sums cannot see, and are left out.
at::Tensor BandedSoftmax(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         double slope) {
  const int64_t batch = query.size(0), length = query.size(1);
  const double scale = 1.0 / std::sqrt(static_cast<double>(query.size(2)));
  const auto largest = [](const at::Tensor& rows) {
    return rows.to(at::kFloat).norm(2, -1).max().item<double>();
  };
  const double bound = 1.01 * scale * largest(query) * largest(key);
  const double wanted =
      (2.0 * bound + std::log(static_cast<double>(length)) + 24.0 * std::log(2.0)) / slope;
  const bool finite = wanted > 0.0 && wanted < static_cast<double>(length);
  const int64_t reach = finite ? static_cast<int64_t>(std::ceil(wanted)) : length;
  const int64_t block =
      std::clamp<int64_t>(kMostScores / (batch * (reach + kMostBandRows)), 1, kMostBandRows);
  const auto options = query.options().dtype(at::kFloat);
  at::Tensor output = at::empty_like(query, at::MemoryFormat::Contiguous);
  for (int64_t first = 0; first < length; first += block) {
    const int64_t count = std::min(block, length - first);
    const int64_t from = std::max<int64_t>(0, first - reach), keys = first + count - from;
    const at::Tensor distance = at::arange(first, first + count, options).unsqueeze(1) -
                                at::arange(from, from + keys, options);
    const at::Tensor bias = (-slope * distance).masked_fill(distance < 0, -INFINITY);
    const at::Tensor products = at::matmul(query.narrow(1, first, count) * scale,
                                           key.narrow(1, from, keys).transpose(1, 2));
    const at::Tensor probabilities = at::softmax(products.to(at::kFloat) + bias, -1);
    output.narrow(1, first, count)
        .copy_(at::matmul(probabilities.to(value.scalar_type()), value.narrow(1, from, keys)));
  }
  return output;
}

// Runs `rows(first, count)` → [batch, heads, count, head_size] over blocks of query rows and puts
// them together as [batch, length, heads, head_size].
at::Tensor InBlocks(const AttentionInputs& inputs,
                    const std::function<at::Tensor(int64_t, int64_t)>& rows) {
  const int64_t batch = inputs.qkv.size(0), length = inputs.qkv.size(1);
  const int64_t heads = inputs.qkv.size(3);
  if (at::GradMode::is_enabled() || batch * heads * length * length <= kMostScores) {
    return rows(0, length).transpose(1, 2);
  }
  const int64_t block = std::max<int64_t>(1, kMostScores / (batch * heads * length));
  at::Tensor output = at::empty({batch, length, heads, inputs.qkv.size(4)}, inputs.qkv.options());
  for (int64_t first = 0; first < length; first += block) {
    const int64_t count = std::min(block, length - first);
    output.narrow(1, first, count).copy_(rows(first, count).transpose(1, 2));
  }
  return output;
}

}  // namespace

at::Tensor CausalScores(const AttentionInputs& inputs, int64_t first, int64_t count) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(inputs.qkv.size(4)));
  const at::Tensor query = Part(inputs, 0).narrow(2, first, count) * scale;
  const at::Tensor key = Part(inputs, 1).narrow(2, 0, first + count);
  const at::Tensor scores = at::matmul(query, key.transpose(2, 3));
  return scores + PositionBias(inputs, first, count, scores.scalar_type());
}

at::Tensor ComposedSoftmax(const AttentionInputs& inputs) {
  if (!at::GradMode::is_enabled()) return SoftmaxByHeads(inputs);
  const at::Tensor bias =
      PositionBias(inputs, 0, inputs.qkv.size(1), inputs.qkv.scalar_type()).unsqueeze(0);
  // Unbound together: the gradient of three separate selections would be three tensors of the size
  // of qkv, mostly zeros, and two sums.
  const std::vector<at::Tensor> parts = inputs.qkv.unbind(2);
  return at::scaled_dot_product_attention(ScaledQuery(inputs, parts[0]), parts[1].transpose(1, 2),
                                          parts[2].transpose(1, 2), bias)
      .transpose(1, 2);
}

at::Tensor SoftmaxByHeads(const AttentionInputs& inputs) {
  const at::NoGradGuard no_gradient;
  const int64_t length = inputs.qkv.size(1), heads = inputs.qkv.size(3);
  const at::Tensor query = Part(inputs, 0), key = Part(inputs, 1), value = Part(inputs, 2);
  at::Tensor output =
      at::empty({inputs.qkv.size(0), length, heads, inputs.qkv.size(4)}, inputs.qkv.options());
  std::vector<double> slopes(static_cast<size_t>(heads), 0.0);
  if (inputs.slopes.defined()) {
    const at::Tensor known = inputs.slopes.to(at::kDouble).cpu().contiguous();
    std::copy_n(known.const_data_ptr<double>(), heads, slopes.begin());
  }
  // Neighbouring heads without a slope go together.
  for (int64_t head = 0; head < heads;) {
    int64_t end = head + 1;
    const double slope = slopes[static_cast<size_t>(head)];
    if (slope == 0.0) {
      while (end < heads && slopes[static_cast<size_t>(end)] == 0.0) ++end;
      output.narrow(2, head, end - head)
          .copy_(at::scaled_dot_product_attention(query.narrow(1, head, end - head),
                                                  key.narrow(1, head, end - head),
                                                  value.narrow(1, head, end - head), {}, 0.0, true)
                     .transpose(1, 2));
    } else {
      output.select(2, head).copy_(
          BandedSoftmax(query.select(1, head), key.select(1, head), value.select(1, head), slope));
    }
    head = end;
  }
  return output;
}

at::Tensor LinearAttention(const AttentionInputs& inputs, const at::Tensor& log_decay,
                           const at::Tensor& write) {
  // Positions enter as decay; 0 for j ≤ i without slopes.
  const at::Tensor query = at::elu(inputs.qkv.select(2, 0).transpose(1, 2)) + 1;
  const at::Tensor key = at::elu(inputs.qkv.select(2, 1).transpose(1, 2)) + 1;
  const at::Tensor value = inputs.qkv.select(2, 2).transpose(1, 2);
  at::Tensor decayed;  // Σ_{t≤i} log_decay_t: [batch, heads, length]
  at::Tensor log_write;
  if (log_decay.defined()) decayed = log_decay.to(at::kFloat).cumsum(1).transpose(1, 2);
  if (write.defined()) log_write = write.to(at::kFloat).clamp_min(1e-30).log().transpose(1, 2);
  return InBlocks(inputs, [&](int64_t first, int64_t count) {
    at::Tensor exponent = PositionBias(inputs, first, count, at::kFloat).unsqueeze(0);
    const int64_t keys = first + count;
    if (decayed.defined()) {
      exponent = exponent + decayed.narrow(2, first, count).unsqueeze(3) -
                 decayed.narrow(2, 0, keys).unsqueeze(2);
    }
    if (log_write.defined()) exponent = exponent + log_write.narrow(2, 0, keys).unsqueeze(2);
    const at::Tensor products =
        at::matmul(query.narrow(2, first, count), key.narrow(2, 0, keys).transpose(2, 3));
    const at::Tensor weights = products.to(at::kFloat) * exponent.exp();
    const at::Tensor sums = weights.sum(-1, true).clamp_min(1e-12);
    return at::matmul((weights / sums).to(value.scalar_type()), value.narrow(2, 0, keys));
  });
}

at::Tensor SortedEntmax(const at::Tensor& scores, double alpha) {
  if (alpha == 1.0) return at::softmax(scores, -1);
  TORCH_CHECK(alpha == 1.5 || alpha == 2.0, "alpha: got ", alpha, "; must be 1, 1.5 or 2");
  const at::Tensor shifted = (alpha - 1.0) * (scores - scores.amax(-1, true).detach());
  // Keys that are hidden, or far below any support, would make the sums of squares lose digits.
  const at::Tensor sorted = std::get<0>(shifted.clamp_min(-2.0).sort(-1, true));
  const at::Tensor count = at::arange(1, scores.size(-1) + 1, scores.options());
  at::Tensor thresholds;
  if (alpha == 2.0) {
    thresholds = (sorted.cumsum(-1) - 1.0) / count;
  } else {
    const at::Tensor mean = sorted.cumsum(-1) / count;
    const at::Tensor spread = count * ((sorted * sorted).cumsum(-1) / count - mean * mean);
    thresholds = mean - ((1.0 - spread) / count).clamp_min(1e-30).sqrt();
  }
  const at::Tensor support = (thresholds <= sorted).sum(-1, true).clamp_min(1);
  const at::Tensor threshold = thresholds.gather(-1, support - 1);
  const at::Tensor positive = (shifted - threshold).clamp_min(0.0);
  return alpha == 2.0 ? positive : positive * positive;
}

at::Tensor BisectedEntmax(const at::Tensor& scores, const at::Tensor& alpha) {
  const at::NoGradGuard no_gradient;
  const at::Tensor degree = alpha.to(at::kDouble).unsqueeze(-1) - 1.0;  // α − 1
  const at::Tensor power = degree.clamp_min(1e-9).reciprocal();
  const at::Tensor distance = scores.to(at::kDouble) - scores.to(at::kDouble).amax(-1, true);
  const at::Tensor scaled = degree * distance;
  // −1 ≤ τ − max z ≤ −n^(1−α), widened by nothing: the sum is at least 1 on the left.
  at::Tensor low = at::full_like(scaled.narrow(-1, 0, 1), -1.0);
  at::Tensor high = at::zeros_like(low);
  for (int i = 0; i < 60; ++i) {
    const at::Tensor middle = (low + high) * 0.5;
    const at::Tensor sum = (scaled - middle).clamp_min(0.0).pow(power).sum(-1, true);
    const at::Tensor right = sum >= 1.0;
    low = at::where(right, middle, low);
    high = at::where(right, high, middle);
  }
  const at::Tensor positive = (scaled - low).clamp_min(0.0);
  const at::Tensor probabilities = at::where(positive > 0, positive.pow(power), 0.0);
  const at::Tensor entmax = probabilities / probabilities.sum(-1, true);
  return at::where(degree < 1e-6, at::softmax(distance, -1), entmax);
}

}  // namespace flash_entmax::lab
