// What is said of wrong answers is true of the samples they belong to.

#include "mistakes.h"

#include <gtest/gtest.h>

#include <algorithm>
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

TEST(Mistakes, CopyNamesThePlaceThatLooksTheSame) {
  for (const char* name : {"copy", "reverse"}) {
    const Sample sample = Make(name, true, 200, 0);
    const std::vector<int32_t> target = TargetOf(sample);
    // Two places after the same symbol that go on differently: there are some among 200.
    int64_t place = -1, other = -1;
    for (int64_t i = 2; i < 100 && place < 0; ++i) {
      for (int64_t j = i + 1; j < 200 && place < 0; ++j) {
        const auto at = [&](int64_t k) { return target[static_cast<size_t>(k)]; };
        if (at(i - 1) == at(j - 1) && at(i - 2) == at(j - 2) && at(i) != at(j)) {
          place = i;
          other = j;
        }
      }
    }
    ASSERT_GE(place, 0);
    std::vector<int32_t> predicted = target;
    predicted[static_cast<size_t>(place)] = target[static_cast<size_t>(other)];
    predicted[200] = 1;  // the end
    const Json task = {{"name", name}, {"end", true}};
    const auto explained = ExplainMistakes(Result(task, 200, 0, target, predicted).dump());
    ASSERT_TRUE(testing::IsOk(explained.status()));
    const ExplainedLength& length = explained->front();
    ASSERT_EQ(length.samples[0].wrong.size(), 2u);
    EXPECT_EQ(length.samples[0].wrong[0].place, place);
    EXPECT_NE(length.samples[0].wrong[0].source.find("as at place "), std::string::npos);
    EXPECT_NE(length.samples[0].wrong[0].source.find("before are the same"), std::string::npos);
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
  for (const Json& wrong : {Json("none"), Json{{1, 2}}, Json{{100, 1, 2}}, Json{{-1, 1, 2}},
                            Json{{1, "a", 2}}, Json::array()}) {
    bad["lengths"][0]["mistakes"][0]["wrong"] = wrong;
    EXPECT_TRUE(rejects(bad)) << wrong;
  }
  bad["lengths"][0]["mistakes"][0] = 5;
  EXPECT_TRUE(rejects(bad));
  bad = good;
  bad["lengths"][0]["length"] = "long";
  EXPECT_TRUE(rejects(bad));
  bad = good;
  bad["lengths"][0] = 7;
  EXPECT_TRUE(rejects(bad));
}

}  // namespace
}  // namespace flash_entmax::lab
