// The scale of the scores and the weight of the prior, chosen for each α in the same way on a part
// of the text that is not scored.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_CALIBRATION_H_
#define FLASH_ENTMAX_TOOLS_DEMO_CALIBRATION_H_

#include <cstdint>
#include <vector>

#include "demo/retrieval.h"
#include "demo/scoring.h"
#include "flash_entmax/status.h"

namespace flash_entmax::cli {

struct CalibrationPoint {
  double scale = 0.0;
  double prior_weight = 0.0;  // The best one at this scale.
  double bits_per_byte = 0.0;
};

struct Calibration {
  double scale = 0.0;
  double prior_weight = 0.0;
  std::vector<CalibrationPoint> grid;  // One point a scale, ascending.
};

// The scales and prior weights that are tried, the same for every α.
std::vector<double> CandidateScales();
std::vector<double> CandidatePriorWeights();

// The positions of text[0 … end−1] that candidates are compared on: its second half, where there is
// something to remember, and not more of it than is needed.
Stretch CalibrationStretch(int64_t end);

// Tries every scale and prior weight on `positions` and keeps the pair of the fewest bits per byte.
Expected<Calibration> Calibrate(const Retrieval& retrieval, const Stretch& positions, double alpha,
                                const ByteDistribution& prior);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_CALIBRATION_H_
