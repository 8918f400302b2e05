#include "reference/attention_reference.h"

#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "math/element.h"
#include "reference/mapping_reference.h"

namespace flash_entmax::reference {
namespace {

// Dimensions of the problem's tensors.
struct Sizes {
  int64_t batch, heads, kv_heads, queries, keys, head_size, value_size;
};

Sizes SizesOf(const AttentionProblem& problem) {
  return {problem.query.shape[0], problem.query.shape[1], problem.key.shape[1],
          problem.query.shape[2], problem.key.shape[2],   problem.query.shape[3],
          problem.value.shape[3]};
}

// The element at `index`, where the view's dimensions are aligned with the last ones of `index`,
// and a missing dimension or one of size 1 repeats (NumPy's rule).
template <size_t N>
double ReadBroadcast(const TensorView& view, const std::array<int64_t, N>& index) {
  int64_t offset = 0;
  for (int d = 0; d < view.rank; ++d) {
    const int from = d + static_cast<int>(N) - view.rank;
    if (from >= 0 && view.shape[d] != 1) offset += index[from] * view.strides[d];
  }
  return ReadElement(view, offset);
}

// The stretch of keys that a query belongs to, and where the query stands in it.
struct Place {
  int64_t first_key = 0;   // position of key j = 0 in the tensor
  int64_t row_length = 0;  // length of AttentionRow::score
  int64_t keys = 0;        // keys that exist: row_length, or the batch entry's key_lengths
  int64_t position = 0;    // i' = i + keys − queries
};

Place PlaceOf(const AttentionProblem& problem, int64_t batch, int64_t query) {
  const Sizes sizes = SizesOf(problem);
  Place place;
  if (problem.cu_query) {
    const auto boundary = [](const TensorView& view, int64_t i) {
      return static_cast<int64_t>(ReadElement(view, i * view.strides[0]));
    };
    for (int64_t b = 0; b + 1 < problem.cu_query.shape[0]; ++b) {
      const int64_t first_query = boundary(problem.cu_query, b);
      const int64_t end_query = boundary(problem.cu_query, b + 1);
      if (query < first_query || query >= end_query) continue;
      place.first_key = boundary(problem.cu_key, b);
      place.row_length = boundary(problem.cu_key, b + 1) - place.first_key;
      place.keys = place.row_length;
      place.position = (query - first_query) + place.keys - (end_query - first_query);
    }
    return place;
  }
  place.row_length = sizes.keys;
  place.keys = sizes.keys;
  if (problem.key_lengths) {
    place.keys = static_cast<int64_t>(ReadBroadcast<1>(problem.key_lengths, {batch}));
  }
  place.position = query + place.keys - sizes.queries;
  return place;
}

bool IsVisible(const AttentionProblem& problem, const Place& place, int64_t batch, int64_t key) {
  const int64_t ahead = key - place.position;  // > 0 for keys after the query
  if (key >= place.keys) return false;
  if (problem.causal && ahead > 0) return false;
  if (problem.window_left && -ahead > *problem.window_left) return false;
  if (problem.window_right && ahead > *problem.window_right) return false;
  return !problem.key_mask || ReadBroadcast<2>(problem.key_mask, {batch, key}) != 0.0;
}

// What multiplies q·k.
double ScaleOf(const AttentionProblem& problem) {
  if (problem.scale) return *problem.scale;
  return 1.0 / std::sqrt(static_cast<double>(problem.query.shape[3]));
}

double QueryScaleOf(const AttentionProblem& problem, int64_t batch, int64_t head, int64_t query) {
  if (!problem.query_scale) return 1.0;
  return ReadBroadcast<3>(problem.query_scale, {batch, head, query});
}

double AlphaOf(const AttentionProblem& problem, int64_t head) {
  if (!problem.alpha_per_head) return problem.alpha;
  return ReadBroadcast<1>(problem.alpha_per_head, {head});
}

// Row `row` of `tensor`, [batch, heads, rows, size].
std::vector<double> ReadRow(const TensorView& tensor, int64_t batch, int64_t head, int64_t row) {
  std::vector<double> values(tensor.shape[3]);
  for (int64_t c = 0; c < tensor.shape[3]; ++c) {
    values[c] = ReadElement(tensor, batch * tensor.strides[0] + head * tensor.strides[1] +
                                        row * tensor.strides[2] + c * tensor.strides[3]);
  }
  return values;
}

double Dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0.0;
  for (size_t c = 0; c < a.size(); ++c) sum += a[c] * b[c];
  return sum;
}

}  // namespace

AttentionRow AttentionForwardRow(const AttentionProblem& problem, int64_t batch, int64_t head,
                                 int64_t query) {
  const Sizes sizes = SizesOf(problem);
  const int64_t kv_head = head / (sizes.heads / sizes.kv_heads);
  const Place place = PlaceOf(problem, batch, query);
  const std::vector<double> q = ReadRow(problem.query, batch, head, query);

  AttentionRow row;
  row.score.assign(place.row_length, -std::numeric_limits<double>::infinity());
  for (int64_t j = 0; j < place.row_length; ++j) {
    if (!IsVisible(problem, place, batch, j)) continue;
    double score = QueryScaleOf(problem, batch, head, query) * ScaleOf(problem) *
                   Dot(q, ReadRow(problem.key, batch, kv_head, place.first_key + j));
    if (problem.softcap > 0.0) score = problem.softcap * std::tanh(score / problem.softcap);
    if (problem.alibi_slopes) {
      score -= ReadBroadcast<1>(problem.alibi_slopes, {head}) *
               static_cast<double>(std::abs(place.position - j));
    }
    if (problem.bias) score += ReadBroadcast<4>(problem.bias, {batch, head, query, j});
    row.score[j] = score;
  }

  const MappedRow mapped = MapRow(row.score, MappingKind::kEntmax, AlphaOf(problem, head));
  row.probability = mapped.probability;
  row.threshold = mapped.threshold;

  row.output.assign(sizes.value_size, 0.0);
  for (int64_t j = 0; j < place.row_length; ++j) {
    if (row.probability[j] == 0.0) continue;  // A zero hides what the value is, NaN included.
    const std::vector<double> v = ReadRow(problem.value, batch, kv_head, place.first_key + j);
    for (int64_t c = 0; c < sizes.value_size; ++c) row.output[c] += row.probability[j] * v[c];
  }
  return row;
}

AttentionResult AttentionForward(const AttentionProblem& problem) {
  const Sizes sizes = SizesOf(problem);
  const int64_t rows = sizes.batch * sizes.heads * sizes.queries;
  AttentionResult result;
  result.output.resize(rows * sizes.value_size);
  result.threshold.resize(rows);
  result.probability.assign(rows * sizes.keys, 0.0);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t query = r % sizes.queries;
    const int64_t head = r / sizes.queries % sizes.heads;
    const int64_t batch = r / sizes.queries / sizes.heads;
    const AttentionRow row = AttentionForwardRow(problem, batch, head, query);
    const Place place = PlaceOf(problem, batch, query);
    result.threshold[r] = row.threshold;
    for (int64_t c = 0; c < sizes.value_size; ++c) {
      result.output[r * sizes.value_size + c] = row.output[c];
    }
    for (int64_t j = 0; j < place.row_length; ++j) {
      result.probability[r * sizes.keys + place.first_key + j] = row.probability[j];
    }
  }
  return result;
}

AttentionGradients AttentionBackward(const AttentionProblem& problem,
                                     const std::vector<double>& grad_output) {
  const Sizes sizes = SizesOf(problem);
  const int64_t rows = sizes.batch * sizes.heads * sizes.queries;
  AttentionGradients gradients;
  gradients.query.assign(rows * sizes.head_size, 0.0);
  gradients.key.assign(sizes.batch * sizes.kv_heads * sizes.keys * sizes.head_size, 0.0);
  gradients.value.assign(sizes.batch * sizes.kv_heads * sizes.keys * sizes.value_size, 0.0);
  gradients.alpha.assign(sizes.heads, 0.0);
  gradients.query_scale.assign(rows, 0.0);
  gradients.bias.assign(rows * sizes.keys, 0.0);
  gradients.alibi_slopes.assign(sizes.heads, 0.0);

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t query = r % sizes.queries;
    const int64_t head = r / sizes.queries % sizes.heads;
    const int64_t batch = r / sizes.queries / sizes.heads;
    const int64_t kv_head = head / (sizes.heads / sizes.kv_heads);
    const Place place = PlaceOf(problem, batch, query);
    const AttentionRow row = AttentionForwardRow(problem, batch, head, query);
    const std::vector<double> q = ReadRow(problem.query, batch, head, query);
    const std::vector<double> grad_o(grad_output.begin() + r * sizes.value_size,
                                     grad_output.begin() + (r + 1) * sizes.value_size);
    // Row of the key and value gradients that belongs to key j of this query.
    const auto key_row = [&](int64_t j) {
      return (batch * sizes.kv_heads + kv_head) * sizes.keys + place.first_key + j;
    };

    // o = Σ p_j v_j.
    std::vector<double> grad_probability(place.row_length, 0.0);
    for (int64_t j = 0; j < place.row_length; ++j) {
      if (row.probability[j] == 0.0) continue;
      const std::vector<double> v = ReadRow(problem.value, batch, kv_head, place.first_key + j);
      grad_probability[j] = Dot(grad_o, v);
      for (int64_t c = 0; c < sizes.value_size; ++c) {
        gradients.value[key_row(j) * sizes.value_size + c] += row.probability[j] * grad_o[c];
      }
    }

    const MappedRowGradient mapped = MapRowBackward(row.probability, grad_probability,
                                                    MappingKind::kEntmax, AlphaOf(problem, head));
    gradients.alpha[head] += mapped.alpha;

    // s_j = cap(query_scale·scale·q·k_j) − slope·|i' − j| + bias_j.
    const double scale = ScaleOf(problem);
    const double query_scale = QueryScaleOf(problem, batch, head, query);
    for (int64_t j = 0; j < place.row_length; ++j) {
      if (row.probability[j] == 0.0) continue;
      const double grad_score = mapped.scores[j];
      gradients.bias[r * sizes.keys + place.first_key + j] = grad_score;
      gradients.alibi_slopes[head] -=
          grad_score * static_cast<double>(std::abs(place.position - j));

      const std::vector<double> k = ReadRow(problem.key, batch, kv_head, place.first_key + j);
      const double dot = Dot(q, k);
      double grad_capped = grad_score;  // gradient in query_scale·scale·q·k_j
      if (problem.softcap > 0.0) {
        const double tanh = std::tanh(query_scale * scale * dot / problem.softcap);
        grad_capped *= 1.0 - tanh * tanh;
      }
      gradients.query_scale[r] += grad_capped * scale * dot;
      for (int64_t c = 0; c < sizes.head_size; ++c) {
        gradients.query[r * sizes.head_size + c] += grad_capped * query_scale * scale * k[c];
        gradients.key[key_row(j) * sizes.head_size + c] += grad_capped * query_scale * scale * q[c];
      }
    }
  }
  return gradients;
}

}  // namespace flash_entmax::reference
