// How good predictions of the next byte are, and simple predictions to compare with.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_SCORING_H_
#define FLASH_ENTMAX_TOOLS_DEMO_SCORING_H_

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "demo/retrieval.h"

namespace flash_entmax::cli {

using ByteDistribution = std::array<double, kByteValues>;

struct Score {
  double bits_per_byte = 0.0;  // Mean of −log₂ of what the byte that came was given.
  double accuracy = 0.0;       // Share of bytes that were given the most.
};

// How often each byte comes in `text`, every count raised by a half, so that none is impossible.
ByteDistribution ByteFrequencies(std::string_view text);

// The weight of the prior in a mixture: the prediction is (1 − w)·attention + w·prior. Without a
// prior, one byte that no kept key foresaw would cost infinitely many bits.
double MeanBits(const Retrieval& retrieval, const Prediction& prediction,
                const ByteDistribution& prior, double prior_weight);

Score ScoreOf(const Retrieval& retrieval, const Prediction& prediction,
              const ByteDistribution& prior, double prior_weight);

// A prediction without attention, for orientation.
struct Baseline {
  std::string name;
  Score score;
};

// Counts of the bytes so far, and of the bytes so far after the same byte and after the same two,
// each mixed with the next shorter one; learnt from the start of the text, scored on `positions`.
std::vector<Baseline> Baselines(std::string_view text, const Stretch& positions);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_SCORING_H_
