// Recipes: what is read, and what is refused.

#include "config.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "tasks/task.h"
#include "testing/status.h"

namespace flash_entmax::lab {
namespace {

constexpr const char* kRecipe = R"({
  "name": "demo", "task": {"name": "sort"}, "model": {"width": 32, "heads": 4},
  "training": {"steps": 5}, "seeds": [1, 2],
  "variants": {"a": {"model": {"attention": "entmax", "alpha": 2.0}}, "b": {}}
})";

TEST(Config, VariantsTimesSeeds) {
  const Expected<Recipe> recipe = ParseRecipe(kRecipe, "test");
  ASSERT_TRUE(testing::IsOk(recipe.status()));
  ASSERT_EQ(recipe->runs.size(), 4u);
  EXPECT_EQ(recipe->runs[0].variant, "a");
  EXPECT_EQ(recipe->runs[0].model.attention, AttentionKind::kEntmax);
  EXPECT_EQ(recipe->runs[0].model.alpha, 2.0);
  EXPECT_EQ(recipe->runs[1].seed, 2u);
  EXPECT_EQ(recipe->runs[2].model.attention, AttentionKind::kSoftmax);
  EXPECT_EQ(recipe->runs[3].training.steps, 5);
}

TEST(Config, OverridesComeLast) {
  const Expected<Recipe> recipe =
      ParseRecipe(kRecipe, "test", {"training.steps=7", "model.attention=softmax", "seeds=[9]"});
  ASSERT_TRUE(testing::IsOk(recipe.status()));
  ASSERT_EQ(recipe->runs.size(), 2u);
  EXPECT_EQ(recipe->runs[0].training.steps, 7);
  EXPECT_EQ(recipe->runs[0].seed, 9u);
  EXPECT_EQ(recipe->runs[0].model.attention, AttentionKind::kSoftmax);
}

TEST(Config, RunsSurviveARoundTrip) {
  const Expected<Recipe> recipe = ParseRecipe(kRecipe, "test");
  ASSERT_TRUE(testing::IsOk(recipe.status()));
  const std::string text = RunToJson(recipe->runs[0]);
  const Expected<RunConfig> again = ParseRun(text);
  ASSERT_TRUE(testing::IsOk(again.status()));
  EXPECT_EQ(RunToJson(*again), text);
  // What is left out by default comes back too.
  const Expected<Recipe> rare = ParseRecipe(
      kRecipe, "test",
      {"task.end=true", "task.crossed_keys=true", "task.easy_steps=500", "task.few_symbols=0.5",
       "task.fewest_symbols=3", "task.most_symbols=6", "task.prefix=0.25", "task.shift=0.5",
       "task.late=0.75", "model.zero_token=1", "training.precision=bfloat16_true"});
  ASSERT_TRUE(testing::IsOk(rare.status()));
  const Expected<RunConfig> read = ParseRun(RunToJson(rare->runs[0]));
  ASSERT_TRUE(testing::IsOk(read.status()));
  EXPECT_TRUE(read->task.end);
  EXPECT_TRUE(read->task.crossed_keys);
  EXPECT_EQ(read->task.easy_steps, 500);
  EXPECT_EQ(read->task.few_symbols, 0.5);
  EXPECT_EQ(read->task.fewest_symbols, 3);
  EXPECT_EQ(read->task.most_symbols, 6);
  EXPECT_EQ(read->task.prefix, 0.25);
  EXPECT_EQ(read->task.shift, 0.5);
  EXPECT_EQ(read->task.late, 0.75);
  EXPECT_EQ(read->model.zero_token, 1);
  EXPECT_EQ(read->training.precision, Precision::kBFloat16True);
}

TEST(Config, BrokenRecipesAreRefused) {
  const auto status = [](const std::string& override_text) {
    return ParseRecipe(kRecipe, "test", {override_text}).status();
  };
  EXPECT_TRUE(testing::Rejects(ParseRecipe("{", "test").status(), "recipe"));
  EXPECT_TRUE(testing::Rejects(ParseRecipe("[]", "test").status(), "recipe"));
  EXPECT_TRUE(testing::Rejects(ParseRecipe("{}", "test").status(), "name"));
  EXPECT_TRUE(testing::Rejects(status("training.stesp=1"), "training.stesp"));
  EXPECT_TRUE(testing::Rejects(status("colour=1"), "colour"));
  EXPECT_TRUE(testing::Rejects(status("training.steps=0"), "training.steps"));
  EXPECT_TRUE(testing::Rejects(status("training.steps=1.5"), "training.steps"));
  EXPECT_TRUE(testing::Rejects(status("model.zero_token=100000"), "model.zero_token"));
  EXPECT_TRUE(testing::Rejects(status("task.end=1"), "task.end"));
  EXPECT_TRUE(testing::Rejects(status("training.precision=bf16"), "training.precision"));
  EXPECT_TRUE(testing::Rejects(status("task.easy_steps=-1"), "task.easy_steps"));
  EXPECT_TRUE(testing::Rejects(status("task.fewest_symbols=1"), "task.fewest_symbols"));
  EXPECT_TRUE(testing::Rejects(status("task.most_symbols=-1"), "task.most_symbols"));
  EXPECT_TRUE(testing::Rejects(status("task.prefix=1.5"), "task.prefix"));
  EXPECT_TRUE(testing::Rejects(status("task.shift=1.5"), "task.shift"));
  EXPECT_TRUE(testing::Rejects(status("task.late=1.5"), "task.late"));
  EXPECT_TRUE(testing::Rejects(status("training.learning_rate=fast"), "training.learning_rate"));
  EXPECT_TRUE(testing::Rejects(status("training.min_length=100"), "training.min_length"));
  EXPECT_TRUE(testing::Rejects(status("model.heads=5"), "model.heads"));
  EXPECT_TRUE(testing::Rejects(status("model.attention=telepathy"), "model.attention"));
  EXPECT_TRUE(testing::Rejects(status("model=3"), "model"));
  EXPECT_TRUE(testing::Rejects(status("evaluation.multiples=[]"), "evaluation.multiples"));
  EXPECT_TRUE(testing::Rejects(status("evaluation.multiples=[0.02]"), "evaluation.multiples"));
  EXPECT_TRUE(testing::Rejects(status("seeds=[]"), "seeds"));
  EXPECT_TRUE(testing::Rejects(status("task.name=juggle"), "task.name"));
  EXPECT_TRUE(testing::Rejects(status("nonsense"), "override"));
  EXPECT_TRUE(testing::Rejects(status("name.deeper=1"), "override"));
  EXPECT_EQ(ReadRecipe("/nonexistent/recipe.json").status().code(), StatusCode::kIo);
}

// Of every recipe that comes with the lab: it is valid, has its file's name, and its task exists.
TEST(Config, RecipesAreValid) {
  int recipes = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(FLASH_ENTMAX_RECIPES)) {
    if (entry.path().extension() != ".json") continue;
    SCOPED_TRACE(entry.path().string());
    ++recipes;
    const Expected<Recipe> recipe = ReadRecipe(entry.path().string());
    ASSERT_TRUE(testing::IsOk(recipe.status()));
    for (const RunConfig& run : recipe->runs) {
      EXPECT_EQ(run.recipe, entry.path().stem().string());
      EXPECT_TRUE(testing::IsOk(MakeTask(run.task).status()));
    }
  }
  EXPECT_GT(recipes, 20);
}

// What a field is called, and when it is left out, must not change: a run is only continued, and
// only counts as done, where its run.json is the same text. Left out are trials, some of which have
// options that are gone, and the quick runs, which are older than some fields.
TEST(Config, SavedRunsReadBackAsTheSameText) {
  int runs = 0;
  for (const auto& entry :
       std::filesystem::recursive_directory_iterator(FLASH_ENTMAX_RECIPES "/../results")) {
    const std::string path = entry.path().string();
    if (entry.path().filename() != "run.json") continue;
    if (path.find("results/h") == std::string::npos) continue;
    SCOPED_TRACE(path);
    ++runs;
    const Expected<std::string> text = ReadFile(path);
    ASSERT_TRUE(testing::IsOk(text.status()));
    const Expected<RunConfig> run = ParseRun(*text);
    ASSERT_TRUE(testing::IsOk(run.status()));
    EXPECT_EQ(RunToJson(*run), *text);
  }
  EXPECT_GT(runs, 100);
}

TEST(Config, ChecksumOfKnownText) {
  // FNV-1a's published test value of "foobar".
  EXPECT_EQ(Checksum("foobar", 6), 0x85944171F73967E8u);
  EXPECT_EQ(Checksum("bar", 3, Checksum("foo", 3)), Checksum("foobar", 6));
}

}  // namespace
}  // namespace flash_entmax::lab
