#include "bench/attention_case.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "attention_slices.h"
#include "bench/bench.h"
#include "check/precision.h"
#include "math/element.h"
#include "random.h"
#include "reference/attention_reference.h"

namespace flash_entmax::cli {
namespace {

constexpr int64_t kTileQueries = 128;
constexpr int64_t kTileKeys = 64;

// Pairs whose support is listed at once; 8 bytes each if nothing is zero.
constexpr int64_t kPairsPerCall = int64_t{1} << 26;

// A verified row may be off by this many ε of its type, times the largest value and the largest
// score, whose rounding moves probabilities. The exact bound compares with a plain computation,
// which `check` does; here a gross error is to be caught.
constexpr double kTolerance = 32.0;

Expected<OwnedTensor> Load(const std::string& name, DType dtype, const std::vector<int64_t>& shape,
                           const std::vector<float>& numbers) {
  Expected<OwnedTensor> tensor = OwnedTensor::Allocate(name, dtype, shape);
  if (!tensor.ok()) return tensor.status();
  for (size_t i = 0; i < numbers.size(); ++i) {
    WriteElement(tensor->mutable_view(), static_cast<int64_t>(i), static_cast<double>(numbers[i]));
  }
  return tensor;
}

// Tiles of the problem with a visible pair, and those that the support leaves empty. Rows arrive in
// order; masks are causal or none.
class TileCounter {
 public:
  explicit TileCounter(const AttentionProblem& problem)
      : queries_(problem.query.shape[2]),
        keys_(problem.key.shape[2]),
        causal_(problem.causal),
        used_(static_cast<size_t>((keys_ + kTileKeys - 1) / kTileKeys)) {}

  void AddRow(const int32_t* begin, const int32_t* end) {
    for (const int32_t* key = begin; key != end; ++key) {
      used_[static_cast<size_t>(*key / kTileKeys)] = true;
    }
    ++row_;
    if (row_ % kTileQueries != 0 && row_ != queries_) return;
    const int64_t last_key = causal_ ? row_ - 1 + keys_ - queries_ : keys_ - 1;
    for (size_t tile = 0; tile < used_.size(); ++tile) {
      if (static_cast<int64_t>(tile) * kTileKeys > last_key) break;
      ++tiles_;
      if (!used_[tile]) ++empty_;
    }
    std::fill(used_.begin(), used_.end(), false);
    if (row_ == queries_) row_ = 0;
  }

  double empty_share() const {
    return tiles_ > 0 ? static_cast<double>(empty_) / static_cast<double>(tiles_) : 0.0;
  }

 private:
  const int64_t queries_;
  const int64_t keys_;
  const bool causal_;
  std::vector<bool> used_;
  int64_t row_ = 0;
  int64_t tiles_ = 0;
  int64_t empty_ = 0;
};

}  // namespace

Expected<AttentionCase> AttentionCase::Make(const bench::WorkloadSpec& spec,
                                            const bench::WorkloadShape& shape, uint64_t seed,
                                            DType dtype) {
  const bench::Workload workload = bench::MakeWorkload(spec, shape, seed);
  AttentionCase result;
  const std::vector<int64_t> output_shape = {shape.batch, shape.heads, shape.query_length,
                                             shape.value_size};
  Expected<OwnedTensor> tensors[] = {
      Load("query", dtype, {shape.batch, shape.heads, shape.query_length, shape.head_size},
           workload.query),
      Load("key", dtype, {shape.batch, shape.kv_heads, shape.key_length, shape.head_size},
           workload.key),
      Load("value", dtype, {shape.batch, shape.kv_heads, shape.key_length, shape.value_size},
           workload.value),
      Load("slopes", DType::kFloat32, {static_cast<int64_t>(workload.alibi_slopes.size())},
           workload.alibi_slopes),
      OwnedTensor::Allocate("output", dtype, output_shape)};
  for (const auto& tensor : tensors) {
    if (!tensor.ok()) return tensor.status();
  }
  result.query_ = std::move(tensors[0]).value();
  result.key_ = std::move(tensors[1]).value();
  result.value_ = std::move(tensors[2]).value();
  result.slopes_ = std::move(tensors[3]).value();
  result.output_ = std::move(tensors[4]).value();
  result.problem.query = result.query_.view();
  result.problem.key = result.key_.view();
  result.problem.value = result.value_.view();
  if (!workload.alibi_slopes.empty()) result.problem.alibi_slopes = result.slopes_.view();
  result.output = result.output_.mutable_view();
  return result;
}

Status AttentionCase::Verify(const AttentionProblem& variant, uint64_t seed, int threads,
                             SupportSummary& summary) {
  AttentionOptions options;
  options.num_threads = threads;
  AttentionOutputs outputs;
  outputs.output = output;
  TileCounter tiles(variant);
  int64_t entries = 0;
  const int64_t rows = variant.query.shape[0] * variant.query.shape[1] * variant.query.shape[2];
  for (const AttentionSlice& slice : CutAttention(variant, kPairsPerCall)) {
    AttentionSupport support;
    AttentionOutputs part = SliceOutputs(outputs, slice);
    part.support = &support;
    Status status = AttentionForward(SliceProblem(variant, slice), part, options);
    if (!status.ok()) return status;
    entries += static_cast<int64_t>(support.key_index.size());
    for (size_t row = 0; row + 1 < support.row_offsets.size(); ++row) {
      tiles.AddRow(support.key_index.data() + support.row_offsets[row],
                   support.key_index.data() + support.row_offsets[row + 1]);
    }
  }
  summary.mean_keys = static_cast<double>(entries) / static_cast<double>(rows);
  summary.empty_tile_share = tiles.empty_share();

  // The calls to be timed are of the whole problem, so that is what is verified.
  if (Status status = AttentionForward(variant, outputs, options); !status.ok()) return status;
  bench::Random random(seed);
  const int64_t queries = variant.query.shape[2];
  const int64_t heads = variant.query.shape[1];
  const int64_t size = variant.value.shape[3];
  double largest_value = 0.0;
  for (int64_t i = 0; i < variant.value.num_elements(); ++i) {
    largest_value = std::max(largest_value, std::abs(ReadElement(variant.value, i)));
  }
  for (int i = 0; i < kVerifiedRows; ++i) {
    const int64_t row = random.Integer(0, rows - 1);
    const reference::AttentionRow expected = reference::AttentionForwardRow(
        variant, row / queries / heads, row / queries % heads, row % queries);
    double largest_score = 1.0;
    for (const double s : expected.score) {
      if (std::isfinite(s)) largest_score = std::max(largest_score, std::abs(s));
    }
    const double bound =
        kTolerance * EpsilonOf(variant.query.dtype) * largest_value * largest_score;
    for (int64_t c = 0; c < size; ++c) {
      const double actual = ReadElement(output.view(), row * size + c);
      if (!(std::abs(actual - expected.output[static_cast<size_t>(c)]) <= bound)) {
        return Status::InvalidArgument(fmt::format(
            "alpha {}: row {}, component {}: got {}, the reference says {}, allowed are ±{:.2g}",
            variant.alpha, row, c, actual, expected.output[static_cast<size_t>(c)], bound));
      }
    }
  }
  return Status::Ok();
}

}  // namespace flash_entmax::cli
