#include "demo/curves.h"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace flash_entmax::cli {
namespace {

// Of the longest context.
constexpr int64_t kPairs = int64_t{1} << 30;

// One point; the time is the least of the rounds, since the work is short and anything that comes
// between only adds.
Expected<CurvePoint> MeasurePoint(const Retrieval& retrieval, const Stretch& stretch,
                                  const ByteDistribution& prior, int rounds,
                                  const Evaluation& evaluation, int64_t context) {
  RetrievalSetting setting = evaluation.setting();
  if (context < stretch.end - 1) setting.context = context;
  Expected<Prediction> prediction = retrieval.Predict(stretch, setting, /*want_support=*/false);
  if (!prediction.ok()) return prediction.status();
  double seconds = prediction->seconds;
  for (int round = 1; round < rounds; ++round) {
    prediction = retrieval.Predict(stretch, setting, /*want_support=*/false);
    if (!prediction.ok()) return prediction.status();
    seconds = std::min(seconds, prediction->seconds);
  }
  const Expected<KeptKeys> kept = CountKept(retrieval, stretch, setting, nullptr);
  if (!kept.ok()) return kept.status();
  const Score score = ScoreOf(retrieval, *prediction, prior, evaluation.calibration.prior_weight);
  return CurvePoint{context, score.bits_per_byte, score.accuracy, kept->mean,
                    seconds / static_cast<double>(stretch.size())};
}

}  // namespace

Stretch CurveStretch(const Stretch& scored) {
  const int64_t length =
      std::min({PositionsFor(kPairs, scored.end, 512, 2048), scored.size(), scored.end / 8});
  return {scored.end - length, scored.end};
}

std::vector<int64_t> CurveContexts(const Stretch& stretch) {
  constexpr int64_t kUsualStart = 1024;
  int64_t context = kUsualStart;
  while (context > 1 && context * 4 > stretch.first) context /= 2;
  std::vector<int64_t> contexts;
  // The whole past comes last; a context just below it would show the same again.
  for (; context <= stretch.first && context * 5 / 4 < stretch.end; context *= 2) {
    contexts.push_back(context);
  }
  contexts.push_back(stretch.end - 1);
  return contexts;
}

Expected<std::vector<Curve>> MeasureCurves(const Retrieval& retrieval, const Stretch& stretch,
                                           const ByteDistribution& prior, int rounds,
                                           const std::vector<Evaluation>& evaluations) {
  std::vector<Curve> curves(evaluations.size());
  for (size_t a = 0; a < evaluations.size(); ++a) curves[a].alpha = evaluations[a].alpha;
  for (const int64_t context : CurveContexts(stretch)) {
    for (size_t a = 0; a < evaluations.size(); ++a) {
      Expected<CurvePoint> point =
          MeasurePoint(retrieval, stretch, prior, rounds, evaluations[a], context);
      if (!point.ok()) return point.status();
      curves[a].points.push_back(*point);
    }
  }
  return curves;
}

}  // namespace flash_entmax::cli
