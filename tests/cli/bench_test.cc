#include <gtest/gtest.h>

#include <string>

#include "cli/program.h"

namespace flash_entmax {
namespace {

TEST(Bench, Mapping) {
  const nlohmann::json document =
      RunForJson({"bench", "mapping", "--rows", "9", "--columns", "33", "--dtype", "bfloat16",
                  "--alpha", "1,1.5,2", "--rounds", "3"});
  ASSERT_EQ(document["results"].size(), 3u);
  for (const auto& result : document["results"]) {
    EXPECT_LE(result["min_seconds"], result["median_seconds"]);
    EXPECT_LE(result["median_seconds"], result["max_seconds"]);
    EXPECT_EQ(result["rounds"], 3);
  }
  EXPECT_EQ(document["results"][0]["mean_support"], 33.0);
  EXPECT_LT(document["results"][2]["mean_support"], 33.0);
  EXPECT_GT(document["setting"]["peak_memory_bytes"], 0);
}

TEST(Bench, AttentionOverEveryWorkload) {
  for (const char* workload : {"gauss(4)", "topic(3)", "local", "nape"}) {
    const nlohmann::json document =
        RunForJson({"bench", "attention", "--workload", workload, "--length", "300", "--heads", "4",
                    "--kv-heads", "2", "--rounds", "2", "--alpha", "1,1.5"});
    ASSERT_EQ(document["results"].size(), 2u);
    EXPECT_EQ(document["results"][0]["workload"], workload);
    EXPECT_LT(document["results"][1]["mean_keys_a_row"], 100.0);
    // Softmax keeps every key, but ALiBi's slope of 1 makes some too small for float32.
    if (workload == std::string("nape")) continue;
    EXPECT_NEAR(document["results"][0]["mean_keys_a_row"], 150.5, 1e-9);
    EXPECT_EQ(document["results"][0]["empty_tile_share"], 0.0);
  }
}

TEST(Bench, PrintsTheCommandToRepeatIt) {
  const ProgramResult result = RunProgram({"bench", "attention", "--workload", "gauss(1)",
                                           "--length", "64", "--rounds", "1", "--no-causal"});
  EXPECT_EQ(result.exit_code, 0) << result.error;
  EXPECT_EQ(result.error, "");
  EXPECT_NE(result.output.find("repeat: flash-entmax bench attention --workload 'gauss(1)' "
                               "--length 64 --rounds 1 --no-causal"),
            std::string::npos)
      << result.output;
  EXPECT_NE(result.output.find("not causal"), std::string::npos);
}

TEST(Bench, RejectsBadOptions) {
  ExpectBadInput({"bench", "attention", "--workload", "other"}, "workload: got 'other'");
  ExpectBadInput({"bench", "attention", "--workload", "gauss(-1)"}, "gauss(-1)");
  ExpectBadInput({"bench", "attention", "--alpha", "-0.5", "--length", "8"}, "alpha");
  ExpectBadInput({"bench", "attention", "--heads", "3", "--kv-heads", "2"}, "--kv-heads");
  ExpectBadInput({"bench", "mapping", "--alpha", "-1", "--rows", "2"}, "alpha");
  ExpectBadInput({"bench", "mapping", "--rows", "0"}, "--rows");
  ExpectBadInput({"bench", "mapping", "--dtype", "int32"}, "--dtype");
  ExpectBadInput({"bench", "mapping", "--rows", "4000000000", "--columns", "4000000000"}, "scores");
  ExpectBadInput({"bench", "mapping", "--sigma", "nan"}, "--sigma: got nan");
  ExpectBadInput({"bench", "mapping", "--sigma", "-1"}, "--sigma: got -1");
}

}  // namespace
}  // namespace flash_entmax
