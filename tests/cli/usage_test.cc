// What holds for every subcommand.

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cli/program.h"
#include "flash_entmax/machine.h"

namespace flash_entmax {
namespace {

const std::vector<std::vector<std::string>>& Subcommands() {
  static const std::vector<std::vector<std::string>> kSubcommands = {
      {"run"}, {"map"}, {"plan"}, {"check"}, {"bench", "mapping"}, {"bench", "attention"},
      {"info"}};
  return kSubcommands;
}

std::vector<std::string> With(std::vector<std::string> words, const std::string& word) {
  words.push_back(word);
  return words;
}

TEST(Usage, EverySubcommandHasHelp) {
  for (const auto& subcommand : Subcommands()) {
    const ProgramResult result = RunProgram(With(subcommand, "--help"));
    EXPECT_EQ(result.exit_code, 0);
    EXPECT_EQ(result.error, "");
    for (const char* flag : {"--threads", "--isa", "--json", "--quiet"}) {
      EXPECT_NE(result.output.find(flag), std::string::npos) << result.output;
    }
  }
  const ProgramResult all = RunProgram({"--help"});
  EXPECT_EQ(all.exit_code, 0);
  for (const auto& subcommand : Subcommands()) {
    EXPECT_NE(all.output.find(subcommand[0]), std::string::npos);
  }
}

TEST(Usage, UnknownFlagsAreErrors) {
  for (const auto& subcommand : Subcommands()) {
    std::vector<std::string> words = subcommand;
    if (subcommand[0] == "run") words.emplace_back("file");
    ExpectBadInput(With(words, "--no-such-flag"), "--no-such-flag");
  }
  ExpectBadInput({}, "run, map, plan, check, bench, info");
  ExpectBadInput({"no-such-command"}, "got \"no-such-command\"; must be one of");
  // Only the lab's build has them.
  ExpectBadInput({"train", "recipe.json"}, "./dev lab");
  ExpectBadInput({"bench"}, "a subcommand is required: mapping, attention");
  ExpectBadInput({"bench", "other"}, "other");
  ExpectBadInput({"info", "plan"}, "plan");
  ExpectBadInput({"run"}, "file");
}

// What an unset shell variable in quotes becomes.
TEST(Usage, EmptyArgumentsAreErrors) {
  ExpectBadInput({"map", "--alpha", ""}, "argument 3 is empty");
  ExpectBadInput({"plan", "--heads", ""}, "argument 3 is empty");
}

TEST(Usage, NumbersMustBeNumbers) {
  ExpectBadInput({"info", "--threads", "many"}, "--threads");
  ExpectBadInput({"info", "--threads", "-1"}, "--threads");
  ExpectBadInput({"plan", "--heads", "1.5"}, "--heads");
  ExpectBadInput({"plan", "--heads", "99999999999999999999"}, "--heads");
  // Saturates, as the parser does.
  ExpectBadInput({"plan", "--key-length", "99999999999999999999"}, "9223372036854775807");
}

TEST(Usage, PrintsItsVersion) {
  const ProgramResult result = RunProgram({"--version"});
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(result.output, std::string("flash-entmax ") + Version() + "\n");
}

TEST(Usage, InstructionSetComesFromFlagOrEnvironment) {
  const std::string slowest = SupportedInstructionSets().back();
  EXPECT_EQ(RunForJson({"info", "--isa", slowest})["instruction_set"], slowest);
  const ProgramResult result = RunProgram({"info", "--json"}, "", {"FLASH_ENTMAX_ISA=" + slowest});
  EXPECT_EQ(nlohmann::json::parse(result.output)["instruction_set"], slowest);
  ExpectBadInput({"info", "--isa", "NOTHING"}, "NOTHING");
  EXPECT_EQ(RunProgram({"info"}, "", {"FLASH_ENTMAX_ISA=NOTHING"}).exit_code, 2);
  // The flag goes first.
  EXPECT_EQ(RunProgram({"info", "--isa", slowest}, "", {"FLASH_ENTMAX_ISA=NOTHING"}).exit_code, 0);
}

}  // namespace
}  // namespace flash_entmax
