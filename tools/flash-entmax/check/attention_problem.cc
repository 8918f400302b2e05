#include "check/attention_problem.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "check/plain_attention.h"
#include "check/precision.h"
#include "math/element.h"
#include "random.h"

namespace flash_entmax::cli {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

constexpr DType kTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr double kAlphas[] = {0.5, 0.75, 1.0, 1.25, 1.3, 1.5, 1.5, 1.5, 1.75, 2.0, 2.0, 3.0};
constexpr double kSpreads[] = {0.1, 0.5, 1.0, 2.0, 5.0};
constexpr int64_t kHeadSizes[] = {1, 7, 16, 24, 33, 64, 64, 80, 128};

constexpr int64_t kMaxQueries = 40;
constexpr int64_t kMaxKeys = 300;

// The stated constants: the output may be this many ε times the largest value, and what one
// rounding of the largest score makes of it, worse than twice the plain computation, which by luck
// may have no error at all.
constexpr double kOutputConstant = 2.0;

// Half precisions are computed in float32.
double ComputeEpsilon(DType dtype) { return dtype == DType::kFloat64 ? 0x1p-52 : 0x1p-23; }

template <typename T, size_t N>
const T& Pick(bench::Random& random, const T (&choices)[N]) {
  return choices[static_cast<size_t>(random.Integer(0, int64_t{N} - 1))];
}

// The element of a view that is broadcast to the dimensions of `index`.
double ReadBroadcast(const TensorView& view, const std::vector<int64_t>& index) {
  int64_t offset = 0;
  const int skipped = static_cast<int>(index.size()) - view.rank;
  for (int d = 0; d < view.rank; ++d) {
    if (view.shape[d] != 1)
      offset += index[static_cast<size_t>(skipped) + static_cast<size_t>(d)] * view.strides[d];
  }
  return ReadElement(view, offset);
}

template <typename T>
std::vector<T> ReadVector(const TensorView& tensor, int64_t batch, int64_t head, int64_t row) {
  std::vector<T> values;
  const int64_t start =
      batch * tensor.strides[0] + head * tensor.strides[1] + row * tensor.strides[2];
  for (int64_t c = 0; c < tensor.shape[3]; ++c) {
    values.push_back(static_cast<T>(ReadElement(tensor, start + c * tensor.strides[3])));
  }
  return values;
}

double Norm(const std::vector<double>& vector) {
  double square = 0.0;
  for (const double x : vector) square += x * x;
  return std::sqrt(square);
}

// Where the keys of a query begin in the tensor, and the query's position among them.
struct Place {
  int64_t first_key = 0;
  int64_t position = 0;
};

Place PlaceOf(const AttentionProblem& problem, int64_t batch, int64_t query) {
  if (!problem.cu_query) {
    const int64_t keys = problem.key_lengths
                             ? static_cast<int64_t>(ReadBroadcast(problem.key_lengths, {batch}))
                             : problem.key.shape[2];
    return {0, query + keys - problem.query.shape[2]};
  }
  const auto* cu_query = static_cast<const int32_t*>(problem.cu_query.data);
  const auto* cu_key = static_cast<const int32_t*>(problem.cu_key.data);
  int64_t b = 0;
  while (query >= cu_query[b + 1]) ++b;
  const int64_t queries = cu_query[b + 1] - cu_query[b];
  const int64_t keys = cu_key[b + 1] - cu_key[b];
  return {cu_key[b], query - cu_query[b] + keys - queries};
}

// What the plain computation makes of a row; keys with the score −∞ in `expected` are hidden.
template <typename T>
std::vector<T> PlainOutput(const AttentionProblem& problem, int64_t batch, int64_t head,
                           int64_t query, double alpha, const reference::AttentionRow& expected) {
  const int64_t kv_head = head / (problem.query.shape[1] / problem.key.shape[1]);
  const Place place = PlaceOf(problem, batch, query);
  PlainRow<T> row;
  row.query = ReadVector<T>(problem.query, batch, head, query);
  row.alpha = static_cast<T>(alpha);
  row.softcap = static_cast<T>(problem.softcap);
  row.scale = static_cast<T>(
      problem.scale.value_or(1.0 / std::sqrt(static_cast<double>(problem.query.shape[3]))));
  if (problem.query_scale) {
    row.scale *= static_cast<T>(ReadBroadcast(problem.query_scale, {batch, head, query}));
  }
  for (size_t j = 0; j < expected.score.size(); ++j) {
    if (expected.score[j] == -kInfinity) continue;
    const auto key = static_cast<int64_t>(j);
    row.key.push_back(ReadVector<T>(problem.key, batch, kv_head, place.first_key + key));
    row.value.push_back(ReadVector<T>(problem.value, batch, kv_head, place.first_key + key));
    T bias = 0;
    if (problem.alibi_slopes) {
      bias -= static_cast<T>(ReadBroadcast(problem.alibi_slopes, {head})) *
              static_cast<T>(std::abs(place.position - key));
    }
    if (problem.bias)
      bias += static_cast<T>(ReadBroadcast(problem.bias, {batch, head, query, key}));
    row.bias.push_back(bias);
  }
  return PlainAttention(row, static_cast<size_t>(problem.value.shape[3]));
}

// Cuts [0, total] into `count` pieces, some of them empty.
std::vector<int32_t> RandomCuts(bench::Random& random, int64_t count, int64_t total) {
  std::vector<int32_t> cuts = {0, static_cast<int32_t>(total)};
  for (int64_t i = 1; i < count; ++i) {
    cuts.push_back(static_cast<int32_t>(random.Integer(0, total)));
  }
  std::sort(cuts.begin(), cuts.end());
  return cuts;
}

// Makes tensors and remembers the first error.
class TensorMaker {
 public:
  explicit TensorMaker(std::vector<OwnedTensor>& memory) : memory_(memory) {}

  // Elements come from `next`, in row-major order.
  template <typename Next>
  TensorView Make(DType dtype, const std::vector<int64_t>& shape, Next&& next) {
    Expected<OwnedTensor> tensor = OwnedTensor::Allocate("check", dtype, shape);
    if (!tensor.ok()) {
      status = tensor.status();
      return {};
    }
    const MutableTensorView view = tensor->mutable_view();
    for (int64_t i = 0; i < view.num_elements(); ++i) WriteElement(view, i, next());
    memory_.push_back(std::move(tensor).value());
    return view.view();
  }

  Status status;

 private:
  std::vector<OwnedTensor>& memory_;
};

}  // namespace

Status RandomAttention::MakeTensors(uint64_t seed) {
  bench::Random random(seed ^ (static_cast<uint64_t>(number_) * 0xBF58476D1CE4E5B9u + 2));
  const bool packed = random.Chance(0.15);
  const DType dtype = Pick(random, kTypes);
  const int64_t batch = packed ? 1 : random.Integer(1, 2);
  const int64_t kv_heads = random.Integer(1, 2);
  const int64_t heads = kv_heads * random.Integer(1, 3);
  const int64_t queries = random.Integer(1, kMaxQueries);
  const int64_t keys = random.Integer(1, random.Chance(0.3) ? 20 : kMaxKeys);
  const int64_t size = Pick(random, kHeadSizes);
  const int64_t value_size = Pick(random, kHeadSizes);
  const double spread = Pick(random, kSpreads);

  TensorMaker maker(memory_);
  const auto gauss = [&random](double sigma) {
    return [&random, sigma] { return sigma * random.Gauss(); };
  };
  problem_.query = maker.Make(dtype, {batch, heads, queries, size}, gauss(spread));
  problem_.key = maker.Make(dtype, {batch, kv_heads, keys, size}, gauss(1.0));
  problem_.value = maker.Make(dtype, {batch, kv_heads, keys, value_size}, gauss(1.0));
  if (random.Chance(0.1)) {  // One NaN makes its row NaN and must not touch the others.
    WriteElement(memory_[0].mutable_view(), random.Integer(0, problem_.query.num_elements() - 1),
                 std::nan(""));
  }
  problem_.alpha = Pick(random, kAlphas);
  if (random.Chance(0.1)) {
    problem_.alpha_per_head =
        maker.Make(DType::kFloat64, {heads}, [&random] { return Pick(random, kAlphas); });
  }
  if (random.Chance(0.3)) problem_.scale = random.Uniform(0.05, 0.5);
  if (random.Chance(0.2)) {
    problem_.query_scale = maker.Make(DType::kFloat32, {batch, heads, queries},
                                      [&random] { return random.Uniform(0.5, 2.0); });
  }
  problem_.causal = random.Chance(0.4);
  if (random.Chance(0.2)) problem_.window_left = random.Integer(0, keys);
  if (random.Chance(0.15)) problem_.window_right = random.Integer(0, keys);
  if (random.Chance(0.15)) problem_.softcap = random.Uniform(1.0, 10.0);
  if (random.Chance(0.2)) {
    problem_.alibi_slopes = maker.Make(DType::kFloat32, {heads}, [&random] {
      return random.Chance(0.3) ? 0.0 : random.Uniform(0.01, 1.0);
    });
  }
  if (packed) {
    const int64_t sequences = random.Integer(1, 4);
    const auto cuts = [&](int64_t total) {
      return maker.Make(DType::kInt32, {sequences + 1},
                        [list = RandomCuts(random, sequences, total), i = size_t{0}]() mutable {
                          return static_cast<double>(list[i++]);
                        });
    };
    problem_.cu_query = cuts(queries);
    problem_.cu_key = cuts(keys);
    return maker.status;
  }
  if (random.Chance(0.15)) {
    problem_.key_lengths = maker.Make(DType::kInt64, {batch}, [&random, keys] {
      return static_cast<double>(random.Integer(0, keys));
    });
  }
  if (random.Chance(0.15)) {
    problem_.key_mask = maker.Make(DType::kUInt8, {random.Chance(0.5) ? batch : 1, keys},
                                   [&random] { return random.Chance(0.7) ? 1.0 : 0.0; });
  }
  if (random.Chance(0.2)) {
    problem_.bias =
        maker.Make(DType::kFloat32, {random.Chance(0.5) ? heads : 1, queries, keys},
                   [&random] { return random.Chance(0.05) ? -kInfinity : random.Gauss(); });
  }
  return maker.status;
}

std::string RandomAttention::Describe() const {
  std::string text = fmt::format(
      "attention {}, query {}, key {}, value size {}, alpha {}",
      flash_entmax::NameOf(problem_.query.dtype), ShapeToString(problem_.query),
      ShapeToString(problem_.key), problem_.value.shape[3],
      problem_.alpha_per_head ? std::string("per head") : fmt::format("{}", problem_.alpha));
  if (problem_.scale) text += fmt::format(", scale {}", *problem_.scale);
  if (problem_.causal) text += ", causal";
  if (problem_.window_left) text += fmt::format(", window left {}", *problem_.window_left);
  if (problem_.window_right) text += fmt::format(", window right {}", *problem_.window_right);
  if (problem_.softcap > 0.0) text += fmt::format(", softcap {}", problem_.softcap);
  if (problem_.query_scale) text += ", query scale";
  if (problem_.alibi_slopes) text += ", alibi";
  if (problem_.key_lengths) text += ", key lengths";
  if (problem_.key_mask) text += ", key mask";
  if (problem_.bias) text += ", bias";
  if (problem_.cu_query) text += ", packed";
  return text;
}

double RandomAttention::AlphaOf(int64_t row) const {
  if (!problem_.alpha_per_head) return problem_.alpha;
  const int64_t head = row / problem_.query.shape[2] % problem_.query.shape[1];
  return ReadBroadcast(problem_.alpha_per_head, {head});
}

RandomAttention::Row RandomAttention::MakeRow(int64_t index) const {
  const int64_t queries = problem_.query.shape[2];
  const int64_t heads = problem_.query.shape[1];
  const int64_t query = index % queries;
  const int64_t head = index / queries % heads;
  const int64_t batch = index / queries / heads;
  const int64_t kv_head = head / (heads / problem_.key.shape[1]);
  const DType dtype = problem_.query.dtype;

  Row row;
  row.expected = reference::AttentionForwardRow(problem_, batch, head, query);
  double key_norm = 0.0;
  for (int64_t j = 0; j < problem_.key.shape[2]; ++j) {
    const double norm = Norm(ReadVector<double>(problem_.key, batch, kv_head, j));
    if (std::isfinite(norm)) key_norm = std::max(key_norm, norm);  // Hidden keys may hold anything.
  }
  double product = Norm(ReadVector<double>(problem_.query, batch, head, query)) * key_norm;
  const auto size = static_cast<double>(problem_.query.shape[3]);
  product *= problem_.scale.value_or(1.0 / std::sqrt(size));
  if (problem_.query_scale) {
    product *= std::abs(ReadBroadcast(problem_.query_scale, {batch, head, query}));
  }
  for (const double s : row.expected.score) {
    if (std::isfinite(s)) row.largest_score = std::max(row.largest_score, std::abs(s));
  }
  // A dot product of n terms has an error of n·ε/2 times the norms at worst, √n typically; a
  // quarter of the worst case is still far above what is typical for every size. The rest is for
  // scaling, capping and adding biases.
  if (std::isnan(product)) product = 0.0;  // The row is NaN, or sees no key.
  row.score_error =
      ComputeEpsilon(dtype) * ((size / 8.0 + 4.0) * product + 4.0 * row.largest_score);

  const double alpha = AlphaOf(index);
  const auto note_errors = [&](const auto& plain) {
    for (size_t i = 0; i < plain.size(); ++i) {
      const double expected = row.expected.output[i];
      if (std::isnan(expected)) continue;
      const double rounded = RoundTo(dtype, static_cast<double>(plain[i]));
      row.plain_error = std::max(row.plain_error, std::abs(rounded - expected));
    }
  };
  if (dtype == DType::kFloat64) {
    note_errors(PlainOutput<double>(problem_, batch, head, query, alpha, row.expected));
  } else {
    note_errors(PlainOutput<float>(problem_, batch, head, query, alpha, row.expected));
  }
  return row;
}

Expected<RandomAttention> RandomAttention::Make(uint64_t seed, int64_t number, int threads) {
  RandomAttention result;
  result.number_ = number;
  if (Status status = result.MakeTensors(seed); !status.ok()) return status;
  const AttentionProblem& problem = result.problem_;
  if (Status status = CheckAttention(problem); !status.ok()) return status;
  for (int64_t i = 0; i < problem.value.num_elements(); ++i) {
    result.largest_value_ =
        std::max(result.largest_value_, std::abs(ReadElement(problem.value, i)));
  }
  const int64_t rows = problem.query.shape[0] * problem.query.shape[1] * problem.query.shape[2];
  result.rows_.resize(static_cast<size_t>(rows));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t row = 0; row < rows; ++row) {
    result.rows_[static_cast<size_t>(row)] = result.MakeRow(row);
  }
  return result;
}

// For α > 2 the derivative p^(2−α) has no bound at the threshold, so what rounding of one score
// does to a probability depends on luck that the plain computation need not share. In float64 the
// plain computation rounds just as the reference does, so its error against it says nothing. In
// both cases, the largest change of a row's probabilities that an error of score_error can make.
double RandomAttention::ScoreRoundingError() const {
  double largest = 0.0;
  for (size_t row = 0; row < rows_.size(); ++row) {
    const double m = AlphaOf(static_cast<int64_t>(row)) - 1.0;
    if (m <= 1.0 && problem_.query.dtype != DType::kFloat64) continue;
    double change = 0.0;
    for (const double s : rows_[row].expected.score) {
      const double error = rows_[row].score_error;
      const double threshold = rows_[row].expected.threshold;  // log Σ exp(s) for α = 1.
      if (m == 0.0) {
        change += std::exp(s - threshold) * std::expm1(error);
        continue;
      }
      const double t = m * s - threshold;
      if (!(t > -m * error)) continue;
      change += std::pow(t + m * error, 1.0 / m) - std::pow(std::max(t, 0.0), 1.0 / m);
    }
    largest = std::max(largest, change);
  }
  return largest;
}

void RandomAttention::CompareOutput(const TensorView& output, ErrorTable& errors) const {
  const int64_t size = output.shape[3];
  double error = 0.0;
  double plain_error = 0.0;
  double largest_score = 0.0;
  for (size_t row = 0; row < rows_.size(); ++row) {
    plain_error = std::max(plain_error, rows_[row].plain_error);
    largest_score = std::max(largest_score, rows_[row].largest_score);
    for (int64_t c = 0; c < size; ++c) {
      const double actual = ReadElement(output, static_cast<int64_t>(row) * size + c);
      const double expected = rows_[row].expected.output[static_cast<size_t>(c)];
      if (std::isnan(actual) && std::isnan(expected)) continue;
      const double e = std::abs(actual - expected);
      if (!(e <= error)) error = e;  // Keeps NaN, once seen, until the end.
      if (std::isnan(error)) break;
    }
    if (std::isnan(error)) break;
  }
  errors.Record("attention output", flash_entmax::NameOf(output.dtype), error,
                2.0 * plain_error + largest_value_ * (kOutputConstant * EpsilonOf(output.dtype) +
                                                      ComputeEpsilon(output.dtype) * largest_score +
                                                      ScoreRoundingError()),
                number_);
}

void RandomAttention::CompareThreshold(const TensorView& threshold, ErrorTable& errors) const {
  for (size_t row = 0; row < rows_.size(); ++row) {
    const double actual = ReadElement(threshold, static_cast<int64_t>(row));
    const double expected = rows_[row].expected.threshold;
    const bool both_nan = std::isnan(actual) && std::isnan(expected);
    const double alpha = AlphaOf(static_cast<int64_t>(row));
    const double factor = alpha == 1.0 ? 1.0 : std::abs(alpha - 1.0);
    const double bound = 2.0 * factor * rows_[row].score_error +
                         EpsilonOf(threshold.dtype) * (1.0 + std::abs(expected));
    errors.Record("attention threshold", flash_entmax::NameOf(problem_.query.dtype),
                  both_nan ? 0.0 : std::abs(actual - expected), both_nan ? 0.0 : bound, number_);
  }
}

void RandomAttention::CompareSupport(const AttentionSupport& support, ErrorTable& errors) const {
  const char* dtype = flash_entmax::NameOf(problem_.query.dtype);
  const bool well_formed =
      support.row_offsets.size() == rows_.size() + 1 && support.row_offsets.front() == 0 &&
      support.row_offsets.back() == static_cast<int64_t>(support.key_index.size()) &&
      support.key_index.size() == support.probability.size() &&
      std::is_sorted(support.row_offsets.begin(), support.row_offsets.end());
  errors.Record("attention support layout", dtype, well_formed ? 0.0 : 1.0, 0.0, number_);
  if (!well_formed) return;
  for (size_t r = 0; r < rows_.size(); ++r) {
    const Row& row = rows_[r];
    if (std::any_of(row.expected.probability.begin(), row.expected.probability.end(),
                    [](double p) { return std::isnan(p); })) {
      continue;  // A row of NaN has no support that means anything.
    }
    const double alpha = AlphaOf(static_cast<int64_t>(r));
    const double m = alpha - 1.0;
    const double margin = 2.0 * row.score_error;
    std::vector<double> actual(row.expected.probability.size(), 0.0);
    int64_t previous = -1;
    bool ascending = true;
    for (int64_t e = support.row_offsets[r]; e < support.row_offsets[r + 1]; ++e) {
      const int64_t key = support.key_index[static_cast<size_t>(e)];
      ascending = ascending && key > previous && key < static_cast<int64_t>(actual.size());
      if (!ascending) break;
      previous = key;
      actual[static_cast<size_t>(key)] =
          static_cast<double>(support.probability[static_cast<size_t>(e)]);
    }
    errors.Record("attention support layout", dtype, ascending ? 0.0 : 1.0, 0.0, number_);
    for (size_t j = 0; j < actual.size(); ++j) {
      const double expected = row.expected.probability[j];
      if ((actual[j] > 0.0) != (expected > 0.0)) {
        // How far the score is from the threshold, in units of the score. Up to α = 1 there are
        // no zeros: a key may be missing only if float32 cannot hold its probability.
        double distance = std::abs(m * row.expected.score[j] - row.expected.threshold) / m;
        if (alpha <= 1.0) distance = expected < 0x1p-126 ? 0.0 : kInfinity;
        errors.Record("attention support keys", dtype, distance, margin, number_);
      } else {
        errors.Record("attention support keys", dtype, 0.0, margin, number_);
      }
      errors.Record("attention support weights", dtype, std::abs(actual[j] - expected),
                    ProbabilityShift(expected, alpha, margin) + 4.0 * 0x1p-23 * expected + 0x1p-126,
                    number_);
    }
  }
}

Status RandomAttention::Compare(int threads, ErrorTable& errors) const {
  const TensorView& query = problem_.query;
  const std::vector<int64_t> rows = {query.shape[0], query.shape[1], query.shape[2]};
  std::vector<int64_t> shape = rows;
  shape.push_back(problem_.value.shape[3]);
  Expected<OwnedTensor> output = OwnedTensor::Allocate("check", query.dtype, shape);
  if (!output.ok()) return output.status();
  Expected<OwnedTensor> again = OwnedTensor::Allocate("check", query.dtype, shape);
  if (!again.ok()) return again.status();
  const DType threshold_type = query.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  Expected<OwnedTensor> threshold = OwnedTensor::Allocate("check", threshold_type, rows);
  if (!threshold.ok()) return threshold.status();

  AttentionOptions options;
  options.num_threads = threads;
  AttentionSupport support;
  const AttentionOutputs outputs = {output->mutable_view(), threshold->mutable_view(), &support};
  if (Status status = AttentionForward(problem_, outputs, options); !status.ok()) return status;
  CompareOutput(output->view(), errors);
  CompareThreshold(threshold->view(), errors);
  CompareSupport(support, errors);

  // Another number of threads changes no bit.
  options.num_threads = threads == 1 ? 2 : 1;
  AttentionSupport support_again;
  const AttentionOutputs outputs_again = {again->mutable_view(), threshold->mutable_view(),
                                          &support_again};
  if (Status status = AttentionForward(problem_, outputs_again, options); !status.ok()) {
    return status;
  }
  const auto bytes = static_cast<size_t>(output->view().num_elements() * SizeOf(query.dtype));
  const bool same = std::memcmp(output->view().data, again->view().data, bytes) == 0;
  errors.Record("attention, other threads", flash_entmax::NameOf(query.dtype), same ? 0.0 : 1.0,
                0.0, number_);
  return Status::Ok();
}

}  // namespace flash_entmax::cli
