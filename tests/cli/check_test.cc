#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "check/error_table.h"
#include "cli/program.h"
#include "flash_entmax/machine.h"

namespace flash_entmax {
namespace {

TEST(Check, PassesOnEveryInstructionSet) {
  const nlohmann::json document = RunForJson({"check", "--problems", "60", "--seed", "7"});
  EXPECT_TRUE(document["passed"]);
  EXPECT_EQ(document["problems"], 60);
  EXPECT_EQ(document["seed"], 7);
  ASSERT_EQ(document["instruction_sets"].size(), SupportedInstructionSets().size());
  for (const auto& set : document["instruction_sets"]) {
    EXPECT_GT(set["errors"].size(), 10u);
    for (const auto& line : set["errors"]) {
      EXPECT_TRUE(line["passed"]) << set["instruction_set"] << " " << line;
    }
  }
}

TEST(Check, PrintsATableForTheChosenInstructionSet) {
  const std::string slowest = SupportedInstructionSets().back();
  const ProgramResult result = RunProgram({"check", "--problems", "8", "--isa", slowest});
  EXPECT_EQ(result.exit_code, 0) << result.output;
  EXPECT_EQ(result.error, "") << "no progress bar in a file";
  EXPECT_EQ(result.output.rfind(slowest + "\n", 0), 0u) << result.output;
  EXPECT_NE(result.output.find("mapping forward"), std::string::npos);
  EXPECT_NE(result.output.find("attention output"), std::string::npos);
  EXPECT_NE(result.output.find("PASS: 8 problems of seed 1"), std::string::npos);
}

TEST(Check, RepeatsOneProblem) {
  const nlohmann::json document = RunForJson({"check", "--problem", "3"});
  EXPECT_EQ(document["problems"], 1);
  for (const auto& line : document["instruction_sets"][0]["errors"]) EXPECT_EQ(line["problem"], 3);
}

TEST(Check, RejectsBadCounts) {
  ExpectBadInput({"check", "--problems", "0"}, "--problems");
  ExpectBadInput({"check", "--problem", "-1"}, "--problem");
  ExpectBadInput({"check", "--seed", "-1"}, "--seed");
  ExpectBadInput({"check", "--seed", "9007199254740993"}, "--seed");
}

TEST(ErrorTable, NaNFails) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double infinity = std::numeric_limits<double>::infinity();
  const auto passes = [](double error, double bound) {
    cli::ErrorTable table;
    table.Record("what", "float32", error, bound, 0);
    return table.passed();
  };
  EXPECT_TRUE(passes(0.0, 0.0));
  EXPECT_TRUE(passes(1.0, 1.0));
  EXPECT_FALSE(passes(1.0, 0.5));
  EXPECT_FALSE(passes(nan, 1.0));
  EXPECT_FALSE(passes(0.0, nan));
  EXPECT_FALSE(passes(infinity, 1.0));
  EXPECT_FALSE(passes(1e-300, 0.0));
}

TEST(ErrorTable, KeepsTheWorstOfEachKind) {
  cli::ErrorTable table;
  table.Record("what", "float32", 1.0, 100.0, 1);
  table.Record("what", "float32", 0.5, 1.0, 2);
  table.Record("what", "float32", 5.0, 100.0, 3);
  EXPECT_EQ(table.ToJson()[0]["problem"], 2);
  EXPECT_EQ(table.worst_problem(), -1);
  table.Record("what", "float32", std::nan(""), 1.0, 4);
  EXPECT_EQ(table.worst_problem(), 4);
  EXPECT_EQ(table.ToJson()[0]["failures"], 1);
  EXPECT_EQ(table.ToJson()[0]["comparisons"], 4);
}

}  // namespace
}  // namespace flash_entmax
