#include "demo/html_page.h"

#include <fmt/format.h>

#include "demo/html_sections.h"
#include "demo/html_style.h"
#include "demo/html_text.h"
#include "demo/wording.h"

namespace flash_entmax::cli {
namespace {

// What happened, in a few sentences; every number from this run.
std::string Lead(const DemoResult& result) {
  std::string lead = fmt::format(
      "<p class=\"lead\">Each byte of a real text ({}) is predicted by attention over all bytes "
      "before it. Nothing was trained: a position’s query and key are a hash of the bytes before "
      "it, its value is the byte that followed, so attention finds places with a similar past and "
      "says what came next there.",
      EscapeHtml(result.text_description));
  if (result.shown >= 0) {
    const Evaluation& shown = result.evaluations[static_cast<size_t>(result.shown)];
    lead += fmt::format(
        " With α = {:g} it is right for {} of {} bytes, at {:.2f} bits per byte, and keeps {} keys "
        "per query of the {} it sees: {} of all weights are exactly zero.",
        shown.alpha, Percent(shown.score.accuracy), Grouped(result.scored.size()),
        shown.score.bits_per_byte, GroupedMean(shown.kept.mean), GroupedMean(result.mean_visible()),
        Percent(shown.kept.zero_share, 2));
  }
  return lead + "</p>\n";
}

}  // namespace

std::string HtmlPage(const DemoResult& result) {
  std::string page =
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<title>Attention as retrieval</title>\n<style>";
  page += kPageStyle;
  page += "</style>\n</head>\n<body>\n<h1>Attention as retrieval over a real text</h1>\n";
  page += Lead(result) + ScoreSection(result) + CurveSection(result) + MapSection(result) +
          PassageSection(result) + MethodSection(result) + RepeatSection(result);
  return page + "</body>\n</html>\n";
}

}  // namespace flash_entmax::cli
