// The parts of `flash-entmax demo`, and the program on small texts.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/program.h"
#include "demo/calibration.h"
#include "demo/curves.h"
#include "demo/demo.h"
#include "demo/embedding.h"
#include "demo/evaluation.h"
#include "demo/html_page.h"
#include "demo/html_text.h"
#include "demo/png.h"
#include "demo/report.h"
#include "demo/retrieval.h"
#include "demo/scoring.h"
#include "demo/svg_plot.h"
#include "demo/text_source.h"
#include "demo/verification.h"
#include "demo/wording.h"
#include "io/temporary_folder.h"
#include "testing/random.h"
#include "testing/status.h"

namespace flash_entmax::cli {
namespace {

using ::flash_entmax::testing::IsOk;

// Text with repetitions at all distances, and bytes that HTML must not take for markup.
std::string SampleText(size_t size, uint64_t seed = 7) {
  const std::vector<std::string> words = {"<script>alert(1)</script>",
                                          "attention ",
                                          "of ",
                                          "a & b ",
                                          "the threshold ",
                                          "'quoted' ",
                                          "\"text\"\n",
                                          "\xC3\xA9\x80",
                                          "softmax ",
                                          "sparsemax ",
                                          "return x;\n",
                                          "if (y) "};
  ::flash_entmax::testing::Random random(seed);
  std::string text;
  while (text.size() < size) text += random.Pick(words);
  text.resize(size);
  return text;
}

Retrieval MakeRetrieval(const std::string& text) { return {text, DefaultEmbedding(1), 2}; }

std::vector<float> Row(const std::vector<float>& embeddings, size_t row, int head_size) {
  const auto first = embeddings.begin() + static_cast<std::ptrdiff_t>(row) * head_size;
  return {first, first + head_size};
}

TEST(DemoEmbedding, IsAFunctionOfThePast) {
  const EmbeddingOptions options = DefaultEmbedding(1);
  // The longest n-gram agrees before both marked positions; what comes before it differs.
  const std::string past = "the same dozen bytes, and more ";
  const std::string text = "0123" + past + "|other" + past + "|";
  const size_t first = 4 + past.size();
  const size_t second = first + 6 + past.size();
  const std::vector<float> rows = EmbedText(text, options, 2);
  EXPECT_EQ(Row(rows, first, options.head_size), Row(rows, second, options.head_size));
  EXPECT_NE(Row(rows, first, options.head_size), Row(rows, first + 1, options.head_size));

  std::string changed = text;
  changed[first] = '!';
  const std::vector<float> others = EmbedText(changed, options, 1);
  for (size_t i = 0; i <= first; ++i) {
    EXPECT_EQ(Row(rows, i, options.head_size), Row(others, i, options.head_size)) << i;
  }
  EXPECT_NE(Row(rows, first + 1, options.head_size), Row(others, first + 1, options.head_size));
}

TEST(DemoEmbedding, HasLengthOneAndDependsOnTheSeed) {
  const std::string text = SampleText(100);
  const EmbeddingOptions options = DefaultEmbedding(1);
  const std::vector<float> rows = EmbedText(text, options, 2);
  EXPECT_EQ(rows.size(), text.size() * static_cast<size_t>(options.head_size));
  for (size_t i = 0; i < text.size(); ++i) {
    double square = 0.0;
    for (const float x : Row(rows, i, options.head_size)) {
      square += static_cast<double>(x) * static_cast<double>(x);
    }
    EXPECT_NEAR(square, i == 0 ? 0.0 : 1.0, 1e-5) << i;
  }
  EXPECT_NE(rows, EmbedText(text, DefaultEmbedding(2), 2));
}

// Up to rounding: rows that are computed together may make the library choose another way of
// summing.
void ExpectSameDistribution(const Prediction& a, const Prediction& b, int64_t position) {
  ASSERT_EQ(a.KeptAt(position).size(), b.KeptAt(position).size()) << position;
  for (size_t byte = 0; byte < kByteValues; ++byte) {
    EXPECT_NEAR(static_cast<double>(a.DistributionAt(position)[byte]),
                static_cast<double>(b.DistributionAt(position)[byte]), 1e-6)
        << position;
  }
}

TEST(DemoRetrieval, DoesNotLeakTheAnswer) {
  const std::string text = SampleText(600);
  const Stretch positions = {1, 600};
  const Retrieval retrieval = MakeRetrieval(text);
  for (const double alpha : {1.0, 1.5, 2.0}) {
    const RetrievalSetting setting = {alpha, 5.0, {}};
    const auto before = retrieval.Predict(positions, setting, true);
    ASSERT_TRUE(IsOk(before.status()));
    for (const size_t from : {1U, 2U, 77U, 300U, 599U}) {
      std::string changed = text;
      for (size_t i = from; i < changed.size(); ++i) changed[i] = static_cast<char>(changed[i] ^ 1);
      const Retrieval other = MakeRetrieval(changed);
      const auto after = other.Predict(positions, setting, true);
      ASSERT_TRUE(IsOk(after.status()));
      for (int64_t i = 1; i <= static_cast<int64_t>(from); ++i) {
        ExpectSameDistribution(*before, *after, i);
      }
    }
    for (int64_t i = positions.first; i < positions.end; ++i) {
      for (const KeptKey& key : before->KeptAt(i)) EXPECT_LT(key.position, i);
    }
  }
}

TEST(DemoRetrieval, OutputIsTheDistributionOfTheKeptBytes) {
  const Retrieval retrieval = MakeRetrieval(SampleText(500));
  for (const double alpha : {1.0, 1.5, 3.0}) {
    const auto prediction = retrieval.Predict({200, 500}, {alpha, 4.0, {}}, true);
    ASSERT_TRUE(IsOk(prediction.status()));
    for (int64_t i = 200; i < 500; ++i) {
      std::vector<double> expected(kByteValues, 0.0);
      double sum = 0.0;
      for (const KeptKey& key : prediction->KeptAt(i)) {
        expected[retrieval.ByteAt(key.position)] += static_cast<double>(key.weight);
        sum += static_cast<double>(key.weight);
      }
      EXPECT_NEAR(sum, 1.0, 1e-5);
      for (size_t b = 0; b < expected.size(); ++b) {
        EXPECT_NEAR(static_cast<double>(prediction->DistributionAt(i)[b]), expected[b], 1e-6);
      }
    }
  }
}

TEST(DemoRetrieval, FirstByteAfterTheStartSeesOneKey) {
  const Retrieval retrieval = MakeRetrieval(SampleText(300));
  const auto prediction = retrieval.Predict({1, 4}, {1.5, 4.0, {}}, true);
  ASSERT_TRUE(IsOk(prediction.status()));
  ASSERT_EQ(prediction->KeptAt(1).size(), 1U);
  EXPECT_EQ(prediction->KeptAt(1)[0].position, 0);
  EXPECT_EQ(prediction->DistributionAt(1)[retrieval.ByteAt(0)], 1.0F);
}

TEST(DemoRetrieval, WindowHoldsTheLastKeysOnly) {
  const Retrieval retrieval = MakeRetrieval(SampleText(600));
  const RetrievalSetting setting = {1.0, 2.0, 50};
  const auto prediction = retrieval.Predict({100, 600}, setting, true);
  ASSERT_TRUE(IsOk(prediction.status()));
  EXPECT_EQ(Retrieval::VisiblePairs({100, 600}, setting), 500 * 50);
  for (int64_t i = 100; i < 600; ++i) {
    const std::span<const KeptKey> kept = prediction->KeptAt(i);
    ASSERT_EQ(kept.size(), 50U) << i;
    EXPECT_EQ(kept.front().position, i - 50);
    EXPECT_EQ(kept.back().position, i - 1);
  }
}

// More queries than one call of the library takes, in pieces, give what single calls give.
TEST(DemoRetrieval, PiecesAgreeWithSingleRows) {
  const Retrieval retrieval = MakeRetrieval(SampleText(9000));
  const RetrievalSetting setting = {1.5, 4.0, 64};
  const auto all = retrieval.Predict({1, 9000}, setting, true);
  ASSERT_TRUE(IsOk(all.status()));
  for (const int64_t i : {1, 63, 64, 65, 8191, 8192, 8193, 8999}) {
    const auto one = retrieval.Predict({i, i + 1}, setting, true);
    ASSERT_TRUE(IsOk(one.status()));
    ExpectSameDistribution(*all, *one, i);
    EXPECT_EQ(all->KeptAt(i).size(), one->KeptAt(i).size()) << i;
    EXPECT_EQ(all->KeptAt(i).front().position, one->KeptAt(i).front().position) << i;
  }
}

TEST(DemoScoring, CountsBitsAndHits) {
  const Retrieval retrieval = MakeRetrieval("abab");
  Prediction prediction;
  prediction.positions = {2, 4};
  prediction.distribution.assign(2 * kByteValues, 0.0F);
  prediction.distribution['a'] = 1.0F;                // Right.
  prediction.distribution[kByteValues + 'c'] = 1.0F;  // Wrong, so 'b' has the prior's share only.
  ByteDistribution prior;
  prior.fill(1.0 / kByteValues);
  const Score score = ScoreOf(retrieval, prediction, prior, 0.5);
  EXPECT_DOUBLE_EQ(score.accuracy, 0.5);
  EXPECT_NEAR(score.bits_per_byte, 0.5 * (-std::log2(0.5 + 0.5 / 256) - std::log2(0.5 / 256)),
              1e-12);
  const ByteDistribution frequencies = ByteFrequencies("aab");
  EXPECT_DOUBLE_EQ(frequencies['a'], 2.5 / 131.0);
  EXPECT_DOUBLE_EQ(frequencies['z'], 0.5 / 131.0);
}

TEST(DemoScoring, BaselinesLearnFromThePast) {
  std::string text;
  while (text.size() < 3000) text += "abac";
  const std::vector<Baseline> baselines = Baselines(text, {1000, 3000});
  ASSERT_EQ(baselines.size(), 3U);
  EXPECT_NEAR(baselines[0].score.bits_per_byte, 1.5, 0.02);  // a half, two quarters.
  EXPECT_NEAR(baselines[1].score.bits_per_byte, 0.5, 0.02);  // After 'a' either of two.
  EXPECT_NEAR(baselines[2].score.bits_per_byte, 0.0, 0.02);
  EXPECT_DOUBLE_EQ(baselines[2].score.accuracy, 1.0);
}

TEST(DemoEvaluation, CountsKeysForAShare) {
  const std::vector<KeptKey> kept = {{0, 0.005F}, {1, 0.5F}, {2, 0.495F}};
  EXPECT_EQ(KeysForShare(kept, 0.99), 2);
  EXPECT_EQ(KeysForShare(kept, 0.4), 1);
  EXPECT_EQ(KeysForShare(kept, 1.0), 3);
  EXPECT_EQ(KeysForShare({}, 0.99), 0);
}

TEST(DemoCurves, FullWindowEqualsTheFullRun) {
  const Retrieval retrieval = MakeRetrieval(SampleText(4000));
  const Stretch stretch = CurveStretch({400, 4000});
  const std::vector<int64_t> contexts = CurveContexts(stretch);
  ASSERT_GE(contexts.size(), 2U);
  EXPECT_TRUE(std::is_sorted(contexts.begin(), contexts.end()));
  EXPECT_EQ(contexts.back(), 3999);
  for (size_t n = 0; n + 1 < contexts.size(); ++n) EXPECT_LE(contexts[n], stretch.first);
  for (const double alpha : {1.0, 1.5}) {
    const auto full = retrieval.Predict(stretch, {alpha, 6.0, {}}, false);
    const auto window = retrieval.Predict(stretch, {alpha, 6.0, stretch.end - 1}, false);
    ASSERT_TRUE(IsOk(full.status()));
    ASSERT_TRUE(IsOk(window.status()));
    EXPECT_EQ(full->distribution, window->distribution);

    Evaluation evaluation;
    evaluation.alpha = alpha;
    evaluation.calibration.scale = 6.0;
    evaluation.calibration.prior_weight = 0.1;
    const ByteDistribution prior = ByteFrequencies(retrieval.text());
    const auto curves = MeasureCurves(retrieval, stretch, prior, 1, {evaluation});
    ASSERT_TRUE(IsOk(curves.status()));
    EXPECT_DOUBLE_EQ((*curves)[0].points.back().bits_per_byte,
                     ScoreOf(retrieval, *full, prior, 0.1).bits_per_byte);
  }
}

TEST(DemoVerification, AcceptsTheLibraryAndRejectsAWrongRow) {
  const Retrieval retrieval = MakeRetrieval(SampleText(900));
  for (const double alpha : {1.0, 1.5, 2.0, 2.5}) {
    const RetrievalSetting setting = {alpha, 3.0, {}};
    auto prediction = retrieval.Predict({100, 900}, setting, alpha >= kDenseAlpha);
    ASSERT_TRUE(IsOk(prediction.status()));
    const auto good = Verify(retrieval, *prediction, setting, 8, 1);
    ASSERT_TRUE(IsOk(good.status()));
    EXPECT_TRUE(good->passed) << alpha << " " << good->largest_error << " " << good->bound;
    EXPECT_EQ(good->rows, 8);
    for (float& p : prediction->distribution) p += 0.5F;
    const auto bad = Verify(retrieval, *prediction, setting, 8, 1);
    ASSERT_TRUE(IsOk(bad.status()));
    EXPECT_FALSE(bad->passed);
    prediction->distribution.assign(prediction->distribution.size(), std::nanf(""));
    EXPECT_FALSE(Verify(retrieval, *prediction, setting, 8, 1)->passed);
  }
}

TEST(DemoText, CollectsSortedFilesWithoutTests) {
  const TemporaryFolder folder;
  namespace fs = std::filesystem;
  for (const char* name : {"python3.9", "python3.11", "python3.11/test", "python3.11/json"}) {
    fs::create_directories(folder.File(name));
  }
  WriteAll(folder.File("python3.9/a.py"), "old");
  WriteAll(folder.File("python3.11/b.py"), "bb");
  WriteAll(folder.File("python3.11/a.py"), "aaa");
  WriteAll(folder.File("python3.11/c.txt"), "no source");
  WriteAll(folder.File("python3.11/d.py"), std::string("\0binary", 7));
  WriteAll(folder.File("python3.11/json/x.py"), "x");
  WriteAll(folder.File("python3.11/test/t.py"), "test");
  const std::vector<TextPlace> places = {{folder.File("none*"), "nothing", {}},
                                         {folder.File("python3*"), "sources", {".py"}}};
  const auto some = FindText(places, 4);
  ASSERT_TRUE(IsOk(some.status()));
  EXPECT_EQ(some->bytes, "aaab");
  EXPECT_EQ(some->files, 2);
  const auto all = FindText(places, 1000);
  ASSERT_TRUE(IsOk(all.status()));
  EXPECT_EQ(all->bytes, "aaabbx");
  EXPECT_NE(all->description.find("sources"), std::string::npos);
  EXPECT_FALSE(FindText({places[0]}, 10).ok());
  EXPECT_FALSE(ReadTextFile(folder.File("missing"), 10).ok());
  EXPECT_FALSE(ReadTextFile(folder.File("python3.9"), 10).ok());
  EXPECT_EQ(ReadTextFile(folder.File("python3.9/a.py"), 2)->bytes, "ol");
}

TEST(DemoHtml, EscapesEverything) {
  EXPECT_EQ(EscapeHtml("<script>alert('1') & \"2\"</script>"),
            "&lt;script&gt;alert(&#39;1&#39;) &amp; &quot;2&quot;&lt;/script&gt;");
  EXPECT_EQ(EscapeHtml("\xCE\xB1 = 1.5"), "\xCE\xB1 = 1.5");
  const std::string replacement = "\xEF\xBF\xBD";
  EXPECT_EQ(EscapeHtml(std::string("a\0b", 3)), "a" + replacement + "b");
  EXPECT_EQ(EscapeHtml("\xCE"), replacement);
  EXPECT_EQ(EscapeHtml("\xC0\xAF"), replacement + replacement);
  EXPECT_EQ(EscapeHtml("\xED\xA0\x80"), replacement + replacement + replacement);
  EXPECT_EQ(Visible("a\\\n\t\x1B[1m\xE9"), "a\\\\\\n\\t\\x1B[1m\\xE9");
}

TEST(DemoWording, WritesNumbersForPeople) {
  EXPECT_EQ(Grouped(0), "0");
  EXPECT_EQ(Grouped(999), "999");
  EXPECT_EQ(Grouped(1234567), "1,234,567");
  EXPECT_EQ(Grouped(-1234), "-1,234");
  EXPECT_EQ(GroupedMean(18021.5), "18,022");
  EXPECT_EQ(GroupedMean(94.61), "94.6");
  EXPECT_EQ(GroupedMean(4.0), "4");
  EXPECT_EQ(Percent(0.99999, 2), "99.99 %");
  EXPECT_EQ(Percent(1.0, 2), "100.00 %");
  EXPECT_EQ(Duration(0.00064), "640 µs");
  EXPECT_EQ(Duration(200.0), "200 s");
  EXPECT_EQ(Duration(1205.0), "20 min 5 s");
  EXPECT_EQ(GroupedMean(1046528.0), "1.047M");
}

TEST(DemoPng, HasTheStandardsCheckValues) {
  EXPECT_EQ(EncodeBase64(""), "");
  EXPECT_EQ(EncodeBase64("f"), "Zg==");
  EXPECT_EQ(EncodeBase64("fo"), "Zm8=");
  EXPECT_EQ(EncodeBase64("foobar"), "Zm9vYmFy");
  // Literals as zlib writes them with fixed codes, and one run, which zlib reads back.
  const auto stream = [](std::string_view hex) {
    std::string bytes;
    for (size_t i = 0; i < hex.size(); i += 2) {
      bytes.push_back(static_cast<char>(std::stoi(std::string(hex.substr(i, 2)), nullptr, 16)));
    }
    return bytes;
  };
  EXPECT_EQ(CompressZlib("abcd", 100), stream("78014b4c4a4e010003d8018b"));
  EXPECT_EQ(CompressZlib("aaaaaaaaaa", 100), stream("78014b84030014e103cb"));
  const std::string empty = EncodePng(1, 1, {{0, 0, 0, 0}}, {0});
  // Every PNG ends with the same chunk and the same CRC.
  EXPECT_EQ(empty.substr(empty.size() - 8), "IEND\xAE\x42\x60\x82");
  EXPECT_EQ(empty.substr(0, 8), "\x89PNG\r\n\x1A\n");
}

TEST(DemoPlot, TicksAreRoundAndInside) {
  for (const auto scale : {AxisScale::kLinear, AxisScale::kLog2, AxisScale::kLog10}) {
    for (const double low : {0.013, 1.0, 900.0}) {
      for (const double factor : {1.3, 2.5, 40.0, 1e6}) {
        const std::vector<Tick> ticks = Ticks(scale, low, low * factor, 6);
        EXPECT_LE(ticks.size(), 9U) << low << " " << factor;
        for (const Tick& tick : ticks) {
          EXPECT_GE(tick.value, low * (1 - 1e-9));
          EXPECT_LE(tick.value, low * factor * (1 + 1e-9));
        }
      }
    }
  }
  // Points that a logarithmic axis cannot show, and plots with nothing on them, are no error.
  Plot plot;
  plot.y.scale = AxisScale::kLog10;
  EXPECT_EQ(RenderPlot(plot).find("nan"), std::string::npos);
  plot.series = {{"<a>", {{1.0, 0.0, false}, {2.0, std::nan(""), false}}}};
  const std::string svg = RenderPlot(plot);
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_EQ(svg.find("<a>"), std::string::npos);
}

TEST(Demo, PageAndJsonOfASmallRun) {
  TextSource source;
  source.bytes = SampleText(kMinContext);
  source.description = "<b>sample</b>";
  source.files = 1;
  DemoSetting setting;
  setting.threads = 2;
  int64_t pairs = 0;
  const auto result = RunDemo(source, setting, [&](int64_t done) { pairs += done; });
  ASSERT_TRUE(IsOk(result.status()));
  EXPECT_TRUE(result->passed());
  const auto expected = static_cast<double>(ExpectedPairs(kMinContext, setting));
  EXPECT_NEAR(static_cast<double>(pairs), expected, 0.1 * expected);
  for (const Evaluation& evaluation : result->evaluations) {
    EXPECT_LT(evaluation.score.bits_per_byte, 4.0);
    EXPECT_GT(evaluation.score.accuracy, 0.5);
    const double zeros = evaluation.kept.zero_share;
    EXPECT_TRUE(evaluation.alpha == 1.0 ? zeros < 1e-3 : zeros > 0.5) << evaluation.alpha;
  }
  const std::string page = HtmlPage(*result);
  EXPECT_EQ(page.find("<script"), std::string::npos);
  EXPECT_EQ(page.find("<b>sample"), std::string::npos);
  EXPECT_EQ(page.find("http"), std::string::npos);
  EXPECT_EQ(page.find("nan"), std::string::npos);
  const Json document = ReportToJson(*result);
  EXPECT_EQ(document["results"].size(), 3U);
  EXPECT_FALSE(nlohmann::json::parse(document.dump(), nullptr, false).is_discarded());
}

TEST(DemoProgram, WritesPageAndJson) {
  const TemporaryFolder folder;
  WriteAll(folder.File("text"), SampleText(5000));
  const nlohmann::json document =
      RunForJson({"demo", "--text", folder.File("text"), "--context", "3000", "--html",
                  folder.File("page.html"), "--alpha", "1,1.5", "--threads", "2"});
  EXPECT_EQ(document["text"]["bytes"], 3000);
  EXPECT_EQ(document["results"].size(), 2U);
  EXPECT_EQ(document["passed"], true);
  EXPECT_NE(ReadAll(folder.File("page.html")).find("</html>"), std::string::npos);
  const ProgramResult text = RunProgram({"demo", "--text", folder.File("text"), "--no-html"});
  EXPECT_EQ(text.exit_code, 0) << text.error;
  EXPECT_EQ(text.error, "");
  EXPECT_EQ(text.output.find('\x1B'), std::string::npos);
}

TEST(DemoProgram, RejectsBadInput) {
  const TemporaryFolder folder;
  const std::string text = folder.File("text");
  const std::string page = folder.File("page.html");
  WriteAll(text, SampleText(2100));
  WriteAll(folder.File("tiny"), "tiny");
  const auto rejects = [&](std::vector<std::string> arguments, const std::string& message) {
    arguments.insert(arguments.begin(), {"demo", "--html", page});
    ExpectBadInput(arguments, message);
    EXPECT_FALSE(std::filesystem::exists(page));
  };
  rejects({"--text", text, "--context", "2047"}, "--context: got 2047; must be from 2048");
  rejects({"--text", text, "--context", "1048577"}, "--context");
  rejects({"--text", text, "--alpha", "0.5"}, "--alpha: got 0.5; must be finite and >= 1");
  rejects({"--text", text, "--alpha", "nan"}, "--alpha");
  rejects({"--text", text, "--alpha", "inf"}, "--alpha");
  rejects({"--text", text, "--alpha", "1,2,1"}, "--alpha: got 1 more than once");
  rejects({"--text", text, "--seed", "-1"}, "--seed");
  rejects({"--text", folder.File("missing")}, "--text");
  rejects({"--text", folder.File("tiny")}, "has 4 bytes; must have 2048 or more");
  ExpectBadInput({"demo", "--text", text, "--html", folder.File("none/page.html")}, "page.html");
}

}  // namespace
}  // namespace flash_entmax::cli
