#include "io/safetensors.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "io/temporary_folder.h"
#include "math/element.h"

namespace flash_entmax::io {
namespace {

constexpr DType kAllTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16,
                               DType::kUInt8,   DType::kInt32,   DType::kInt64};

// A whole file's bytes.
std::string FileOf(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string file(sizeof(length), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  return file + header + data;
}

std::string ErrorOf(const std::string& contents) {
  const TemporaryFolder folder;
  WriteAll(folder.File("a.safetensors"), contents);
  const Expected<SafetensorsFile> file = SafetensorsFile::Open(folder.File("a.safetensors"));
  return file.ok() ? "no error" : file.status().message();
}

TEST(Safetensors, RoundTripsEveryType) {
  const TemporaryFolder folder;
  for (const DType dtype : kAllTypes) {
    std::vector<int64_t> memory(6);
    const auto tensor = MutableTensorView::Contiguous(memory.data(), dtype, {2, 3});
    for (int64_t i = 0; i < 6; ++i) WriteElement(tensor, i, static_cast<double>(i * 5));
    const std::string path = folder.File(NameOf(dtype));
    const Status status = WriteSafetensors(path, {{"x", tensor.view()}}, {{"made", "by test"}});
    ASSERT_TRUE(status.ok()) << status.message();
    auto file = SafetensorsFile::Open(path);
    ASSERT_TRUE(file.ok()) << file.status().message();
    EXPECT_EQ(file->metadata().at("made"), "by test");
    const Expected<TensorView> read = file->Tensor("x");
    ASSERT_TRUE(read.ok()) << read.status().message();
    EXPECT_EQ(read->dtype, dtype);
    ASSERT_EQ(ShapeToString(*read), "[2, 3]");
    for (int64_t i = 0; i < 6; ++i) {
      EXPECT_EQ(ReadElement(*read, i), static_cast<double>(i * 5)) << NameOf(dtype);
    }
  }
}

TEST(Safetensors, RoundTripsManyTensorsOfAllRanks) {
  const TemporaryFolder folder;
  const std::vector<uint8_t> bytes = {1, 2, 3};
  const std::vector<float> floats = {1.5f, -2.0f, 0.25f, 8.0f};
  const std::vector<double> doubles = {3.0, 4.0};
  const std::vector<NamedTensor> tensors = {
      {"bytes", TensorView::Contiguous(bytes.data(), DType::kUInt8, {3})},
      {"deep", TensorView::Contiguous(floats.data(), DType::kFloat32, {1, 1, 2, 1, 1, 2, 1, 1})},
      {"scalar", TensorView::Contiguous(floats.data(), DType::kFloat32, {})},
      {"empty", TensorView::Contiguous(floats.data(), DType::kFloat16, {2, 0, 3})},
      {"doubles \"quoted\"", TensorView::Contiguous(doubles.data(), DType::kFloat64, {2})}};
  const std::string path = folder.File("a");
  ASSERT_TRUE(WriteSafetensors(path, tensors).ok());
  auto opened = SafetensorsFile::Open(path);
  ASSERT_TRUE(opened.ok()) << opened.status().message();
  SafetensorsFile file = std::move(opened).value();
  EXPECT_EQ(file.tensors().size(), tensors.size());
  for (const NamedTensor& expected : tensors) {
    const Expected<TensorView> read = file.Tensor(expected.name);
    ASSERT_TRUE(read.ok()) << read.status().message();
    EXPECT_TRUE(*read) << "even an empty tensor was given";
    EXPECT_EQ(ShapeToString(*read), ShapeToString(expected.tensor));
    for (int64_t i = 0; i < read->num_elements(); ++i) {
      EXPECT_EQ(ReadElement(*read, i), ReadElement(expected.tensor, i));
    }
  }
}

TEST(Safetensors, WritesStridedViewsInRowMajorOrder) {
  const TemporaryFolder folder;
  constexpr int64_t kRows = 300;
  constexpr int64_t kColumns = 100;  // More bytes than the gather buffer holds.
  std::vector<float> memory(kRows * kColumns);
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<float>(i);
  TensorView transposed = TensorView::Contiguous(memory.data(), DType::kFloat32, {kColumns, kRows});
  transposed.strides[0] = 1;
  transposed.strides[1] = kColumns;
  TensorView reversed = TensorView::Contiguous(memory.data() + 4, DType::kFloat32, {5});
  reversed.strides[0] = -1;
  const std::string path = folder.File("a");
  ASSERT_TRUE(WriteSafetensors(path, {{"t", transposed}, {"r", reversed}}).ok());
  auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status().message();
  const auto* t = static_cast<const float*>(file->Tensor("t")->data);
  for (int64_t column = 0; column < kColumns; ++column) {
    for (int64_t row = 0; row < kRows; ++row) {
      ASSERT_EQ(t[column * kRows + row], memory[static_cast<size_t>(row * kColumns + column)]);
    }
  }
  const auto* r = static_cast<const float*>(file->Tensor("r")->data);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(r[i], static_cast<float>(4 - i));
}

TEST(Safetensors, CopiesDataThatIsNotAligned) {
  // One byte of padding before the doubles; header lengths that move the data by every remainder.
  for (int padding = 0; padding < 8; ++padding) {
    const std::string header = R"({"pad":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]},)"
                               R"("x":{"dtype":"F64","shape":[2],"data_offsets":[1,17]}})" +
                               std::string(static_cast<size_t>(padding), ' ');
    const double values[2] = {1.25, -7.0};
    std::string data(17, '\1');
    std::memcpy(&data[1], values, sizeof(values));
    const TemporaryFolder folder;
    WriteAll(folder.File("a"), FileOf(header, data));
    auto file = SafetensorsFile::Open(folder.File("a"));
    ASSERT_TRUE(file.ok()) << file.status().message();
    const Expected<TensorView> x = file->Tensor("x");
    ASSERT_TRUE(x.ok());
    EXPECT_EQ(reinterpret_cast<uintptr_t>(x->data) % alignof(double), 0u);
    EXPECT_EQ(static_cast<const double*>(x->data)[0], 1.25);
    EXPECT_EQ(static_cast<const double*>(x->data)[1], -7.0);
    EXPECT_EQ(file->Tensor("x")->data, x->data) << "one copy only";
    EXPECT_EQ(file->Tensor("pad")->dtype, DType::kUInt8);
  }
}

TEST(Safetensors, SaysWhatIsThereWhenANameIsNot) {
  const TemporaryFolder folder;
  WriteAll(folder.File("a"),
           FileOf(R"({"x":{"dtype":"F8_E5M2","shape":[1],"data_offsets":[0,1]}})", "\1"));
  auto file = SafetensorsFile::Open(folder.File("a"));
  ASSERT_TRUE(file.ok()) << file.status().message();
  const Status missing = file->Tensor("q").status();
  EXPECT_EQ(missing.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(missing.message().find("has no tensor 'q'; it has 'x'"), std::string::npos)
      << missing.message();
  EXPECT_EQ(file->Tensor("x").status().code(), StatusCode::kUnimplemented);
}

TEST(Safetensors, RejectsFilesThatAreTooShort) {
  EXPECT_NE(ErrorOf("").find("0 bytes are too few"), std::string::npos);
  EXPECT_NE(ErrorOf("1234567").find("7 bytes are too few"), std::string::npos);
  const std::string whole =
      FileOf(R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", "12345678");
  EXPECT_EQ(ErrorOf(whole), "no error");
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_NE(ErrorOf(whole.substr(0, size)), "no error") << size;
  }
  EXPECT_NE(ErrorOf(whole + "x"), "no error");
}

TEST(Safetensors, RejectsHostileHeaderLengths) {
  const auto with_length = [](uint64_t length) {
    std::string file = FileOf("{}", "");
    std::memcpy(file.data(), &length, sizeof(length));
    return ErrorOf(file);
  };
  EXPECT_EQ(with_length(2), "no error");
  EXPECT_NE(with_length(3).find("truncated"), std::string::npos);
  EXPECT_NE(with_length(100'000'000).find("truncated"), std::string::npos);
  EXPECT_NE(with_length(100'000'001).find("at most 100000000"), std::string::npos);
  EXPECT_NE(with_length(~uint64_t{0}).find("at most"), std::string::npos);
  EXPECT_NE(with_length(~uint64_t{0} - 7).find("at most"), std::string::npos);
  EXPECT_NE(with_length(0).find("JSON object"), std::string::npos);
}

TEST(Safetensors, RejectsWhatIsNoReadableFile) {
  const TemporaryFolder folder;
  const auto error_of = [](const std::string& path) {
    return SafetensorsFile::Open(path).status();
  };
  EXPECT_EQ(error_of(folder.File("missing")).code(), StatusCode::kIo);
  EXPECT_NE(error_of(folder.File("missing")).message().find("No such file"), std::string::npos);
  EXPECT_NE(error_of(folder.File("")).message().find("is a folder"), std::string::npos);
  ASSERT_EQ(mkfifo(folder.File("pipe").c_str(), 0600), 0);
  EXPECT_NE(error_of(folder.File("pipe")).message().find("not a regular file"), std::string::npos);
}

TEST(Safetensors, RejectsFilesWithoutPermission) {
  const TemporaryFolder folder;
  WriteAll(folder.File("secret"), FileOf("{}", ""));
  ASSERT_EQ(chmod(folder.File("").c_str(), 0755), 0);
  ASSERT_EQ(chmod(folder.File("secret").c_str(), 0), 0);
  // The superuser can read every file, so the question is asked by a child that is nobody.
  const pid_t child = fork();
  if (child == 0) {
    constexpr uid_t kNobody = 65534;
    if (geteuid() == 0 && setuid(kNobody) != 0) _exit(2);
    const Status status = SafetensorsFile::Open(folder.File("secret")).status();
    const bool expected = status.code() == StatusCode::kIo &&
                          status.message().find("Permission denied") != std::string::npos;
    _exit(expected ? 0 : 1);
  }
  int state = 0;
  ASSERT_EQ(waitpid(child, &state, 0), child);
  EXPECT_TRUE(WIFEXITED(state) && WEXITSTATUS(state) == 0);
}

TEST(Safetensors, WriterRejectsBadNames) {
  const TemporaryFolder folder;
  const float x = 1.0f;
  const TensorView view = TensorView::Contiguous(&x, DType::kFloat32, {1});
  EXPECT_FALSE(WriteSafetensors(folder.File("a"), {{"x", view}, {"x", view}}).ok());
  EXPECT_FALSE(WriteSafetensors(folder.File("a"), {{"__metadata__", view}}).ok());
  EXPECT_FALSE(WriteSafetensors(folder.File("a"), {{"", view}}).ok());
  EXPECT_FALSE(WriteSafetensors(folder.File("b/a"), {{"x", view}}).ok());
  EXPECT_EQ(folder.Count(), 0);
}

TEST(Safetensors, WriterReplacesWhatIsBeingRead) {
  const TemporaryFolder folder;
  const float one = 1.0f;
  const float two = 2.0f;
  const std::string path = folder.File("a");
  ASSERT_TRUE(
      WriteSafetensors(path, {{"x", TensorView::Contiguous(&one, DType::kFloat32, {1})}}).ok());
  auto before = SafetensorsFile::Open(path);
  ASSERT_TRUE(before.ok());
  ASSERT_TRUE(
      WriteSafetensors(path, {{"x", TensorView::Contiguous(&two, DType::kFloat32, {1})}}).ok());
  EXPECT_EQ(*static_cast<const float*>(before->Tensor("x")->data), 1.0f);
  EXPECT_EQ(*static_cast<const float*>(SafetensorsFile::Open(path)->Tensor("x")->data), 2.0f);
}

}  // namespace
}  // namespace flash_entmax::io
