#include <gtest/gtest.h>

#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "cli/program.h"
#include "io/temporary_folder.h"
#include "map_input.h"
#include "reference/loss_reference.h"
#include "reference/mapping_reference.h"

namespace flash_entmax {
namespace {

std::vector<double> Numbers(const std::string& line) {
  std::istringstream stream(line);
  std::vector<double> numbers;
  std::string word;
  while (stream >> word) numbers.push_back(std::stod(word));
  return numbers;
}

void ExpectNear(const std::vector<double>& actual, const std::vector<double>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) EXPECT_NEAR(actual[i], expected[i], 1e-14) << i;
}

TEST(Map, MapsRowsOfAnyLength) {
  const ProgramResult result =
      RunProgram({"map"}, "1 2 0.5 # a comment\n\n# nothing\n3,\t-1;+2e0 -inf\n7\n");
  EXPECT_EQ(result.exit_code, 0) << result.error;
  std::istringstream lines(result.output);
  std::string line;
  for (const std::vector<double>& row : std::vector<std::vector<double>>{
           {1, 2, 0.5}, {3, -1, 2, -std::numeric_limits<double>::infinity()}, {7}}) {
    ASSERT_TRUE(std::getline(lines, line));
    ExpectNear(Numbers(line), reference::MapRow(row, MappingKind::kEntmax, 1.5).probability);
  }
  EXPECT_FALSE(std::getline(lines, line));
}

TEST(Map, KnowsEveryMapping) {
  const std::vector<double> row = {0.3, 1.2, -0.4, 1.0};
  const std::string input = "0.3 1.2 -0.4 1.0";
  struct Case {
    std::vector<std::string> flags;
    MappingKind kind;
    double alpha;
    double budget;
  };
  for (const Case& c : std::vector<Case>{
           {{"--mapping", "softmax"}, MappingKind::kEntmax, 1.0, 1.0},
           {{"--mapping", "sparsemax"}, MappingKind::kEntmax, 2.0, 1.0},
           {{"--alpha", "0.7"}, MappingKind::kEntmax, 0.7, 1.0},
           {{"--mapping", "entmax", "--alpha", "1.3"}, MappingKind::kEntmax, 1.3, 1.0},
           {{"--mapping", "normmax"}, MappingKind::kNormmax, 2.0, 1.0},
           {{"--mapping", "normmax", "--alpha", "3"}, MappingKind::kNormmax, 3.0, 1.0},
           {{"--mapping", "budget", "--budget", "2"}, MappingKind::kBudget, 1.5, 2.0}}) {
    std::vector<std::string> arguments = {"map"};
    arguments.insert(arguments.end(), c.flags.begin(), c.flags.end());
    const ProgramResult result = RunProgram(arguments, input);
    EXPECT_EQ(result.exit_code, 0) << result.error;
    ExpectNear(Numbers(result.output),
               reference::MapRow(row, c.kind, c.alpha, c.budget).probability);
  }
}

TEST(Map, NumbersRoundTrip) {
  const nlohmann::json document = RunForJson({"map"}, "0.1 0.2 0.3");
  const ProgramResult text = RunProgram({"map"}, "0.1 0.2 0.3");
  const std::vector<double> printed = Numbers(text.output);
  EXPECT_EQ(document["rows"][0]["probabilities"], printed);
  EXPECT_EQ(document["rows"][0]["support_size"], 3);
}

TEST(Map, PrintsSupportAndLoss) {
  EXPECT_EQ(RunProgram({"map", "--mapping", "sparsemax", "--support"}, "5 0 5 1").output,
            "0:0.5 2:0.5\n");
  const double expected =
      reference::FenchelYoungLoss({1.0, 0.5, 0.2}, 1, MappingKind::kEntmax, 1.5).loss;
  EXPECT_NEAR(std::stod(RunProgram({"map", "--loss", "1"}, "1 0.5 0.2").output), expected, 1e-13);
  EXPECT_NEAR(RunForJson({"map", "--loss", "1"}, "1 0.5 0.2")["rows"][0]["loss"], expected, 1e-13);
  ExpectBadInput({"map", "--loss", "3"}, "line 1: --loss: got 3; must be in [0, 2]", "1 2 3");
  ExpectBadInput({"map", "--loss", "-1"}, "line 1: --loss: got -1; must be in [0, 2]", "1 2 3");
  ExpectBadInput({"map", "--loss", "0", "--support"}, "--support", "1 2 3");
  ExpectBadInput({"map", "--loss", "0", "--mapping", "budget", "--budget", "1"},
                 "--loss: not for --mapping budget", "1 2 3");
}

TEST(Map, NaNStaysInItsRow) {
  const ProgramResult result = RunProgram({"map", "--mapping", "sparsemax"}, "1 nan\n1 0\n");
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(result.output, "nan nan\n1 0\n");
  const nlohmann::json document = RunForJson({"map"}, "1 nan");
  EXPECT_EQ(document["rows"][0]["probabilities"][0], "nan");
}

TEST(Map, NamesLineAndColumnOfABadNumber) {
  ExpectBadInput({"map"}, "standard input: line 2, column 5: got '3x'; must be a number",
                 "1 2\n1 2 3x 4");
  ExpectBadInput({"map"}, "got '--1'", "--1");
  ExpectBadInput({"map"}, "got '+-1'", "+-1");
  ExpectBadInput({"map"}, "range of float64", "1e999");
  ExpectBadInput({"map"}, "'\\x1b[2J'", "\x1B[2J");
}

TEST(Map, ReadsFilesAndRejectsWhatIsNone) {
  const TemporaryFolder folder;
  WriteAll(folder.File("rows"), "2 2\r\n");
  EXPECT_EQ(RunProgram({"map", folder.File("rows"), "--mapping", "sparsemax"}).output, "0.5 0.5\n");
  ExpectBadInput({"map", folder.File("missing")}, "No such file");
  ExpectBadInput({"map", folder.File("")}, "is a folder");
  EXPECT_EQ(RunProgram({"map"}, "").output, "");
  EXPECT_EQ(RunForJson({"map"}, "")["rows"].size(), 0u);
}

TEST(Map, RejectsOptionsThatDoNotGoTogether) {
  ExpectBadInput({"map", "--mapping", "softmax", "--alpha", "2"}, "--alpha", "1");
  ExpectBadInput({"map", "--mapping", "budget"}, "--budget: must be given", "1");
  ExpectBadInput({"map", "--budget", "1"}, "--budget: only for", "1");
  ExpectBadInput({"map", "--mapping", "other"}, "--mapping", "1");
  ExpectBadInput({"map", "--alpha", "0"}, "alpha", "1");
  ExpectBadInput({"map", "--mapping", "normmax", "--alpha", "1"}, "alpha", "1");
  ExpectBadInput({"map", "--mapping", "budget", "--budget", "3"}, "line 1: budget", "1 2");
}

TEST(NumberRows, KeepLineNumbers) {
  std::istringstream input("1\n\n2 3\n");
  const auto rows = cli::ReadNumberRows(input, "text");
  ASSERT_TRUE(rows.ok());
  ASSERT_EQ(rows->size(), 2u);
  EXPECT_EQ((*rows)[1].line, 3);
  EXPECT_EQ((*rows)[1].numbers, (std::vector<double>{2, 3}));
}

}  // namespace
}  // namespace flash_entmax
