#include "demo/retrieval.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace flash_entmax::cli {
namespace {

// Queries of one call of the library: enough to make packing the keys cheap beside the products,
// few enough for a progress bar that moves.
constexpr int64_t kQueriesPerCall = 8192;

size_t Row(const Stretch& positions, int64_t position) {
  return static_cast<size_t>(position - positions.first);
}

}  // namespace

int64_t PositionsFor(int64_t pairs, int64_t size, int64_t fewest, int64_t most) {
  return std::clamp(pairs / std::max<int64_t>(size, 1), fewest, most);
}

std::span<const float> Prediction::DistributionAt(int64_t position) const {
  return std::span(distribution).subspan(Row(positions, position) * kByteValues, kByteValues);
}

std::span<const KeptKey> Prediction::KeptAt(int64_t position) const {
  const size_t row = Row(positions, position);
  const auto first = static_cast<size_t>(row_offsets[row]);
  return std::span(kept).subspan(first, static_cast<size_t>(row_offsets[row + 1]) - first);
}

Retrieval::Retrieval(std::string text, const EmbeddingOptions& options, int threads)
    : text_(std::move(text)),
      head_size_(options.head_size),
      threads_(threads),
      embeddings_(EmbedText(text_, options, threads)),
      values_(text_.size() * kByteValues, 0.0F) {
  for (size_t i = 0; i < text_.size(); ++i) {
    values_[i * kByteValues + static_cast<unsigned char>(text_[i])] = 1.0F;
  }
}

int64_t Retrieval::FirstKey(const Stretch& positions, const RetrievalSetting& setting) {
  if (!setting.context) return 0;
  return std::max<int64_t>(0, positions.first - *setting.context);
}

int64_t Retrieval::VisiblePairs(const Stretch& positions, const RetrievalSetting& setting) {
  int64_t pairs = 0;
  for (int64_t i = positions.first; i < positions.end; ++i) {
    pairs += setting.context ? std::min(i, *setting.context) : i;
  }
  return pairs;
}

AttentionProblem Retrieval::ProblemOf(const Stretch& positions,
                                      const RetrievalSetting& setting) const {
  // Keys of positions [first_key, end − 1). Aligned at the bottom right, the last query, of
  // position end − 1, sees all of them, and every query before it one less: position i sees keys j
  // < i.
  const int64_t first_key = FirstKey(positions, setting);
  const int64_t keys = positions.end - 1 - first_key;
  constexpr DType kType = DType::kFloat32;
  AttentionProblem problem;
  problem.query = TensorView::Contiguous(embeddings_.data() + positions.first * head_size_, kType,
                                         {1, 1, positions.size(), head_size_});
  problem.key = TensorView::Contiguous(embeddings_.data() + first_key * head_size_, kType,
                                       {1, 1, keys, head_size_});
  problem.value = TensorView::Contiguous(values_.data() + first_key * kByteValues, kType,
                                         {1, 1, keys, kByteValues});
  problem.alpha = setting.alpha;
  problem.scale = setting.scale;
  problem.causal = true;
  // For the library the newest key that position i sees, j = i − 1, is at distance 0.
  if (setting.context) problem.window_left = *setting.context - 1;
  return problem;
}

Status Retrieval::PredictPiece(const Stretch& piece, const RetrievalSetting& setting,
                               bool want_support, Prediction* prediction) const {
  const AttentionProblem problem = ProblemOf(piece, setting);
  const size_t row = Row(prediction->positions, piece.first);
  AttentionSupport support;
  AttentionOutputs outputs;
  outputs.output =
      MutableTensorView::Contiguous(prediction->distribution.data() + row * kByteValues,
                                    DType::kFloat32, {1, 1, piece.size(), kByteValues});
  outputs.threshold = MutableTensorView::Contiguous(prediction->threshold.data() + row,
                                                    DType::kFloat64, {1, 1, piece.size()});
  if (want_support) outputs.support = &support;
  AttentionOptions options;
  options.num_threads = threads_;
  const auto start = std::chrono::steady_clock::now();
  if (Status status = AttentionForward(problem, outputs, options); !status.ok()) return status;
  prediction->seconds +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (report_) report_(VisiblePairs(piece, setting));
  if (!want_support) return Status::Ok();
  const auto before = static_cast<int64_t>(prediction->kept.size());
  const int64_t first_key = FirstKey(piece, setting);
  for (size_t n = 1; n < support.row_offsets.size(); ++n) {
    prediction->row_offsets.push_back(before + support.row_offsets[n]);
  }
  for (size_t e = 0; e < support.key_index.size(); ++e) {
    prediction->kept.push_back({first_key + support.key_index[e], support.probability[e]});
  }
  return Status::Ok();
}

Expected<Prediction> Retrieval::Predict(const Stretch& positions, const RetrievalSetting& setting,
                                        bool want_support) const {
  Prediction prediction;
  prediction.positions = positions;
  prediction.distribution.resize(static_cast<size_t>(positions.size() * kByteValues));
  prediction.threshold.resize(static_cast<size_t>(positions.size()));
  if (want_support) prediction.row_offsets.push_back(0);
  for (int64_t first = positions.first; first < positions.end; first += kQueriesPerCall) {
    const Stretch piece = {first, std::min(first + kQueriesPerCall, positions.end)};
    const Status status = PredictPiece(piece, setting, want_support, &prediction);
    if (!status.ok()) return status;
  }
  return prediction;
}

}  // namespace flash_entmax::cli
