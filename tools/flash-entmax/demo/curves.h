// The same positions predicted from more and more context.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_CURVES_H_
#define FLASH_ENTMAX_TOOLS_DEMO_CURVES_H_

#include <cstdint>
#include <vector>

#include "demo/evaluation.h"
#include "demo/retrieval.h"
#include "flash_entmax/status.h"

namespace flash_entmax::cli {

struct CurvePoint {
  int64_t context = 0;  // Keys that each query sees; for the last point, those of the last query.
  double bits_per_byte = 0.0;
  double accuracy = 0.0;
  double mean_kept = 0.0;
  double seconds_per_query = 0.0;
};

struct Curve {
  double alpha = 0.0;
  std::vector<CurvePoint> points;
};

// The positions that curves are made of: the last ones of the text, few enough to leave most of it
// as context.
Stretch CurveStretch(const Stretch& scored);

// 1024, 2048, … as far as every position of the stretch has so much past, and then all of it, which
// is written as the stretch's end − 1. Short texts begin lower.
std::vector<int64_t> CurveContexts(const Stretch& stretch);

// One curve an evaluation, at its calibrated setting.
Expected<std::vector<Curve>> MeasureCurves(const Retrieval& retrieval, const Stretch& stretch,
                                           const ByteDistribution& prior, int rounds,
                                           const std::vector<Evaluation>& evaluations);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_CURVES_H_
