#include "demo/report.h"
#include "demo/wording.h"

namespace flash_entmax::cli {
namespace {

Json StretchToJson(const Stretch& stretch) {
  return {{"first", stretch.first}, {"end", stretch.end}};
}

Json ScoreToJson(const Score& score) {
  return {{"bits_per_byte", JsonNumber(score.bits_per_byte)}, {"accuracy", score.accuracy}};
}

Json CalibrationToJson(const Calibration& calibration) {
  Json grid = Json::array();
  for (const CalibrationPoint& point : calibration.grid) {
    grid.push_back({{"scale", point.scale},
                    {"prior_weight", point.prior_weight},
                    {"bits_per_byte", JsonNumber(point.bits_per_byte)}});
  }
  return {{"scale", calibration.scale}, {"prior_weight", calibration.prior_weight}, {"grid", grid}};
}

Json KeptToJson(const KeptKeys& kept) {
  return {{"mean", kept.mean},
          {"median", kept.median},
          {"mean_visible", kept.mean_visible},
          {"exact_zero_share", kept.zero_share},
          {"median_for_99_percent", kept.median_for_99},
          {"queries", kept.queries}};
}

Json VerificationToJson(const Verification& verification) {
  return {{"rows", verification.rows},
          {"largest_error", JsonNumber(verification.largest_error)},
          {"allowed_error", JsonNumber(verification.bound)},
          {"equal_supports", verification.equal_supports},
          {"supports_equal_up_to_rounding", verification.possible_supports},
          {"passed", verification.passed}};
}

Json CurveToJson(const Curve& curve) {
  Json points = Json::array();
  for (const CurvePoint& point : curve.points) {
    points.push_back({{"context", point.context},
                      {"bits_per_byte", JsonNumber(point.bits_per_byte)},
                      {"accuracy", point.accuracy},
                      {"mean_kept", point.mean_kept},
                      {"seconds_per_query", point.seconds_per_query}});
  }
  return points;
}

Json ExcerptToJson(const Excerpt& excerpt) {
  return {{"position", excerpt.position},
          {"before", Visible(excerpt.before)},
          {"byte", excerpt.byte},
          {"after", Visible(excerpt.after)}};
}

Json PassagesToJson(const std::vector<ChosenPosition>& passages) {
  Json list = Json::array();
  for (const ChosenPosition& chosen : passages) {
    Json entry = {{"reason", chosen.reason},
                  {"excerpt", ExcerptToJson(chosen.excerpt)},
                  {"visible", chosen.visible},
                  {"passages", Json::array()},
                  {"weight_not_shown", chosen.rest_weight},
                  {"by_alpha", Json::array()}};
    for (const KeptPassage& passage : chosen.passages) {
      entry["passages"].push_back({{"weight", passage.weight},
                                   {"distance", passage.distance},
                                   {"excerpt", ExcerptToJson(passage.excerpt)}});
    }
    for (const PositionView& view : chosen.views) {
      entry["by_alpha"].push_back({{"alpha", view.alpha},
                                   {"kept", view.kept},
                                   {"keys_for_99_percent", view.for_99_percent},
                                   {"probability", view.probability}});
    }
    list.push_back(entry);
  }
  return list;
}

Json EmbeddingToJson(const EmbeddingOptions& embedding) {
  Json kinds = Json::array();
  for (const NgramKind& kind : embedding.kinds) {
    kinds.push_back({{"length", kind.length}, {"weight", kind.weight}});
  }
  return {{"head_size", embedding.head_size}, {"seed", embedding.seed}, {"ngrams", kinds}};
}

}  // namespace

Json ReportToJson(const DemoResult& result) {
  Json document = {{"command", "demo"},
                   {"command_line", result.command_line},
                   {"version", result.version},
                   {"processor", result.processor},
                   {"instruction_set", result.instruction_set},
                   {"threads", result.threads},
                   {"text",
                    {{"description", result.text_description},
                     {"bytes", result.text_bytes},
                     {"files", result.text_files}}},
                   {"embedding", EmbeddingToJson(result.embedding)},
                   {"calibrated_on", StretchToJson(result.calibrated)},
                   {"scored_on", StretchToJson(result.scored)},
                   {"curves_on", StretchToJson(result.curve_positions)}};
  document["baselines"] = Json::array();
  for (const Baseline& baseline : result.baselines) {
    Json entry = {{"name", baseline.name}};
    entry.update(ScoreToJson(baseline.score));
    document["baselines"].push_back(entry);
  }
  document["results"] = Json::array();
  for (size_t a = 0; a < result.evaluations.size(); ++a) {
    const Evaluation& evaluation = result.evaluations[a];
    Json entry = {{"alpha", evaluation.alpha}};
    entry.update(ScoreToJson(evaluation.score));
    entry["seconds"] = evaluation.seconds;
    entry["rounds"] = evaluation.rounds;
    entry["kept"] = KeptToJson(evaluation.kept);
    entry["calibration"] = CalibrationToJson(evaluation.calibration);
    entry["check"] = VerificationToJson(result.verifications[a]);
    entry["curve"] = CurveToJson(result.curves[a]);
    document["results"].push_back(entry);
  }
  document["passages"] = PassagesToJson(result.passages);
  document["seconds"] = result.seconds;
  document["passed"] = result.passed();
  return document;
}

}  // namespace flash_entmax::cli
