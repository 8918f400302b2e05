#include "demo/calibration.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace flash_entmax::cli {
namespace {

// Of one candidate: a fraction of a second.
constexpr int64_t kPairs = int64_t{1} << 26;

}  // namespace

std::vector<double> CandidateScales() {
  // Powers of 2^(1/3), 1/16 to 64. Softmax does best near 16, sparsemax near 1, and lower the more
  // keys there are.
  constexpr int kStepsPerDoubling = 3;
  std::vector<double> scales;
  for (int step = -4 * kStepsPerDoubling; step <= 6 * kStepsPerDoubling; ++step) {
    scales.push_back(std::exp2(static_cast<double>(step) / kStepsPerDoubling));
  }
  return scales;
}

std::vector<double> CandidatePriorWeights() {
  return {0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5};
}

Stretch CalibrationStretch(int64_t end) {
  return {std::max<int64_t>({1, end / 2, end - PositionsFor(kPairs, end, 512, 2048)}), end};
}

Expected<Calibration> Calibrate(const Retrieval& retrieval, const Stretch& positions, double alpha,
                                const ByteDistribution& prior) {
  Calibration calibration;
  double fewest_bits = std::numeric_limits<double>::infinity();
  for (const double scale : CandidateScales()) {
    RetrievalSetting setting;
    setting.alpha = alpha;
    setting.scale = scale;
    const Expected<Prediction> prediction =
        retrieval.Predict(positions, setting, /*want_support=*/false);
    if (!prediction.ok()) return prediction.status();
    CalibrationPoint best = {scale, 0.0, std::numeric_limits<double>::infinity()};
    for (const double weight : CandidatePriorWeights()) {
      const double bits = MeanBits(retrieval, *prediction, prior, weight);
      if (bits < best.bits_per_byte) best = {scale, weight, bits};
    }
    if (best.bits_per_byte < fewest_bits) {
      fewest_bits = best.bits_per_byte;
      calibration.scale = scale;
      calibration.prior_weight = best.prior_weight;
    }
    calibration.grid.push_back(best);
  }
  return calibration;
}

}  // namespace flash_entmax::cli
