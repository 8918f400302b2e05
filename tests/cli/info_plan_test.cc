#include <gtest/gtest.h>

#include <string>

#include "cli/program.h"
#include "flash_entmax/machine.h"

namespace flash_entmax {
namespace {

TEST(Info, TellsBuildAndMachine) {
  const nlohmann::json info = RunForJson({"info", "--threads", "3"});
  EXPECT_EQ(info["version"], Version());
  EXPECT_EQ(info["threads"], 3);
  EXPECT_EQ(info["supported_instruction_sets"], SupportedInstructionSets());
  EXPECT_EQ(info["compiled_instruction_sets"], CompiledInstructionSets());
  const ProgramResult text = RunProgram({"info"});
  EXPECT_EQ(text.exit_code, 0);
  EXPECT_NE(text.output.find(Version()), std::string::npos);
}

TEST(Plan, NeedsNoMemoryForTheTensors) {
  // 16 TB of keys.
  const nlohmann::json plan =
      RunForJson({"plan", "--batch", "1000", "--heads", "1000", "--query-length", "1",
                  "--key-length", "65536", "--head-size", "64", "--threads", "2", "--alpha", "2"});
  EXPECT_EQ(plan["plan"]["engine"], "cpu");
  EXPECT_EQ(plan["plan"]["threads"], 2);
  EXPECT_EQ(plan["key"], (std::vector<int64_t>{1000, 1000, 65536, 64}));
  EXPECT_GT(plan["plan"]["workspace_bytes"], 0);
  EXPECT_NE(RunProgram({"plan"}).output.find("workspace"), std::string::npos);
}

TEST(Plan, DiffersForSoftmax) {
  EXPECT_NE(RunForJson({"plan", "--alpha", "1"})["plan"]["path"],
            RunForJson({"plan", "--alpha", "1.5"})["plan"]["path"]);
  EXPECT_EQ(RunForJson({"plan", "--alpha", "0.5"})["plan"]["path"], "dense products");
}

TEST(Plan, RejectsWhatCannotBeRun) {
  ExpectBadInput({"plan", "--alpha", "0"}, "alpha");
  ExpectBadInput({"plan", "--alpha", "-1e-9"}, "alpha: got -1e-09; must be finite and > 0");
  ExpectBadInput({"plan", "--alpha", "nan"}, "alpha");
  ExpectBadInput({"plan", "--dtype", "int8"}, "--dtype: got int8; must be float64");
  ExpectBadInput({"plan", "--heads", "3", "--kv-heads", "2"}, "heads");
  ExpectBadInput({"plan", "--head-size", "-4"}, "-4");
  ExpectBadInput({"plan", "--heads", "0"}, "--heads");
  ExpectBadInput({"plan", "--batch", "-1"}, "--batch");
  ExpectBadInput({"plan", "--softcap", "-1"}, "softcap");
  ExpectBadInput({"plan", "--window-left", "-1"}, "window_left");
  ExpectBadInput({"plan", "--key-length", "9223372036854775807"}, "63 bits");
}

}  // namespace
}  // namespace flash_entmax
