#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "demo/report.h"
#include "demo/wording.h"

namespace flash_entmax::cli {
namespace {

std::string Positions(const Stretch& stretch) {
  return fmt::format("{} to {}", Grouped(stretch.first), Grouped(stretch.end - 1));
}

void PrintSetting(const DemoResult& result) {
  std::vector<int> lengths;
  for (const NgramKind& kind : result.embedding.kinds) lengths.push_back(kind.length);
  fmt::print("Attention as retrieval over a real text, with no training\n\n");
  fmt::print("text        {}\n", result.text_description);
  fmt::print("            {} bytes of {} {}\n", Grouped(result.text_bytes),
             Grouped(result.text_files), result.text_files == 1 ? "file" : "files");
  fmt::print("query, key  hashes of the last {} bytes; head size {}\n", fmt::join(lengths, ", "),
             result.embedding.head_size);
  fmt::print("value       the byte at the position\n");
  fmt::print("calibrated  on bytes {}\n", Positions(result.calibrated));
  fmt::print("scored      on bytes {}, each from all bytes before it\n", Positions(result.scored));
  fmt::print("machine     {}, {} threads, {}\n\n", result.processor, result.threads,
             result.instruction_set);
}

void PrintScores(const DemoResult& result) {
  Table table({"α", "scale", "prior", "bits/byte", "right", "time", "kept", "median", "zeros"});
  for (const Evaluation& evaluation : result.evaluations) {
    table.Add({AlphaName(evaluation.alpha), fmt::format("{:.3g}", evaluation.calibration.scale),
               fmt::format("{:g}", evaluation.calibration.prior_weight),
               fmt::format("{:.3f}", evaluation.score.bits_per_byte),
               Percent(evaluation.score.accuracy), Duration(evaluation.seconds),
               GroupedMean(evaluation.kept.mean), GroupedMean(evaluation.kept.median),
               Percent(evaluation.kept.zero_share, 2)});
  }
  table.Print();
  fmt::print("\nscale  of the scores, and prior, the weight of plain byte frequencies: chosen\n");
  fmt::print("       for each α on the calibrated bytes, from the same candidates\n");
  fmt::print("time   attention for {} queries, {}\n", Grouped(result.scored.size()),
             RoundsText(result.evaluations[0].rounds));
  fmt::print("kept   keys of positive weight per query, which sees {} on average\n",
             GroupedMean(result.mean_visible()));
  for (const Evaluation& evaluation : result.evaluations) {
    if (evaluation.kept.queries == result.scored.size()) continue;
    fmt::print("       (α = {:g}: of {} queries, evenly spread)\n", evaluation.alpha,
               Grouped(evaluation.kept.queries));
  }
  fmt::print("zeros  share of all query-key pairs whose weight is exactly 0\n\n");

  Table baselines({"for orientation, without attention", "bits/byte", "right"});
  for (const Baseline& baseline : result.baselines) {
    baselines.Add({baseline.name, fmt::format("{:.3f}", baseline.score.bits_per_byte),
                   Percent(baseline.score.accuracy)});
  }
  baselines.Print();
}

void PrintVerification(const DemoResult& result) {
  fmt::print("\nCheck of {} random rows each against the double-precision reference\n\n",
             result.verifications[0].rows);
  Table table({"α", "largest error", "allowed", "same keys kept", ""});
  for (size_t a = 0; a < result.verifications.size(); ++a) {
    const Verification& verification = result.verifications[a];
    table.Add({AlphaName(result.evaluations[a].alpha),
               fmt::format("{:.1e}", verification.largest_error),
               fmt::format("{:.1e}", verification.bound),
               fmt::format("{} of {}", verification.equal_supports, verification.rows),
               verification.passed ? "pass" : "FAIL"});
  }
  table.Print();
}

void PrintCurves(const DemoResult& result) {
  fmt::print("\nMore context for the last {} bytes: bits per byte, and keys kept per query\n\n",
             Grouped(result.curve_positions.size()));
  std::vector<std::string> header = {"context"};
  for (const Curve& curve : result.curves) header.push_back(ShortAlphaName(curve.alpha));
  for (const Curve& curve : result.curves) header.push_back(ShortAlphaName(curve.alpha));
  Table table(header);
  for (size_t n = 0; n < result.curves[0].points.size(); ++n) {
    std::vector<std::string> row = {Grouped(result.curves[0].points[n].context)};
    for (const Curve& curve : result.curves) {
      row.push_back(fmt::format("{:.3f}", curve.points[n].bits_per_byte));
    }
    for (const Curve& curve : result.curves) {
      row.push_back(GroupedMean(curve.points[n].mean_kept));
    }
    table.Add(row);
  }
  table.Print();
}

// `before` aligned to the right in `width` columns, so that the bytes in brackets stand in line.
std::string ExcerptLine(const Excerpt& excerpt, size_t before_width, size_t after_width) {
  std::string before = Visible(excerpt.before);
  if (before.size() > before_width) before = before.substr(before.size() - before_width);
  const std::string byte = Visible(std::string(1, static_cast<char>(excerpt.byte)));
  return fmt::format("{:>{}}[{}]{}", before, before_width, byte,
                     Visible(excerpt.after).substr(0, after_width));
}

void PrintPassages(const DemoResult& result) {
  constexpr size_t kBefore = 40;
  constexpr size_t kAfter = 14;
  if (result.passages.empty()) return;
  const double shown = result.evaluations[static_cast<size_t>(result.shown)].alpha;
  fmt::print("\nWhere attention with α = {:g} went: weight, bytes back, and the passage it kept\n",
             shown);
  for (const ChosenPosition& chosen : result.passages) {
    fmt::print("\nbyte {}: {}\n", Grouped(chosen.excerpt.position), chosen.reason);
    fmt::print("{:18}{}\n", "", ExcerptLine(chosen.excerpt, kBefore, kAfter));
    for (const KeptPassage& passage : chosen.passages) {
      fmt::print("{:7.4f} {:>9} {}\n", passage.weight, Grouped(passage.distance),
                 ExcerptLine(passage.excerpt, kBefore, kAfter));
    }
    int64_t kept = 0;
    std::vector<std::string> views;
    for (const PositionView& view : chosen.views) {
      if (view.alpha == shown) {
        kept = view.kept;
        continue;
      }
      views.push_back(fmt::format("{} keeps {}, needs {} for 99 % of its weight",
                                  ShortAlphaName(view.alpha), Grouped(view.kept),
                                  Grouped(view.for_99_percent)));
    }
    const int64_t hidden = kept - static_cast<int64_t>(chosen.passages.size());
    if (hidden > 0) fmt::print("{:7.4f} on {} more\n", chosen.rest_weight, Grouped(hidden));
    fmt::print("{:7} exactly, on all other {} keys\n", "0", Grouped(chosen.visible - kept));
    for (const std::string& view : views) fmt::print("        {}\n", view);
  }
}

}  // namespace

void PrintReport(const DemoResult& result) {
  PrintSetting(result);
  PrintScores(result);
  PrintVerification(result);
  PrintCurves(result);
  PrintPassages(result);
}

}  // namespace flash_entmax::cli
