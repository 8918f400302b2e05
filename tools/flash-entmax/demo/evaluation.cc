#include "demo/evaluation.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <utility>

namespace flash_entmax::cli {
namespace {

// Stretches of positions that stand for all of them where almost every key is kept.
constexpr int64_t kSampleLength = 16;

// How many of them; every one reads all keys, so fewer of long texts.
int64_t SampleStretchCount(int64_t keys) {
  return std::clamp<int64_t>((int64_t{1} << 19) / keys, 2, 8);
}

template <typename T>
double Median(std::vector<T> values) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  if (values.size() % 2 == 1) return static_cast<double>(values[middle]);
  return 0.5 * (static_cast<double>(values[middle - 1]) + static_cast<double>(values[middle]));
}

std::vector<Stretch> SampleStretches(const Stretch& positions) {
  const int64_t count = SampleStretchCount(positions.end);
  if (positions.size() <= count * kSampleLength) return {positions};
  std::vector<Stretch> sample;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t middle = positions.first + positions.size() * (2 * n + 1) / (2 * count);
    const int64_t first = middle - kSampleLength / 2;
    sample.push_back({first, first + kSampleLength});
  }
  return sample;
}

// Collects the counts of one query after the other.
class KeptCounter {
 public:
  void Add(const Prediction& prediction, const RetrievalSetting& setting) {
    for (int64_t i = prediction.positions.first; i < prediction.positions.end; ++i) {
      const std::span<const KeptKey> kept = prediction.KeptAt(i);
      counts_.push_back(static_cast<int64_t>(kept.size()));
      for_99_.push_back(KeysForShare(kept, 0.99));
      pairs_kept_ += static_cast<double>(kept.size());
    }
    pairs_visible_ += static_cast<double>(Retrieval::VisiblePairs(prediction.positions, setting));
  }

  KeptKeys Result() const {
    KeptKeys result;
    result.queries = static_cast<int64_t>(counts_.size());
    const auto queries = static_cast<double>(counts_.size());
    result.mean = pairs_kept_ / queries;
    result.median = Median(counts_);
    result.mean_visible = pairs_visible_ / queries;
    result.zero_share = 1.0 - pairs_kept_ / pairs_visible_;
    result.median_for_99 = Median(for_99_);
    return result;
  }

 private:
  std::vector<int64_t> counts_;
  std::vector<int64_t> for_99_;
  double pairs_kept_ = 0.0;
  double pairs_visible_ = 0.0;
};

}  // namespace

int64_t KeysForShare(std::span<const KeptKey> kept, double share) {
  std::vector<float> weights;
  double total = 0.0;
  for (const KeptKey& key : kept) {
    weights.push_back(key.weight);
    total += static_cast<double>(key.weight);
  }
  std::sort(weights.begin(), weights.end(), std::greater<>());
  double sum = 0.0;
  int64_t count = 0;
  for (const float weight : weights) {
    if (sum >= share * total) break;
    sum += static_cast<double>(weight);
    ++count;
  }
  return count;
}

Expected<KeptKeys> CountKept(const Retrieval& retrieval, const Stretch& positions,
                             const RetrievalSetting& setting, const Prediction* with_support) {
  KeptCounter counter;
  if (with_support != nullptr) {
    counter.Add(*with_support, setting);
    return counter.Result();
  }
  const bool dense = setting.alpha < kDenseAlpha;
  for (const Stretch& stretch : dense ? SampleStretches(positions) : std::vector{positions}) {
    const Expected<Prediction> prediction =
        retrieval.Predict(stretch, setting, /*want_support=*/true);
    if (!prediction.ok()) return prediction.status();
    counter.Add(*prediction, setting);
  }
  return counter.Result();
}

Expected<std::vector<Prediction>> Evaluate(const Retrieval& retrieval, const Stretch& positions,
                                           const ByteDistribution& prior, int rounds,
                                           std::vector<Evaluation>* evaluations) {
  std::vector<Prediction> predictions(evaluations->size());
  std::vector<std::vector<double>> seconds(evaluations->size());
  const auto predict = [&](size_t a, bool want_support) {
    Expected<Prediction> prediction =
        retrieval.Predict(positions, (*evaluations)[a].setting(), want_support);
    if (!prediction.ok()) return prediction.status();
    predictions[a] = std::move(prediction).value();
    return Status::Ok();
  };
  for (int round = 0; round < rounds; ++round) {
    for (size_t a = 0; a < evaluations->size(); ++a) {
      if (Status status = predict(a, false); !status.ok()) return status;
      seconds[a].push_back(predictions[a].seconds);
    }
  }
  for (size_t a = 0; a < evaluations->size(); ++a) {
    Evaluation& evaluation = (*evaluations)[a];
    const bool list_all = evaluation.alpha >= kDenseAlpha;
    if (list_all) {
      if (Status status = predict(a, true); !status.ok()) return status;
    }
    const Expected<KeptKeys> kept =
        CountKept(retrieval, positions, evaluation.setting(), list_all ? &predictions[a] : nullptr);
    if (!kept.ok()) return kept.status();
    evaluation.kept = *kept;
    evaluation.score =
        ScoreOf(retrieval, predictions[a], prior, evaluation.calibration.prior_weight);
    evaluation.seconds = Median(seconds[a]);
    evaluation.rounds = rounds;
  }
  return predictions;
}

}  // namespace flash_entmax::cli
