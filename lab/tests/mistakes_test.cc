// What is said of wrong answers is true of the samples they belong to.

#include "mistakes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "batch.h"
#include "testing/status.h"

namespace flash_entmax::lab {
namespace {

using Json = nlohmann::json;

// A result with one mistake at one length: what of `predicted` is not `target`.
Json Result(const Json& task, int64_t length, int64_t sample, const std::vector<int32_t>& target,
            const std::vector<int32_t>& predicted) {
  Json wrong = Json::array();
  for (size_t place = 0; place < target.size(); ++place) {
    if (target[place] != predicted[place]) {
      wrong.push_back({place, target[place], predicted[place]});
    }
  }
  return {{"run", {{"task", task}, {"training", {{"an_option_of_another_version", 1}}}}},
          {"lengths",
           {{{"multiple", 1.0},
             {"length", length},
             {"exact_match", 0.9},
             {"mistakes", {{{"sample", sample}, {"wrong", wrong}}}}}}}};
}

Sample Make(const std::string& name, bool end, int64_t length, int64_t number) {
  TaskOptions options;
  options.name = name;
  options.end = end;
  return EvaluationSample(**MakeTask(options), length, number);
}

TEST(Mistakes, RecallNamesTheKeysAWrongSymbolBelongsTo) {
  for (const bool end : {false, true}) {
    const Sample sample = Make("recall", end, 64, 5);
    const std::vector<int32_t> target = TargetOf(sample);
    // The second symbol of the first pair's value, where it is not the answer.
    const auto mark = std::find(sample.tokens.begin(), sample.tokens.end(), 257);
    const std::vector<int32_t> value(mark + 1, mark + 3);
    const int64_t query = target[1] == value[0] ? 1 : 0;
    ASSERT_NE(target[static_cast<size_t>(3 * query + 2)], value[1]);
    std::vector<int32_t> predicted = target;
    predicted[static_cast<size_t>(3 * query + 2)] = value[1];
    // A symbol that no value begins with, and a mark that is none.
    int32_t absent = 0;
    for (auto at = sample.tokens.begin(); at < sample.tokens.begin() + 65;) {
      at = std::find(at, sample.tokens.begin() + 65, 257);
      if (at < sample.tokens.begin() + 65 && *++at == absent) {
        ++absent;
        at = sample.tokens.begin();
      }
    }
    predicted[7] = absent;
    predicted[9] = 3;
    const Json task = {{"name", "recall"}, {"end", end}};
    const auto explained = ExplainMistakes(Result(task, 64, 5, target, predicted).dump());
    ASSERT_TRUE(testing::IsOk(explained.status()));
    ASSERT_EQ(explained->size(), 1u);
    const ExplainedLength& length = explained->front();
    EXPECT_EQ(length.length, 64);
    EXPECT_EQ(length.exact_match, 0.9);
    ASSERT_EQ(length.samples.size(), 1u);
    const std::vector<WrongToken>& wrong = length.samples[0].wrong;
    ASSERT_EQ(wrong.size(), 3u);
    EXPECT_EQ(wrong[0].place, 3 * query + 2);
    EXPECT_EQ(wrong[0].expected, target[static_cast<size_t>(3 * query + 2)]);
    EXPECT_EQ(wrong[0].predicted, value[1]);
    EXPECT_EQ(wrong[0].source,
              "of key " + std::to_string(mark[-2]) + " " + std::to_string(mark[-1]));
    EXPECT_EQ(wrong[1].source, "");
    EXPECT_EQ(wrong[2].source, "");
    EXPECT_LT(wrong[2].chance, 0.0);  // not a symbol of a value
    EXPECT_EQ(length.tokens, 2);
    EXPECT_EQ(length.with_source, 1);
    // 8 pairs; hardly two values with the same symbol at a place.
    EXPECT_NEAR(length.by_chance, 16.0 / 256.0, 3.0 / 256.0);
  }
}

// Three keys by name, the others by number.
TEST(Mistakes, RecallCountsTheOtherKeys) {
  const Sample sample = Make("recall", false, 4096, 1);
  std::vector<int32_t> target = TargetOf(sample), predicted = target;
  // The symbol that most of the 546 values begin with.
  std::map<int32_t, std::vector<std::string>> keys_of;
  for (size_t i = 0; sample.tokens[i] != 258; ++i) {
    if (sample.tokens[i] != 257 || sample.tokens[i + 1] == target[1]) continue;
    keys_of[sample.tokens[i + 1]].push_back("of key " + std::to_string(sample.tokens[i - 2]) + " " +
                                            std::to_string(sample.tokens[i - 1]));
  }
  const auto most = std::max_element(
      keys_of.begin(), keys_of.end(),
      [](const auto& one, const auto& other) { return one.second.size() < other.second.size(); });
  const std::vector<std::string>& keys = most->second;
  ASSERT_GT(keys.size(), 4u);
  predicted[1] = most->first;
  const auto explained =
      ExplainMistakes(Result({{"name", "recall"}}, 4096, 1, target, predicted).dump());
  ASSERT_TRUE(testing::IsOk(explained.status()));
  EXPECT_EQ(explained->front().samples[0].wrong[0].source,
            keys[0] + ", " + keys[1] + ", " + keys[2] + " and of " +
                std::to_string(keys.size() - 3) + " others");
}

// The settings of a run do not matter, and neither do long words.
TEST(Mistakes, TasksOfLongWords) {
  TaskOptions options;
  options.name = "recall";
  options.key_symbols = options.value_symbols = 8;
  const Sample sample = EvaluationSample(**MakeTask(options), 90, 2);
  const std::vector<int32_t> target = TargetOf(sample);
  std::vector<int32_t> predicted = target;
  predicted[8] = (target[8] + 1) % 256;
  const Json task = {{"name", "recall"}, {"key_symbols", 8}, {"value_symbols", 8}};
  const auto explained = ExplainMistakes(Result(task, 90, 2, target, predicted).dump());
  ASSERT_TRUE(testing::IsOk(explained.status()));
  EXPECT_EQ(explained->front().samples[0].wrong[0].place, 8);
  // 4 pairs; the right symbol counts for none.
  EXPECT_NEAR(explained->front().by_chance, 3.0 / 255.0, 1e-9);
}

TEST(Mistakes, LengthsThatWereNotEvaluatedSayWhy) {
  Json result = {{"run", {{"task", {{"name", "copy"}}}}},
                 {"lengths",
                  {{{"multiple", 2}, {"length", 8}, {"error", "out of memory"}},
                   {{"multiple", 1}, {"length", 4}, {"exact_match", 0.5}}}}};
  const auto explained = ExplainMistakes(result.dump());
  ASSERT_TRUE(testing::IsOk(explained.status()));
  EXPECT_EQ((*explained)[0].error, "out of memory");
  EXPECT_EQ((*explained)[1].error, "");
  EXPECT_EQ((*explained)[1].exact_match, 0.5);
  EXPECT_TRUE((*explained)[1].samples.empty());
}

TEST(Mistakes, CopyNamesThePlaceThatLooksTheSame) {
  for (const char* name : {"copy", "reverse"}) {
    const Sample sample = Make(name, true, 200, 0);
    const std::vector<int32_t> target = TargetOf(sample);
    // Some other symbol at every tenth place.
    std::vector<int32_t> predicted = target;
    for (size_t place = 10; place < 200; place += 10) predicted[place] = (target[place] + 1) % 32;
    predicted[200] = 1;  // the end
    const Json task = {{"name", name}, {"end", true}};
    const auto explained = ExplainMistakes(Result(task, 200, 0, target, predicted).dump());
    ASSERT_TRUE(testing::IsOk(explained.status()));
    const ExplainedLength& length = explained->front();
    ASSERT_EQ(length.samples[0].wrong.size(), 20u);
    int64_t named = 0;
    for (const WrongToken& wrong : length.samples[0].wrong) {
      // By brute force: the most symbols that are the same before this place and another one that
      // goes on with what was said.
      std::string source;
      int64_t longest = 0;
      for (int64_t at = 0; at < 201; ++at) {
        if (at == wrong.place || target[static_cast<size_t>(at)] != wrong.predicted) continue;
        for (int64_t same = 1; same <= std::min(at, wrong.place); ++same) {
          const bool equal = std::equal(target.begin() + at - same, target.begin() + at,
                                        target.begin() + wrong.place - same);
          if (!equal || same <= longest) continue;
          longest = same;
          source = "as at place " + std::to_string(at) + ", where the " + std::to_string(same) +
                   " before are the same";
        }
      }
      named += source.empty() ? 0 : 1;
      EXPECT_EQ(wrong.source, source) << name << " place " << wrong.place;
    }
    EXPECT_GE(named, 2);
    EXPECT_EQ(length.tokens, 0);  // no chances are told
  }
}

TEST(Mistakes, OtherTasksTellNoSources) {
  const Sample sample = Make("sort", false, 10, 0);
  std::vector<int32_t> predicted = TargetOf(sample);
  predicted[4] = 31 - predicted[4];
  const Json task = {{"name", "sort"}};
  const auto explained = ExplainMistakes(Result(task, 10, 0, TargetOf(sample), predicted).dump());
  ASSERT_TRUE(testing::IsOk(explained.status()));
  ASSERT_EQ(explained->front().samples[0].wrong.size(), 1u);
  EXPECT_EQ(explained->front().samples[0].wrong[0].place, 4);
  EXPECT_EQ(explained->front().samples[0].wrong[0].source, "");
}

TEST(Mistakes, RefusesWhatIsNoResult) {
  const Sample sample = Make("recall", false, 64, 5);
  const std::vector<int32_t> target = TargetOf(sample);
  std::vector<int32_t> said = target;
  said[1] = (said[1] + 1) % 256;
  const Json task = {{"name", "recall"}};
  const Json good = Result(task, 64, 5, target, said);
  ASSERT_TRUE(testing::IsOk(ExplainMistakes(good.dump()).status()));
  const auto rejects = [](const Json& json, const char* why = "result") {
    return testing::Rejects(ExplainMistakes(json.dump()).status(), why);
  };
  EXPECT_TRUE(testing::Rejects(ExplainMistakes("{").status(), "result"));
  EXPECT_TRUE(rejects(Json::array()));
  EXPECT_TRUE(rejects(Json{{"run", 1}, {"lengths", Json::array()}}));
  EXPECT_TRUE(rejects(Result({{"name", "sums"}}, 64, 5, target, said), "task.name"));
  EXPECT_TRUE(rejects(Result(task, 3, 5, target, said)));
  EXPECT_TRUE(rejects(Result(task, int64_t{1} << 40, 5, target, said)));
  EXPECT_TRUE(rejects(Result(task, 64, -1, target, said)));
  EXPECT_TRUE(rejects(Result(task, 64, 6, target, said)));    // another sample
  EXPECT_TRUE(rejects(Result(task, 64, 5, target, target)));  // nothing is wrong
  Json bad = good;
  const int32_t right = target[1], other = said[1];
  const int64_t end = std::ssize(target);
  for (const Json& wrong :
       {Json("none"), Json::object(), Json::array(), Json{{1, right}}, Json{{1, right, right}},
        Json{{1, "a", other}}, Json{{1.5, right, other}}, Json{{-1, right, other}},
        Json{{end, right, other}}, Json{{1e300, right, other}}, Json{{1, right, -1}},
        Json{{1, right, 261}}, Json{{1, right, true}}, Json{{1, right + (int64_t{1} << 32), other}},
        Json{{1, right, other}, {1, right, other}}}) {
    bad["lengths"][0]["mistakes"][0]["wrong"] = wrong;
    EXPECT_TRUE(rejects(bad)) << wrong;
  }
  bad["lengths"][0]["mistakes"][0] = 5;
  EXPECT_TRUE(rejects(bad));
  bad["lengths"][0]["mistakes"] = Json::object();
  EXPECT_TRUE(rejects(bad));
  bad["lengths"][0]["mistakes"] = Json::array();
  for (int i = 0; i < 21; ++i) {
    bad["lengths"][0]["mistakes"][static_cast<size_t>(i)] = good["lengths"][0]["mistakes"][0];
    if (i == 0) continue;
    EXPECT_EQ(ExplainMistakes(bad.dump()).ok(), i < 20) << i;
  }
  bad = good;
  bad["lengths"][0]["length"] = "long";
  EXPECT_TRUE(rejects(bad));
  for (const Json& length : {Json(1e300), Json(10.7), Json(int64_t{1} << 40)}) {
    bad["lengths"][0]["length"] = length;
    EXPECT_TRUE(rejects(bad)) << length;
  }
  bad = good;
  bad["lengths"][0]["exact_match"] = "all";
  EXPECT_TRUE(rejects(bad));
  bad = good;
  bad["lengths"][0] = 7;
  EXPECT_TRUE(rejects(bad));
  // Where such lists are copied, each level takes a piece of the stack.
  const std::string deep = std::string(500000, '[');
  EXPECT_TRUE(testing::Rejects(ExplainMistakes(deep).status(), "result"));
  EXPECT_TRUE(testing::Rejects(
      ExplainMistakes(R"({"lengths":[],"run":{"task":)" + deep + std::string(500000, ']') + "}}")
          .status(),
      "result"));
}

}  // namespace
}  // namespace flash_entmax::lab
