// Training: it learns, it resumes bit for bit, and it refuses what is damaged or foreign.

#include "trainer.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoint_values.h"
#include "io/temporary_folder.h"
#include "testing/status.h"

namespace flash_entmax::lab {
namespace {

class TrainerTest : public ::testing::Test {
 protected:
  static RunConfig SmallRun(AttentionKind kind) {
    RunConfig run;
    run.recipe = "test";
    run.variant = "small";
    run.seed = 5;
    run.task.name = "induction";
    run.task.symbols = 4;
    run.model.width = 16;
    run.model.mlp = 16;
    run.model.heads = 2;
    run.model.layers = 1;
    run.model.attention = kind;
    run.training.steps = 40;
    run.training.batch = 8;
    run.training.warmup = 5;
    run.training.log_every = 7;
    run.evaluation.length = 8;
    run.evaluation.multiples = {1, 2};
    run.evaluation.samples = 20;
    return run;
  }

  TrainingOptions Options(const std::string& name) const {
    TrainingOptions options;
    options.folder = folder_.File(name);
    options.threads = 2;
    return options;
  }

  TemporaryFolder folder_;
};

TEST_F(TrainerTest, ResumesBitForBit) {
  for (const AttentionKind kind :
       {AttentionKind::kAsentmax, AttentionKind::kSoftmax, AttentionKind::kSelectiveLinear}) {
    SCOPED_TRACE(NameOf(kind));
    RunConfig run = SmallRun(kind);
    if (kind == AttentionKind::kSoftmax) run.training.optimizer = Optimizer::kMuon;
    if (kind == AttentionKind::kAsentmax) {
      run.training.precision = Precision::kBFloat16True;
      run.model.zero_token = 0;
    }
    const std::string name = NameOf(kind);
    std::vector<double> whole, parts;
    TrainingOptions options = Options(name + "-whole");
    options.on_step = [&](int64_t, double loss) { whole.push_back(loss); };
    const Expected<TrainingOutcome> first = Train(run, options);
    ASSERT_TRUE(testing::IsOk(first.status()));
    EXPECT_TRUE(first->finished);
    ASSERT_EQ(whole.size(), 40u);

    options = Options(name + "-parts");
    options.on_step = [&](int64_t step, double loss) {
      EXPECT_EQ(step, static_cast<int64_t>(parts.size()));
      parts.push_back(loss);
    };
    options.stop = [&] { return parts.size() % 13 == 0; };
    for (int call = 0; call < 4; ++call) {
      const Expected<TrainingOutcome> outcome = Train(run, options);
      ASSERT_TRUE(testing::IsOk(outcome.status()));
      EXPECT_EQ(outcome->finished, call == 3);
    }
    EXPECT_EQ(parts, whole);
    EXPECT_EQ(static_cast<bool>(KeepsBfloat16(options.folder)),
              run.training.precision == Precision::kBFloat16True);
    // The log has every line once.
    std::ifstream metrics(options.folder + "/metrics.jsonl");
    std::vector<int64_t> steps;
    for (std::string line; std::getline(metrics, line);) {
      steps.push_back(nlohmann::json::parse(line)["step"].get<int64_t>());
    }
    EXPECT_EQ(steps, (std::vector<int64_t>{7, 14, 21, 28, 35, 40}));
  }
}

TEST_F(TrainerTest, EvaluationIsCompleteAndRepeatable) {
  RunConfig run = SmallRun(AttentionKind::kEntmax);
  run.training.steps = 3;
  const TrainingOptions options = Options("run");
  ASSERT_TRUE(testing::IsOk(Train(run, options).status()));
  ASSERT_TRUE(testing::IsOk(Evaluate(run, options)));
  const Expected<std::string> text = ReadFile(options.folder + "/result.json");
  ASSERT_TRUE(testing::IsOk(text.status()));
  const auto json = nlohmann::json::parse(*text);
  ASSERT_EQ(json["lengths"].size(), 2u);
  EXPECT_EQ(json["step"], 3);
  for (const auto& entry : json["lengths"]) {
    const double exact = entry["exact_match"], accuracy = entry["token_accuracy"];
    // Of 20 samples all that are wrong are listed, with what was said.
    const auto mistakes = entry.value("mistakes", nlohmann::json::array());
    EXPECT_NEAR(static_cast<double>(mistakes.size()), 20.0 * (1.0 - exact), 1e-9);
    for (const auto& mistake : mistakes) {
      ASSERT_FALSE(mistake["wrong"].empty());
      for (const auto& token : mistake["wrong"]) EXPECT_NE(token[1], token[2]);
    }
    EXPECT_TRUE(exact >= 0.0 && exact <= accuracy && accuracy <= 1.0);
    const auto& layer = entry["attention"][0];
    for (size_t head = 0; head < 2; ++head) {
      const double support = layer["support"][head], largest = layer["largest"][head];
      const double entropy = layer["entropy"][head];
      EXPECT_TRUE(support >= 1.0 && largest <= 1.0 + 1e-9 && largest >= 1.0 / support - 1e-9);
      EXPECT_TRUE(entropy >= -1e-9 && entropy <= 10.0);
    }
  }
  ASSERT_TRUE(testing::IsOk(Evaluate(run, options)));
  EXPECT_EQ(*text, *ReadFile(options.folder + "/result.json"));
}

TEST_F(TrainerTest, LearnsATinyTask) {
  RunConfig run = SmallRun(AttentionKind::kAsentmax);
  run.task.name = "back";
  run.task.distance = 1;
  run.model.width = 32;
  run.model.layers = 2;
  run.model.init = 0.1;
  run.training.steps = 150;
  run.training.min_length = 2;
  run.training.max_length = 4;
  run.training.batch = 32;
  run.training.learning_rate = 5e-3;
  std::vector<double> losses;
  TrainingOptions options = Options("run");
  options.on_step = [&](int64_t, double loss) { losses.push_back(loss); };
  ASSERT_TRUE(testing::IsOk(Train(run, options).status()));
  EXPECT_LE(losses.back(), 0.6 * losses.front());
}

TEST_F(TrainerTest, RefusesDamagedAndForeignCheckpoints) {
  RunConfig run = SmallRun(AttentionKind::kEntmax);
  run.training.steps = 2;
  const TrainingOptions options = Options("run");
  ASSERT_TRUE(testing::IsOk(Train(run, options).status()));
  RunConfig other = run;
  other.training.learning_rate = 0.5;
  EXPECT_TRUE(testing::Rejects(Train(other, options).status(), "folder"));
  EXPECT_TRUE(testing::Rejects(Evaluate(other, options), "checkpoint"));
  EXPECT_TRUE(testing::Rejects(Evaluate(run, Options("empty")), "folder"));

  const std::string path = options.folder + "/checkpoint.safetensors";
  const std::string good = *ReadFile(path);
  const auto write = [&](const std::string& contents) {
    std::ofstream(path, std::ios::binary) << contents;
  };
  for (const size_t at : {good.size() - 1, good.size() / 2, good.size() - 3000}) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 0x10);
    write(bad);
    EXPECT_FALSE(Train(run, options).ok()) << at;
  }
  for (const size_t size : {size_t{0}, size_t{7}, good.size() / 3, good.size() - 1}) {
    write(good.substr(0, size));
    EXPECT_FALSE(Train(run, options).ok()) << size;
  }
  write(good);
  EXPECT_TRUE(testing::IsOk(Train(run, options).status()));
}

TEST_F(TrainerTest, RefusesWhatItCannotDo) {
  const RunConfig run = SmallRun(AttentionKind::kEntmax);
  TrainingOptions options = Options("run");
  options.device = "abacus";
  EXPECT_TRUE(testing::Rejects(Train(run, options).status(), "device"));
  options = Options("run");
  options.folder = "/proc/no/such/folder";
  EXPECT_EQ(Train(run, options).status().code(), StatusCode::kIo);
}

}  // namespace
}  // namespace flash_entmax::lab
