#include "demo/html_sections.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <string_view>
#include <vector>

#include "demo/html_text.h"
#include "demo/svg_plot.h"
#include "demo/wording.h"

namespace flash_entmax::cli {
namespace {

std::string TableRow(const std::vector<std::string>& cells, std::string_view tag,
                     std::string_view row_class = "") {
  std::string row = row_class.empty() ? "<tr>" : fmt::format("<tr class=\"{}\">", row_class);
  for (const std::string& cell : cells) {
    row += fmt::format("<{}>{}</{}>", tag, EscapeHtml(cell), tag);
  }
  return row + "</tr>\n";
}

std::string Figure(const std::string& caption, const Plot& plot) {
  return fmt::format("<figure><figcaption>{}</figcaption>{}</figure>\n", EscapeHtml(caption),
                     RenderPlot(plot));
}

// A plot of one number of the curves against context.
template <typename Number>
std::string CurveFigure(const DemoResult& result, const std::string& caption, const PlotAxis& y,
                        Number number) {
  Plot plot;
  plot.title = caption;
  plot.x = {"context, keys that a query sees", AxisScale::kLog2};
  plot.y = y;
  for (const Curve& curve : result.curves) {
    PlotSeries series;
    series.name = ShortAlphaName(curve.alpha);
    for (const CurvePoint& point : curve.points) {
      series.points.push_back({static_cast<double>(point.context), number(point), false});
    }
    plot.series.push_back(series);
  }
  return Figure(caption, plot);
}

std::string CalibrationFigure(const DemoResult& result) {
  // Where the scores say nothing, or everything, the curves run away; the bottom is what matters.
  constexpr double kBitsShown = 1.0;
  Plot plot;
  plot.title = "Scale of the scores, chosen on the first tenth";
  plot.x = {"scale of the scores (the large mark is the one used)", AxisScale::kLog2};
  plot.y = {"bits per byte", AxisScale::kLinear};
  double fewest = 8.0;
  for (const Evaluation& evaluation : result.evaluations) {
    for (const CalibrationPoint& point : evaluation.calibration.grid) {
      fewest = std::min(fewest, point.bits_per_byte);
    }
  }
  for (const Evaluation& evaluation : result.evaluations) {
    PlotSeries series;
    series.name = ShortAlphaName(evaluation.alpha);
    for (const CalibrationPoint& point : evaluation.calibration.grid) {
      if (point.bits_per_byte > fewest + kBitsShown) continue;
      series.points.push_back(
          {point.scale, point.bits_per_byte, point.scale == evaluation.calibration.scale});
    }
    plot.series.push_back(series);
  }
  return Figure(plot.title, plot);
}

// Bytes at the end of `a` that are the end of `b` too.
size_t CommonEnd(std::string_view a, std::string_view b) {
  size_t length = 0;
  while (length < std::min(a.size(), b.size()) &&
         a[a.size() - 1 - length] == b[b.size() - 1 - length]) {
    ++length;
  }
  return length;
}

std::string ExcerptHtml(const Excerpt& excerpt, size_t same) {
  const size_t other = excerpt.before.size() - same;
  return fmt::format(
      "<span class=\"before\"><span>{}<span class=\"same\">{}</span></span></span>"
      "<mark>{}</mark><span class=\"after\">{}</span>",
      EscapeHtml(Visible(excerpt.before.substr(0, other))),
      EscapeHtml(Visible(excerpt.before.substr(other))),
      EscapeHtml(Visible(std::string(1, static_cast<char>(excerpt.byte)))),
      EscapeHtml(Visible(excerpt.after)));
}

std::string PassageHtml(const DemoResult& result, const ChosenPosition& chosen) {
  std::string html =
      fmt::format("<div class=\"passage\">\n<h3>Byte {}: {}</h3>\n<div class=\"rows\">\n",
                  Grouped(chosen.excerpt.position), EscapeHtml(chosen.reason));
  html +=
      "<div class=\"row head\"><span>weight</span><span>bytes back</span>"
      "<div>the passage, and the byte that came</div></div>\n";
  html += fmt::format(
      "<div class=\"row query\"><span></span><span>query</span><div class=\"excerpt\">{}</div>"
      "</div>\n",
      ExcerptHtml(chosen.excerpt, 0));
  for (const KeptPassage& passage : chosen.passages) {
    html += fmt::format(
        "<div class=\"row\"><span>{:.4f}</span><span>{}</span>"
        "<div class=\"excerpt\" style=\"--w:{:.4f}\">{}</div></div>\n",
        passage.weight, Grouped(passage.distance), passage.weight,
        ExcerptHtml(passage.excerpt, CommonEnd(passage.excerpt.before, chosen.excerpt.before)));
  }
  const double shown = result.evaluations[static_cast<size_t>(result.shown)].alpha;
  std::string others;
  for (const PositionView& view : chosen.views) {
    if (view.alpha != shown) {
      others += fmt::format("{}{} gives weight to {} keys and needs {} of them for 99 %",
                            others.empty() ? "" : "; ", ShortAlphaName(view.alpha),
                            Grouped(view.kept), Grouped(view.for_99_percent));
      continue;
    }
    const int64_t hidden = view.kept - static_cast<int64_t>(chosen.passages.size());
    if (hidden > 0) {
      html += fmt::format(
          "<div class=\"row zero\"><span>{:.4f}</span><span></span><div>on {} more keys</div>"
          "</div>\n",
          chosen.rest_weight, Grouped(hidden));
    }
    html += fmt::format(
        "<div class=\"row zero\"><span>0</span><span></span><div>exactly, on all other {} keys"
        "</div></div>\n",
        Grouped(chosen.visible - view.kept));
  }
  html += "</div>\n";
  if (!others.empty()) {
    html += fmt::format("<p class=\"note\">At the same byte {}.</p>\n", EscapeHtml(others));
  }
  return html + "</div>\n";
}

std::string MapHtml(const AttentionMap& map) {
  return fmt::format(
      "<figure class=\"map\"><figcaption>{} <span class=\"note\">· {} of the pairs shown are "
      "exactly zero · {} of these queries’ weight lies in the picture</span></figcaption>\n"
      "<div class=\"scroll\"><img alt=\"Weights of {} queries over {} keys\" width=\"{}\" "
      "height=\"{}\" src=\"data:image/png;base64,{}\">\n"
      "<div class=\"axis-names\"><span>key at byte {}</span><span>queries downwards, bytes {} to "
      "{}</span><span>key at byte {}</span></div></div></figure>\n",
      EscapeHtml(ShortAlphaName(map.alpha)), Percent(map.zero_share, 2),
      Percent(map.share_inside, 0), map.queries.size(), map.keys.size(), map.keys.size(),
      map.queries.size(), EncodeBase64(MapToPng(map)), Grouped(map.keys.first),
      Grouped(map.queries.first), Grouped(map.queries.end - 1), Grouped(map.keys.end - 1));
}

std::string MapScale() {
  std::string bars;
  const std::vector<PaletteColour> palette = MapPalette();
  for (size_t n = 1; n < palette.size(); ++n) {
    bars += fmt::format("<i style=\"background:rgb({} {} {} / {:.2f})\"></i>", palette[n].red,
                        palette[n].green, palette[n].blue, palette[n].alpha / 255.0);
  }
  return fmt::format(
      "<div class=\"scale\"><span>weight</span><span class=\"bar\"><i></i></span><span>exactly 0"
      "</span><span class=\"bar\">{}</span><span>from {:f} and less to 1, logarithmic</span>"
      "</div>\n",
      bars, kFaintestWeight);
}

}  // namespace

std::string ScoreSection(const DemoResult& result) {
  std::string html = "<h2>Results</h2>\n<div class=\"scroll\"><table>\n";
  html += TableRow({"α", "bits per byte", "right", "time", "keys kept per query", "median",
                    "for 99 %", "exact zeros", "scale", "prior"},
                   "th");
  for (const Evaluation& evaluation : result.evaluations) {
    html += TableRow(
        {AlphaName(evaluation.alpha), fmt::format("{:.3f}", evaluation.score.bits_per_byte),
         Percent(evaluation.score.accuracy), Duration(evaluation.seconds),
         GroupedMean(evaluation.kept.mean), GroupedMean(evaluation.kept.median),
         GroupedMean(evaluation.kept.median_for_99), Percent(evaluation.kept.zero_share, 2),
         fmt::format("{:.3g}", evaluation.calibration.scale),
         fmt::format("{:g}", evaluation.calibration.prior_weight)},
        "td");
  }
  for (const Baseline& baseline : result.baselines) {
    html += TableRow({baseline.name, fmt::format("{:.3f}", baseline.score.bits_per_byte),
                      Percent(baseline.score.accuracy), "", "", "", "", "", "", ""},
                     "td", "baseline");
  }
  html += "</table></div>\n";
  html += fmt::format(
      "<p class=\"note\">Scored on bytes {} to {}. Time is attention for these {} queries, {}. A "
      "query sees {} keys on average; “for 99 %” is the median of the fewest keys "
      "that hold 99 % of a query’s weight.",
      Grouped(result.scored.first), Grouped(result.scored.end - 1), Grouped(result.scored.size()),
      RoundsText(result.evaluations[0].rounds), GroupedMean(result.mean_visible()));
  for (const Evaluation& evaluation : result.evaluations) {
    if (evaluation.kept.queries == result.scored.size()) continue;
    html += fmt::format(" Kept keys of α = {:g} were counted for {} queries.", evaluation.alpha,
                        Grouped(evaluation.kept.queries));
  }
  return html + " The grey lines are predictions without attention, for orientation.</p>\n";
}

std::string CurveSection(const DemoResult& result) {
  std::string html = fmt::format(
      "<h2>More context</h2>\n<p>The last {} bytes, predicted from the last 1k, 2k, 4k … bytes "
      "before each of them and finally from all. Scale and prior stay as they were chosen.</p>\n"
      "<div class=\"plots\">\n",
      Grouped(result.curve_positions.size()));
  html += CurveFigure(result, "Bits per byte", {"bits per byte", AxisScale::kLinear},
                      [](const CurvePoint& point) { return point.bits_per_byte; });
  html += CurveFigure(result, "Keys kept per query", {"keys kept, mean", AxisScale::kLog10},
                      [](const CurvePoint& point) { return point.mean_kept; });
  html += CurveFigure(result, "Time per query", {"microseconds", AxisScale::kLog10},
                      [](const CurvePoint& point) { return point.seconds_per_query * 1e6; });
  html += CalibrationFigure(result);
  return html + "</div>\n";
}

std::string MapSection(const DemoResult& result) {
  std::string html =
      "<h2>Attention as a picture</h2>\n<p>One pixel a query-key pair. Each row is one query, "
      "rows run downwards, keys run from old on the left to new on the right; a streak going down "
      "to the right is a passage that is being followed. The empty corner at the right is the "
      "future, which no query sees. Softmax gives some weight to every key that it does see.</p>\n";
  html += MapScale();
  for (const AttentionMap& map : result.maps) html += MapHtml(map);
  return html;
}

std::string PassageSection(const DemoResult& result) {
  if (result.passages.empty()) return "";
  const double shown = result.evaluations[static_cast<size_t>(result.shown)].alpha;
  std::string html = fmt::format(
      "<h2>Where attention went</h2>\n<p>A few bytes, picked by what α = {:g} did there. The first "
      "line is "
      "the text at the query with the byte that came; below it are the passages that were kept, "
      "shaded by weight, with the bytes that agree with the query’s past in bold. These lines are "
      "the whole answer: every other key has weight exactly zero.</p>\n",
      shown);
  for (const ChosenPosition& chosen : result.passages) html += PassageHtml(result, chosen);
  return html;
}

std::string MethodSection(const DemoResult& result) {
  std::vector<int> lengths;
  for (const NgramKind& kind : result.embedding.kinds) lengths.push_back(kind.length);
  std::string html = fmt::format(
      "<h2>How it works</h2>\n"
      "<p>For each of the lengths {} the bytes before a position are hashed to {} signs; the "
      "weighted sum, brought to length 1, is the position’s query and its key. Two positions with "
      "the same recent past therefore have a large dot product, unrelated ones a small random "
      "one. α-entmax turns scores into weights: α = 1 is softmax, which gives every key some "
      "weight; above 1, keys below a threshold get exactly none, and the threshold is found "
      "exactly. The query of byte i sees the keys of bytes before i only, so that no answer "
      "leaks.</p>\n"
      "<p>The prediction is a mixture of attention and of how often each byte comes in the first "
      "tenth of the text, without which one unforeseen byte would cost infinitely many bits. Its "
      "weight and the scale of the scores were chosen for each α on bytes {} to {}, from the same "
      "candidates, and only later bytes are scored.</p>\n",
      fmt::join(lengths, ", "), result.embedding.head_size, Grouped(result.calibrated.first),
      Grouped(result.calibrated.end - 1));
  html += fmt::format(
      "<p>{} random rows for each α were computed again in plain double precision:</p>\n"
      "<div class=\"scroll\"><table>\n",
      result.verifications[0].rows);
  html += TableRow({"α", "largest error", "allowed", "rows with the same keys kept", ""}, "th");
  for (size_t a = 0; a < result.verifications.size(); ++a) {
    const Verification& verification = result.verifications[a];
    html += TableRow(
        {AlphaName(result.evaluations[a].alpha), fmt::format("{:.1e}", verification.largest_error),
         fmt::format("{:.1e}", verification.bound),
         fmt::format("{} of {}", verification.equal_supports, verification.rows),
         verification.passed ? "pass" : "FAIL"},
        "td");
  }
  return html + "</table></div>\n";
}

std::string RepeatSection(const DemoResult& result) {
  return fmt::format(
      "<h2>To repeat it</h2>\n<pre><code>{}</code></pre>\n"
      "<p class=\"note\">Text: {}, {} bytes of {} {}. Machine: {}, {} threads, {}. flash-entmax "
      "{}. "
      "The whole run took {}.</p>\n",
      EscapeHtml(result.command_line), EscapeHtml(result.text_description),
      Grouped(result.text_bytes), Grouped(result.text_files),
      result.text_files == 1 ? "file" : "files", EscapeHtml(result.processor), result.threads,
      EscapeHtml(result.instruction_set), EscapeHtml(result.version), Duration(result.seconds));
}

}  // namespace flash_entmax::cli
