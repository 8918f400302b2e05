#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cli/program.h"
#include "io/safetensors.h"
#include "io/temporary_folder.h"
#include "math/element.h"
#include "owned_tensor.h"
#include "reference/attention_reference.h"

namespace flash_entmax {
namespace {

using cli::OwnedTensor;

class RunTest : public ::testing::Test {
 protected:
  // Adds a tensor of random numbers to the file, of zeros if its type is an integer.
  TensorView Add(const std::string& name, DType dtype, const std::vector<int64_t>& shape) {
    auto tensor = OwnedTensor::Allocate(name, dtype, shape);
    EXPECT_TRUE(tensor.ok());
    for (int64_t i = 0; i < tensor->view().num_elements(); ++i) {
      const double number = std::normal_distribution<double>()(random_);
      WriteElement(tensor->mutable_view(), i, IsFloating(dtype) ? number : 0.0);
    }
    memory_.push_back(std::move(tensor).value());
    tensors_.push_back({name, memory_.back().view()});
    return memory_.back().view();
  }

  TensorView AddNumbers(const std::string& name, DType dtype, const std::vector<double>& numbers,
                        const std::vector<int64_t>& shape) {
    const TensorView view = Add(name, dtype, shape);
    for (size_t i = 0; i < numbers.size(); ++i) {
      WriteElement(memory_.back().mutable_view(), static_cast<int64_t>(i), numbers[i]);
    }
    return view;
  }

  std::string Save() {
    const Status status = io::WriteSafetensors(folder_.File("input"), tensors_);
    EXPECT_TRUE(status.ok()) << status.message();
    return folder_.File("input");
  }

  // Runs with --output and compares output, threshold and support with the reference.
  void ExpectLikeReference(const AttentionProblem& problem, std::vector<std::string> flags,
                           double tolerance) {
    std::vector<std::string> arguments = {"run", Save(), "--output", folder_.File("output"),
                                          "--support"};
    arguments.insert(arguments.end(), flags.begin(), flags.end());
    const nlohmann::json document = RunForJson(arguments);
    auto file = io::SafetensorsFile::Open(folder_.File("output"));
    ASSERT_TRUE(file.ok()) << file.status().message();
    const reference::AttentionResult expected = reference::AttentionForward(problem);
    const TensorView output = *file->Tensor("output");
    ASSERT_EQ(output.num_elements(), static_cast<int64_t>(expected.output.size()));
    for (size_t i = 0; i < expected.output.size(); ++i) {
      ASSERT_NEAR(ReadElement(output, static_cast<int64_t>(i)), expected.output[i], tolerance) << i;
    }
    const TensorView threshold = *file->Tensor("threshold");
    ASSERT_EQ(threshold.num_elements(), static_cast<int64_t>(expected.threshold.size()));
    for (size_t i = 0; i < expected.threshold.size(); ++i) {
      if (std::isnan(expected.threshold[i])) continue;
      ASSERT_NEAR(ReadElement(threshold, static_cast<int64_t>(i)), expected.threshold[i], 1e-4);
    }
    const TensorView offsets = *file->Tensor("support_row_offsets");
    const TensorView weights = *file->Tensor("support_probability");
    ASSERT_EQ(offsets.num_elements(), threshold.num_elements() + 1);
    ASSERT_EQ(ReadElement(offsets, threshold.num_elements()),
              static_cast<double>(weights.num_elements()));
    ASSERT_EQ(file->Tensor("support_key_index")->num_elements(), weights.num_elements());
    EXPECT_NEAR(
        document["mean_support"],
        static_cast<double>(weights.num_elements()) / static_cast<double>(threshold.num_elements()),
        1e-9);
  }

  TemporaryFolder folder_;
  std::mt19937_64 random_{1};
  std::vector<OwnedTensor> memory_;
  std::vector<io::NamedTensor> tensors_;
};

// The view with leading dimensions of size 1 up to four.
TensorView Full(const TensorView& view) {
  TensorView full = view;
  for (int i = 3; i >= 0; --i) {
    const int own = i - (4 - view.rank);
    full.shape[static_cast<size_t>(i)] = own >= 0 ? view.shape[static_cast<size_t>(own)] : 1;
    full.strides[static_cast<size_t>(i)] = own >= 0 ? view.strides[static_cast<size_t>(own)] : 0;
  }
  full.rank = 4;
  return full;
}

TEST_F(RunTest, MatchesTheReferenceForEveryRankAndType) {
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const double tolerance = dtype == DType::kFloat64   ? 1e-12
                             : dtype == DType::kFloat32 ? 1e-5
                                                        : 3e-2;
    for (int rank = 2; rank <= 4; ++rank) {
      memory_.clear();
      tensors_.clear();
      const std::vector<int64_t> leading = rank == 2   ? std::vector<int64_t>{}
                                           : rank == 3 ? std::vector<int64_t>{2}
                                                       : std::vector<int64_t>{2, 2};
      const auto shape = [&leading](int64_t length, int64_t size) {
        std::vector<int64_t> result = leading;
        result.insert(result.end(), {length, size});
        return result;
      };
      AttentionProblem problem;
      problem.query = Full(Add("q", dtype, shape(17, 8)));
      problem.key = Full(Add("k", dtype, shape(23, 8)));
      problem.value = Full(Add("v", dtype, shape(23, 5)));
      ExpectLikeReference(problem, {}, tolerance);
      auto file = io::SafetensorsFile::Open(folder_.File("output"));
      ASSERT_TRUE(file.ok());
      EXPECT_EQ(file->Tensor("output")->rank, rank) << "as many dimensions as q has";
      EXPECT_EQ(file->Tensor("output")->dtype, dtype);
      EXPECT_EQ(file->Tensor("threshold")->rank, rank - 1);
      EXPECT_EQ(file->Tensor("support_key_index")->dtype, DType::kInt32);
    }
  }
}

TEST_F(RunTest, PassesEveryOptionOn) {
  AttentionProblem problem;
  problem.query = Add("Q", DType::kFloat32, {2, 4, 11, 8});
  problem.key = Add("K", DType::kFloat32, {2, 2, 19, 8});
  problem.value = Add("V", DType::kFloat32, {2, 2, 19, 6});
  problem.alibi_slopes = AddNumbers("slopes", DType::kFloat32, {0.5, 0.25, 0.0, 0.125}, {4});
  problem.query_scale = AddNumbers("qs", DType::kFloat32, std::vector<double>(88, 1.5), {2, 4, 11});
  std::vector<double> mask(38, 1.0);
  mask[3] = mask[20] = 0.0;
  problem.key_mask = AddNumbers("mask", DType::kUInt8, mask, {2, 19});
  problem.bias = Add("bias", DType::kFloat32, {4, 11, 19});
  problem.key_lengths = AddNumbers("lengths", DType::kInt32, {19, 12}, {2});
  problem.alpha = 2.0;
  problem.scale = 0.75;
  problem.causal = true;
  problem.window_left = 6;
  problem.window_right = 2;
  problem.softcap = 3.0;
  ExpectLikeReference(problem,
                      {"--q",
                       "Q",
                       "--k",
                       "K",
                       "--v",
                       "V",
                       "--alibi",
                       "slopes",
                       "--query-scale",
                       "qs",
                       "--key-mask",
                       "mask",
                       "--bias",
                       "bias",
                       "--key-lengths",
                       "lengths",
                       "--alpha",
                       "2",
                       "--scale",
                       "0.75",
                       "--causal",
                       "--window-left",
                       "6",
                       "--window-right",
                       "2",
                       "--softcap",
                       "3"},
                      1e-5);
}

TEST_F(RunTest, RunsPackedSequences) {
  AttentionProblem problem;
  problem.query = Add("q", DType::kFloat32, {1, 2, 12, 8});
  problem.key = Add("k", DType::kFloat32, {1, 2, 15, 8});
  problem.value = Add("v", DType::kFloat32, {1, 2, 15, 8});
  problem.cu_query = AddNumbers("cq", DType::kInt32, {0, 5, 5, 12}, {4});
  problem.cu_key = AddNumbers("ck", DType::kInt64, {0, 6, 8, 15}, {4});
  problem.causal = true;
  ExpectLikeReference(problem, {"--cu-query", "cq", "--cu-key", "ck", "--causal"}, 1e-5);
}

TEST_F(RunTest, ReportsSoftmax) {
  Add("q", DType::kFloat32, {4, 8});
  Add("k", DType::kFloat32, {6, 8});
  Add("v", DType::kFloat32, {6, 8});
  const nlohmann::json document = RunForJson({"run", Save(), "--alpha", "1"});
  EXPECT_EQ(document["mean_support"], 6.0);
  EXPECT_EQ(document["exact_zero_share"], 0.0);
  EXPECT_TRUE(document["output"].is_null());
}

TEST_F(RunTest, PrintsASummary) {
  Add("q", DType::kFloat32, {40, 8});
  Add("k", DType::kFloat32, {40, 8});
  Add("v", DType::kFloat32, {40, 8});
  const ProgramResult result = RunProgram({"run", Save(), "--causal", "--alpha", "2"});
  EXPECT_EQ(result.exit_code, 0) << result.error;
  EXPECT_EQ(result.error, "");
  for (const char* text :
       {"[1, 1, 40, 8] float32", "engine", "mean support", "exact zeros", "time"}) {
    EXPECT_NE(result.output.find(text), std::string::npos) << text;
  }
}

TEST_F(RunTest, BadInputWritesNothing) {
  Add("q", DType::kFloat32, {2, 3, 8});
  Add("k", DType::kFloat32, {2, 3, 8});
  Add("v", DType::kFloat32, {2, 3, 8});
  Add("odd", DType::kFloat32, {2, 3, 7});
  Add("half", DType::kFloat16, {2, 3, 8});
  Add("vector", DType::kFloat32, {3});
  Add("deep", DType::kFloat32, {1, 1, 2, 3, 8});
  AddNumbers("integers", DType::kInt32, {}, {2, 3, 8});
  const std::string input = Save();
  const std::string output = folder_.File("output");
  const auto expect = [&](std::vector<std::string> flags, const std::string& message) {
    std::vector<std::string> arguments = {"run", input, "--output", output};
    arguments.insert(arguments.end(), flags.begin(), flags.end());
    ExpectBadInput(arguments, message);
  };
  expect({"--q", "x"}, "--q: file '" + input + "': has no tensor 'x'");
  expect({"--bias", "x"}, "--bias: ");
  expect({"--k", "odd"}, "key");
  expect({"--k", "half"}, "key");
  expect({"--q", "vector"}, "--q 'vector': got shape [3]; must be [batch, heads, length, size]");
  expect({"--q", "deep"}, "--q 'deep'");
  expect({"--q", "integers", "--k", "integers", "--v", "integers"}, "query");
  expect({"--alpha", "-0.9"}, "alpha");
  expect({"--alpha", "nan"}, "alpha");
  expect({"--scale", "inf"}, "scale");
  expect({"--window-right", "-1"}, "window_right");
  expect({"--cu-query", "q"}, "--cu-key");
  expect({"--key-mask", "q"}, "key_mask");
  ExpectBadInput({"run", input, "--support"}, "--support: needs --output");
  ExpectBadInput({"run", input, "--output", folder_.File("missing/output")}, "No such file");
  ExpectBadInput({"run", input, "--output", input}, "--output: got the input file");
  ExpectBadInput({"run", input, "--output", folder_.File("")}, "not a regular file");
  EXPECT_EQ(folder_.Count(), 1) << "the input only";
}

TEST_F(RunTest, HostileFilesAreBadInput) {
  const std::string path = folder_.File("hostile");
  ExpectBadInput({"run", path}, "No such file");
  ExpectBadInput({"run", folder_.File("")}, "is a folder");
  WriteAll(path, "");
  ExpectBadInput({"run", path}, "0 bytes are too few");
  WriteAll(path, std::string(8, '\xFF') + "{}");
  ExpectBadInput({"run", path}, "at most 100000000");
  WriteAll(path, std::string("\x7F\0\0\0\0\0\0\0", 8) + "{}");
  ExpectBadInput({"run", path}, "truncated");
}

TEST_F(RunTest, OutputTooLargeForMemory) {
  // No keys and no head size, so that the file is small; the output would have 2^50 numbers.
  AddNumbers("q", DType::kFloat32, {}, {int64_t{1} << 40, 0});
  AddNumbers("k", DType::kFloat32, {}, {0, 0});
  AddNumbers("v", DType::kFloat32, {}, {0, int64_t{1} << 10});
  const ProgramResult result = RunProgram({"run", Save(), "--output", folder_.File("output")});
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_EQ(folder_.Count(), 1);
}

}  // namespace
}  // namespace flash_entmax
