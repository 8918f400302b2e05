#include "demo/attention_map.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstddef>
#include <span>
#include <utility>

namespace flash_entmax::cli {
namespace {

// Keys nearer than this are left out when stretches are compared: they are near the diagonal of
// every picture.
constexpr int64_t kNear = 64;

Stretch KeysOf(const Stretch& queries) {
  return {std::max<int64_t>(0, queries.end - 1 - kMapKeys), queries.end - 1};
}

double WeightInside(const Retrieval& retrieval, const Prediction& prediction,
                    const Stretch& queries) {
  const Stretch keys = KeysOf(queries);
  double sum = 0.0;
  for (int64_t i = queries.first; i < queries.end; ++i) {
    // Runs of blanks look like each other everywhere; passages of words are what should show.
    if (std::isalnum(retrieval.ByteAt(i)) == 0) continue;
    for (const KeptKey& key : prediction.KeptAt(i)) {
      if (key.position >= keys.first && i - key.position > kNear) {
        sum += static_cast<double>(key.weight);
      }
    }
  }
  return sum;
}

// Weights from thresholds, where lists of the kept keys would be too long: p = exp(s − τ) for
// softmax, [(α−1)s − τ]₊^(1/(α−1)) else, with the scores in double.
void FillFromThresholds(const Retrieval& retrieval, const RetrievalSetting& setting,
                        const Prediction& prediction, AttentionMap* map) {
  const AttentionProblem problem = retrieval.ProblemOf(map->queries, setting);
  const auto* query = static_cast<const float*>(problem.query.data);
  const auto* key = static_cast<const float*>(problem.key.data);
  const int64_t size = retrieval.head_size();
  for (int64_t i = map->queries.first; i < map->queries.end; ++i) {
    const double threshold =
        prediction.threshold[static_cast<size_t>(i - prediction.positions.first)];
    for (int64_t j = map->keys.first; j < std::min(i, map->keys.end); ++j) {
      double score = 0.0;
      for (int64_t e = 0; e < size; ++e) {
        score += static_cast<double>(query[(i - map->queries.first) * size + e]) *
                 static_cast<double>(key[j * size + e]);
      }
      score *= setting.scale;
      const double power = setting.alpha - 1.0;
      const double weight = power == 0.0
                                ? std::exp(score - threshold)
                                : std::pow(std::max(0.0, power * score - threshold), 1.0 / power);
      map->weight[static_cast<size_t>((i - map->queries.first) * map->keys.size() +
                                      (j - map->keys.first))] = static_cast<float>(weight);
    }
  }
}

void FillFromSupport(const Prediction& prediction, AttentionMap* map) {
  for (int64_t i = map->queries.first; i < map->queries.end; ++i) {
    for (const KeptKey& key : prediction.KeptAt(i)) {
      if (key.position < map->keys.first) continue;
      map->weight[static_cast<size_t>((i - map->queries.first) * map->keys.size() +
                                      (key.position - map->keys.first))] = key.weight;
    }
  }
}

void Summarise(AttentionMap* map) {
  double sum = 0.0;
  int64_t positive = 0;
  for (const float weight : map->weight) {
    sum += static_cast<double>(weight);
    positive += weight > 0.0F ? 1 : 0;
  }
  int64_t visible = 0;
  for (int64_t i = map->queries.first; i < map->queries.end; ++i) {
    visible += std::min(i, map->keys.end) - map->keys.first;
  }
  map->share_inside = sum / static_cast<double>(map->queries.size());
  map->zero_share = 1.0 - static_cast<double>(positive) / static_cast<double>(visible);
}

}  // namespace

Stretch ChooseMapQueries(const Retrieval& retrieval, const Prediction& with_support) {
  const Stretch& all = with_support.positions;
  const int64_t length = std::min(kMapQueries, all.size());
  Stretch best = {all.end - length, all.end};
  double most = -1.0;
  for (int64_t first = all.first; first + length <= all.end; first += length) {
    const Stretch queries = {first, first + length};
    if (queries.end - 1 < kMapKeys) continue;
    const double weight = WeightInside(retrieval, with_support, queries);
    if (weight > most) {
      most = weight;
      best = queries;
    }
  }
  return best;
}

Expected<std::vector<AttentionMap>> MakeMaps(const Retrieval& retrieval, const Stretch& queries,
                                             const std::vector<Evaluation>& evaluations) {
  std::vector<AttentionMap> maps;
  for (const Evaluation& evaluation : evaluations) {
    AttentionMap map;
    map.alpha = evaluation.alpha;
    map.queries = queries;
    map.keys = KeysOf(queries);
    map.weight.assign(static_cast<size_t>(queries.size() * map.keys.size()), 0.0F);
    const bool dense = evaluation.alpha < kDenseAlpha;
    const Expected<Prediction> prediction =
        retrieval.Predict(queries, evaluation.setting(), /*want_support=*/!dense);
    if (!prediction.ok()) return prediction.status();
    if (dense) {
      FillFromThresholds(retrieval, evaluation.setting(), *prediction, &map);
    } else {
      FillFromSupport(*prediction, &map);
    }
    Summarise(&map);
    maps.push_back(std::move(map));
  }
  return maps;
}

std::vector<PaletteColour> MapPalette() {
  constexpr int kSteps = 15;
  constexpr double kFaintestAlpha = 0.16;
  std::vector<PaletteColour> palette = {{0, 0, 0, 0}};
  for (int step = 0; step < kSteps; ++step) {
    const double share = static_cast<double>(step) / (kSteps - 1);
    // One hue that is darker than white paper and lighter than black; only its strength changes.
    const double alpha = kFaintestAlpha + (1.0 - kFaintestAlpha) * share;
    palette.push_back({208, 66, 28, static_cast<uint8_t>(std::lround(255.0 * alpha))});
  }
  return palette;
}

std::string MapToPng(const AttentionMap& map) {
  const std::vector<PaletteColour> palette = MapPalette();
  const auto steps = static_cast<double>(palette.size() - 2);
  const double faintest = std::log10(kFaintestWeight);
  std::vector<uint8_t> pixels(map.weight.size(), 0);
  for (size_t n = 0; n < pixels.size(); ++n) {
    const auto weight = static_cast<double>(map.weight[n]);
    if (!(weight > 0.0)) continue;
    const double share = std::clamp(1.0 - std::log10(weight) / faintest, 0.0, 1.0);
    pixels[n] = static_cast<uint8_t>(1 + std::lround(share * steps));
  }
  return EncodePng(static_cast<int>(map.keys.size()), static_cast<int>(map.queries.size()), palette,
                   pixels);
}

}  // namespace flash_entmax::cli
