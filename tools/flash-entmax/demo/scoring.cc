#include "demo/scoring.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <unordered_map>

namespace flash_entmax::cli {
namespace {

size_t LikeliestByte(const ByteDistribution& distribution) {
  return static_cast<size_t>(std::max_element(distribution.begin(), distribution.end()) -
                             distribution.begin());
}

// (1 − w)·attention + w·prior at one position.
ByteDistribution Mixture(std::span<const float> attention, const ByteDistribution& prior,
                         double prior_weight) {
  ByteDistribution mixture;
  for (size_t b = 0; b < mixture.size(); ++b) {
    mixture[b] = (1.0 - prior_weight) * static_cast<double>(attention[b]) + prior_weight * prior[b];
  }
  return mixture;
}

// Counts of next bytes in one context.
struct Counts {
  std::array<uint32_t, kByteValues> byte{};
  double total = 0.0;

  void Add(unsigned char value) {
    ++byte[value];
    ++total;
  }

  // Counts mixed with a shorter context's prediction, which weighs like two bytes seen.
  ByteDistribution Predict(const ByteDistribution& shorter) const {
    constexpr double kShorterCounts = 2.0;
    ByteDistribution distribution;
    for (size_t b = 0; b < distribution.size(); ++b) {
      distribution[b] = (byte[b] + kShorterCounts * shorter[b]) / (total + kShorterCounts);
    }
    return distribution;
  }
};

}  // namespace

ByteDistribution ByteFrequencies(std::string_view text) {
  constexpr double kUnseen = 0.5;
  ByteDistribution frequencies;
  frequencies.fill(kUnseen);
  for (const char c : text) ++frequencies[static_cast<unsigned char>(c)];
  const double total = static_cast<double>(text.size()) + kUnseen * kByteValues;
  for (double& frequency : frequencies) frequency /= total;
  return frequencies;
}

double MeanBits(const Retrieval& retrieval, const Prediction& prediction,
                const ByteDistribution& prior, double prior_weight) {
  double bits = 0.0;
  for (int64_t i = prediction.positions.first; i < prediction.positions.end; ++i) {
    const unsigned char byte = retrieval.ByteAt(i);
    const auto attention = static_cast<double>(prediction.DistributionAt(i)[byte]);
    bits -= std::log2((1.0 - prior_weight) * attention + prior_weight * prior[byte]);
  }
  return bits / static_cast<double>(prediction.positions.size());
}

Score ScoreOf(const Retrieval& retrieval, const Prediction& prediction,
              const ByteDistribution& prior, double prior_weight) {
  int64_t hits = 0;
  for (int64_t i = prediction.positions.first; i < prediction.positions.end; ++i) {
    const ByteDistribution mixture = Mixture(prediction.DistributionAt(i), prior, prior_weight);
    if (LikeliestByte(mixture) == retrieval.ByteAt(i)) ++hits;
  }
  return {MeanBits(retrieval, prediction, prior, prior_weight),
          static_cast<double>(hits) / static_cast<double>(prediction.positions.size())};
}

std::vector<Baseline> Baselines(std::string_view text, const Stretch& positions) {
  std::vector<Baseline> baselines = {
      {"byte frequencies so far", {}}, {"byte pairs so far", {}}, {"byte triples so far", {}}};
  ByteDistribution uniform;
  uniform.fill(1.0 / kByteValues);
  std::array<std::unordered_map<uint32_t, Counts>, 3> counts;
  for (int64_t i = 0; i < positions.end; ++i) {
    const auto byte_at = [&](int64_t j) {
      return j < 0 ? 0U : static_cast<unsigned char>(text[static_cast<size_t>(j)]);
    };
    const std::array<uint32_t, 3> past = {0, byte_at(i - 1), byte_at(i - 1) * 256 + byte_at(i - 2)};
    const auto byte = static_cast<unsigned char>(byte_at(i));
    ByteDistribution distribution = uniform;
    for (size_t order = 0; order < counts.size(); ++order) {
      Counts& here = counts[order][past[order]];
      if (i >= positions.first) {
        distribution = here.Predict(distribution);
        baselines[order].score.bits_per_byte -= std::log2(distribution[byte]);
        baselines[order].score.accuracy += LikeliestByte(distribution) == byte ? 1.0 : 0.0;
      }
      here.Add(byte);
    }
  }
  for (Baseline& baseline : baselines) {
    baseline.score.bits_per_byte /= static_cast<double>(positions.size());
    baseline.score.accuracy /= static_cast<double>(positions.size());
  }
  return baselines;
}

}  // namespace flash_entmax::cli
