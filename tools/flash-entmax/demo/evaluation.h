// What one α achieves on the scored part of the text.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_EVALUATION_H_
#define FLASH_ENTMAX_TOOLS_DEMO_EVALUATION_H_

#include <cstdint>
#include <vector>

#include "demo/calibration.h"
#include "demo/retrieval.h"
#include "demo/scoring.h"
#include "flash_entmax/status.h"

namespace flash_entmax::cli {

// Keys with positive weight, per query.
struct KeptKeys {
  double mean = 0.0;
  double median = 0.0;
  double mean_visible = 0.0;   // Keys that a query sees.
  double zero_share = 0.0;     // Of all visible query-key pairs.
  double median_for_99 = 0.0;  // Fewest keys that hold 99 % of a query's weight.
  int64_t queries = 0;         // That were counted.
};

struct Evaluation {
  double alpha = 0.0;
  Calibration calibration;
  Score score;
  KeptKeys kept;
  double seconds = 0.0;  // Of attention for all scored positions: the median of the rounds.
  int rounds = 0;

  RetrievalSetting setting() const { return {alpha, calibration.scale, {}}; }
};

// How many of the largest weights it takes to reach `share` of their sum.
int64_t KeysForShare(std::span<const KeptKey> kept, double share);

// Kept keys of `positions`. Where almost all are kept (α < kDenseAlpha) the lists would fill the
// memory, so stretches of them, evenly spread, are counted instead.
Expected<KeptKeys> CountKept(const Retrieval& retrieval, const Stretch& positions,
                             const RetrievalSetting& setting, const Prediction* with_support);

// Predicts `positions` with every evaluation's setting, in turn, `rounds` times; fills in score and
// seconds, and returns the predictions, with the support where α ≥ kDenseAlpha.
Expected<std::vector<Prediction>> Evaluate(const Retrieval& retrieval, const Stretch& positions,
                                           const ByteDistribution& prior, int rounds,
                                           std::vector<Evaluation>* evaluations);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_EVALUATION_H_
