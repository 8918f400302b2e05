#include "demo/demo.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "flash_entmax/machine.h"
#include "machine_name.h"

namespace flash_entmax::cli {
namespace {

// That the scored positions see; texts up to 36,000 bytes are scored whole for less.
constexpr int64_t kScoredPairs = int64_t{1} << 32;
constexpr int64_t kVerifiedRows = 8;

// Rounds of what is timed: several while they are short, for steady figures.
int Rounds(const Stretch& scored) {
  constexpr int64_t kLongWork = int64_t{1} << 30;  // Pairs; about ten seconds for all α.
  return Retrieval::VisiblePairs(scored, {}) < kLongWork ? 3 : 1;
}

void AddSetting(const TextSource& source, const DemoSetting& setting, DemoResult* result) {
  result->version = Version();
  result->processor = ProcessorName();
  result->instruction_set = ActiveInstructionSet();
  result->threads = setting.threads > 0 ? setting.threads : DefaultThreads();
  result->text_description = source.description;
  result->text_bytes = static_cast<int64_t>(source.bytes.size());
  result->text_files = source.files;
  result->embedding = DefaultEmbedding(setting.seed);
}

Status CalibrateAll(const Retrieval& retrieval, const Stretch& positions,
                    const ByteDistribution& prior, const std::vector<double>& alphas,
                    std::vector<Evaluation>* evaluations) {
  for (const double alpha : alphas) {
    Evaluation evaluation;
    evaluation.alpha = alpha;
    Expected<Calibration> calibration = Calibrate(retrieval, positions, alpha, prior);
    if (!calibration.ok()) return calibration.status();
    evaluation.calibration = std::move(calibration).value();
    evaluations->push_back(std::move(evaluation));
  }
  return Status::Ok();
}

Status VerifyAll(const Retrieval& retrieval, const std::vector<Prediction>& predictions,
                 uint64_t seed, DemoResult* result) {
  for (size_t a = 0; a < predictions.size(); ++a) {
    Expected<Verification> verification = Verify(
        retrieval, predictions[a], result->evaluations[a].setting(), kVerifiedRows, seed + a);
    if (!verification.ok()) return verification.status();
    result->verifications.push_back(*verification);
  }
  return Status::Ok();
}

}  // namespace

Stretch CalibrationPart(int64_t size) { return {0, size / 10}; }

Stretch ScoredStretch(int64_t size) {
  return {std::max(CalibrationPart(size).end, size - PositionsFor(kScoredPairs, size, 4096, 32768)),
          size};
}

int64_t ExpectedPairs(int64_t size, const DemoSetting& setting) {
  const Stretch scored = ScoredStretch(size);
  const Stretch calibrated = CalibrationStretch(CalibrationPart(size).end);
  const auto pairs = [](const Stretch& stretch, std::optional<int64_t> context) {
    return Retrieval::VisiblePairs(stretch, {1.0, 1.0, context});
  };
  int64_t curve = 0;
  for (const int64_t context : CurveContexts(CurveStretch(scored))) {
    curve += pairs(CurveStretch(scored), context);
  }
  int64_t total = 0;
  for (const double alpha : setting.alphas) {
    // Where the support is listed, it takes one more pass.
    const int64_t listed = alpha >= kDenseAlpha ? 1 : 0;
    total += static_cast<int64_t>(CandidateScales().size()) * pairs(calibrated, {}) +
             (Rounds(scored) + listed) * pairs(scored, {}) + (Rounds(scored) + listed) * curve;
  }
  return total;
}

Expected<DemoResult> RunDemo(const TextSource& source, const DemoSetting& setting,
                             const std::function<void(int64_t)>& report) {
  const auto start = std::chrono::steady_clock::now();
  DemoResult result;
  AddSetting(source, setting, &result);
  Retrieval retrieval(source.bytes, result.embedding, setting.threads);
  retrieval.ReportTo(report);
  const Stretch calibration_part = CalibrationPart(retrieval.size());
  result.calibrated = CalibrationStretch(calibration_part.end);
  result.scored = ScoredStretch(retrieval.size());
  const ByteDistribution prior =
      ByteFrequencies(retrieval.text().substr(0, static_cast<size_t>(calibration_part.end)));
  result.baselines = Baselines(retrieval.text(), result.scored);

  Status status =
      CalibrateAll(retrieval, result.calibrated, prior, setting.alphas, &result.evaluations);
  if (!status.ok()) return status;
  const Expected<std::vector<Prediction>> predictions =
      Evaluate(retrieval, result.scored, prior, Rounds(result.scored), &result.evaluations);
  if (!predictions.ok()) return predictions.status();
  status = VerifyAll(retrieval, *predictions, setting.seed, &result);
  if (!status.ok()) return status;

  result.curve_positions = CurveStretch(result.scored);
  Expected<std::vector<Curve>> curves = MeasureCurves(retrieval, result.curve_positions, prior,
                                                      Rounds(result.scored), result.evaluations);
  if (!curves.ok()) return curves.status();
  result.curves = std::move(curves).value();

  result.shown = ShownEvaluation(result.evaluations);
  Expected<std::vector<ChosenPosition>> passages =
      ChoosePassages(retrieval, result.evaluations, *predictions);
  if (!passages.ok()) return passages.status();
  result.passages = std::move(passages).value();
  const Stretch map_queries =
      result.shown < 0
          ? Stretch{result.scored.end - std::min(kMapQueries, result.scored.size()),
                    result.scored.end}
          : ChooseMapQueries(retrieval, (*predictions)[static_cast<size_t>(result.shown)]);
  Expected<std::vector<AttentionMap>> maps = MakeMaps(retrieval, map_queries, result.evaluations);
  if (!maps.ok()) return maps.status();
  result.maps = std::move(maps).value();
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace flash_entmax::cli
