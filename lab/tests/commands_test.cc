// `flash-entmax train`, `eval` and `mistakes` as a user calls them.

#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "cli/program.h"
#include "io/temporary_folder.h"

namespace flash_entmax {
namespace {

constexpr const char* kRecipe = R"({
  "name": "tiny",
  "task": {"name": "copy", "symbols": 4},
  "model": {"layers": 1, "width": 16, "mlp": 16, "heads": 2},
  "training": {"steps": 6, "batch": 4, "min_length": 2, "max_length": 4, "warmup": 0},
  "evaluation": {"length": 4, "multiples": [1, 2], "samples": 4},
  "seeds": [1],
  "variants": {
    "entmax": {"model": {"attention": "entmax"}},
    "softmax": {"model": {"attention": "softmax"}}
  }
})";

class CommandsTest : public ::testing::Test {
 protected:
  void SetUp() override { WriteAll(recipe_, kRecipe); }

  std::vector<std::string> Call(const std::string& command,
                                const std::vector<std::string>& more = {}) const {
    std::vector<std::string> call = {command, recipe_, "--out", out_};
    call.insert(call.end(), more.begin(), more.end());
    return call;
  }

  TemporaryFolder folder_;
  const std::string recipe_ = folder_.File("tiny.json");
  const std::string out_ = folder_.File("out");
};

TEST_F(CommandsTest, TrainsEvaluatesAndKnowsWhatIsFinished) {
  const std::string result = out_ + "/tiny/softmax/seed1/result.json";
  nlohmann::json document = RunForJson(Call("train", {"--variant", "softmax", "--no-eval"}));
  EXPECT_EQ(document["command"], "train");
  ASSERT_EQ(document["runs"].size(), 1u);
  EXPECT_EQ(document["runs"][0]["run"], "tiny/softmax/seed1");
  EXPECT_EQ(document["runs"][0]["outcome"], "trained");
  EXPECT_EQ(document["runs"][0]["step"], 6);
  EXPECT_GT(document["runs"][0]["loss"].get<double>(), 0.0);
  EXPECT_FALSE(std::filesystem::exists(result));

  document = RunForJson(Call("eval", {"--variant", "softmax"}));
  EXPECT_EQ(document["runs"][0]["result"], result);
  EXPECT_EQ(nlohmann::json::parse(ReadAll(result))["lengths"].size(), 2u);
  // Six steps teach nothing: samples are wrong, and which tokens of them.
  document = RunForJson({"mistakes", result});
  ASSERT_EQ(document["lengths"].size(), 2u);
  EXPECT_FALSE(document["lengths"][1]["samples"][0]["wrong"].empty());
  const ProgramResult mistakes = RunProgram({"mistakes", result});
  EXPECT_NE(mistakes.output.find("length 8 (2 x): "), std::string::npos) << mistakes.output;
  EXPECT_NE(mistakes.output.find("  sample 0, place "), std::string::npos) << mistakes.output;

  // The other variant is trained and evaluated, this one left as it is.
  const ProgramResult all = RunProgram(Call("train"));
  EXPECT_EQ(all.exit_code, 0) << all.error;
  EXPECT_NE(all.output.find("tiny/softmax/seed1: finished before\n"), std::string::npos);
  EXPECT_NE(all.output.find("tiny/entmax/seed1: step 6 of 6, loss "), std::string::npos);
  EXPECT_NE(all.output.find("tiny/entmax/seed1: results in "), std::string::npos);

  // With other settings it is another run, and neither result nor checkpoint is taken for it.
  const std::string before = ReadAll(result);
  ExpectBadInput(Call("train", {"--variant", "softmax", "--set", "training.steps=7"}),
                 "which belongs to another run");
  EXPECT_EQ(ReadAll(result), before);
}

TEST_F(CommandsTest, RejectsBadInput) {
  ExpectBadInput({"train"}, "recipe");
  ExpectBadInput({"mistakes", folder_.File("none.json")}, "none.json");
  ExpectBadInput({"mistakes", recipe_}, "must be a result.json");
  ExpectBadInput({"train", folder_.File("none.json")}, "none.json");
  ExpectBadInput(Call("train", {"--bogus"}), "not expected: --bogus");
  ExpectBadInput(Call("train", {"--set", "training.stepz=3"}), "training.stepz: got 3");
  ExpectBadInput(Call("train", {"--variant", "foo"}), "must be one of entmax, softmax");
  ExpectBadInput(Call("train", {"--part", "3/2"}), "--part: got \"3/2\"");
  ExpectBadInput(Call("train", {"--device", "tpu"}), "must be cpu or cuda");
  ExpectBadInput(Call("eval"), "which has no checkpoint");
}

}  // namespace
}  // namespace flash_entmax
