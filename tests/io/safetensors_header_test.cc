#include "io/safetensors_header.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>

namespace flash_entmax::io {
namespace {

// What ParseSafetensorsHeader says of a bad header.
std::string ErrorOf(std::string_view text, int64_t data_bytes) {
  const Expected<SafetensorsHeader> header = ParseSafetensorsHeader(text, data_bytes);
  return header.ok() ? "no error" : header.status().message();
}

// One tensor "a" with these fields' JSON.
std::string One(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"a": {"dtype": ")" + dtype + R"(", "shape": )" + shape + R"(, "data_offsets": )" +
         offsets + "}}";
}

TEST(SafetensorsHeader, ReadsEntriesInTheOrderOfTheirData) {
  const auto header = ParseSafetensorsHeader(
      R"({"b":{"dtype":"I64","shape":[],"data_offsets":[24,32]},
          "__metadata__":{"format":"pt","note":"ä"},
          "a":{"shape":[2,3],"data_offsets":[0,24],"dtype":"F32"},
          "e":{"dtype":"F16","shape":[4,0],"data_offsets":[32,32]}}   )",
      32);
  ASSERT_TRUE(header.ok()) << header.status().message();
  ASSERT_EQ(header->tensors.size(), 3u);
  EXPECT_EQ(header->tensors[0].name, "a");
  EXPECT_EQ(header->tensors[0].dtype, DType::kFloat32);
  EXPECT_EQ(header->tensors[0].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(header->tensors[1].name, "b");
  EXPECT_TRUE(header->tensors[1].shape.empty());
  EXPECT_EQ(header->tensors[2].name, "e");
  EXPECT_EQ(header->metadata.at("format"), "pt");
  EXPECT_EQ(header->metadata.at("note"), "ä");
}

TEST(SafetensorsHeader, AcceptsNoTensors) {
  EXPECT_EQ(ErrorOf("{}", 0), "no error");
  EXPECT_EQ(ErrorOf(R"({"__metadata__":{}})", 0), "no error");
}

TEST(SafetensorsHeader, KeepsTypesItDoesNotKnow) {
  const auto header = ParseSafetensorsHeader(
      R"({"a":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[0,3]},
          "b":{"dtype":"Q9","shape":[3],"data_offsets":[3,5]}})",
      5);
  ASSERT_TRUE(header.ok()) << header.status().message();
  EXPECT_FALSE(header->tensors[0].dtype.has_value());
  EXPECT_EQ(header->tensors[1].dtype_name, "Q9");
}

TEST(SafetensorsHeader, RejectsWhatIsNoObject) {
  for (const char* text : {"", " {}", "[]", "3", "null", "\"a\"", "\xEF\xBB\xBF{}"}) {
    EXPECT_NE(ErrorOf(text, 0).find("must be a JSON object"), std::string::npos) << text;
  }
  EXPECT_NE(ErrorOf(R"({"a":3})", 0).find("got a number; must be an object"), std::string::npos);
  EXPECT_NE(ErrorOf(R"({"a":null})", 0).find("got null"), std::string::npos);
  EXPECT_NE(ErrorOf(R"({"a":[]})", 0).find("got a list"), std::string::npos);
}

TEST(SafetensorsHeader, RejectsBrokenJson) {
  for (const char* text : {"{", "{\"a", R"({"a":{"dtype":"F32","shape":[1)", "{}x", "{}{}",
                           "{\"\xFF\":{}}", "{,}", R"({"a":{}})"}) {
    EXPECT_NE(ErrorOf(text, 0), "no error") << text;
  }
  EXPECT_NE(ErrorOf("{\"a", 0).find("not valid JSON near byte"), std::string::npos);
}

TEST(SafetensorsHeader, RejectsDeepNesting) {
  const std::string deep = "{\"a\":" + std::string(1'000'000, '[');
  EXPECT_NE(ErrorOf(deep, 0).find("got a list"), std::string::npos);
  EXPECT_NE(ErrorOf(One("F32", std::string(1'000'000, '['), "[0,4]"), 4).find("got a list"),
            std::string::npos);
  EXPECT_NE(ErrorOf(R"({"__metadata__":{"a":{"b":1}}})", 0).find("got an object"),
            std::string::npos);
}

TEST(SafetensorsHeader, RejectsDuplicates) {
  const std::string entry = R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})";
  EXPECT_EQ(ErrorOf("{\"a\":" + entry + ",\"a\":" + entry + "}", 4), "the name 'a' appears twice");
  // The same name in another spelling.
  EXPECT_EQ(ErrorOf("{\"a\":" + entry + ",\"\\u0061\":" + entry + "}", 4),
            "the name 'a' appears twice");
  EXPECT_NE(ErrorOf(R"({"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4)
                .find("'dtype' appears twice"),
            std::string::npos);
  EXPECT_NE(ErrorOf(R"({"__metadata__":{"k":"1","k":"2"}})", 0).find("appears twice"),
            std::string::npos);
  EXPECT_NE(ErrorOf(R"({"__metadata__":{},"__metadata__":{}})", 0).find("appears twice"),
            std::string::npos);
}

TEST(SafetensorsHeader, RejectsMissingAndUnknownFields) {
  EXPECT_NE(ErrorOf(R"({"a":{"dtype":"F32","shape":[1]}})", 4).find("must have dtype, shape"),
            std::string::npos);
  EXPECT_NE(ErrorOf(R"({"a":{"kind":"F32"}})", 4).find("unknown field 'kind'"), std::string::npos);
}

TEST(SafetensorsHeader, RejectsBadOffsets) {
  EXPECT_NE(ErrorOf(One("F32", "[1]", "[0,4]"), 3).find("outside the file"), std::string::npos);
  EXPECT_NE(ErrorOf(One("F32", "[1]", "[4,0]"), 8).find("the end lies before the begin"),
            std::string::npos);
  EXPECT_NE(ErrorOf(One("F32", "[1]", "[0]"), 4).find("must be two numbers"), std::string::npos);
  EXPECT_NE(ErrorOf(One("F32", "[1]", "[0,4,8]"), 4).find("more than two"), std::string::npos);
  EXPECT_NE(ErrorOf(One("F32", "[1]", "[4,8]"), 8).find("not right after"), std::string::npos);
  EXPECT_NE(ErrorOf(One("F32", "[1]", "[0,4]"), 9).find("holds 9 bytes"), std::string::npos);
  EXPECT_NE(ErrorOf("{}", 1).find("holds 1 bytes"), std::string::npos);
  const char* overlap =
      R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
          "b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})";
  EXPECT_NE(ErrorOf(overlap, 12).find("overlaps"), std::string::npos);
  const char* same =
      R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
          "b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
  EXPECT_NE(ErrorOf(same, 4).find("overlaps"), std::string::npos);
}

TEST(SafetensorsHeader, RejectsBadNumbers) {
  for (const char* number :
       {"-1", "1.0", "1.5", "1e2", "9223372036854775808", "18446744073709551616", "1e400", "-0"}) {
    const std::string list = std::string("[") + number + "]";
    EXPECT_NE(ErrorOf(One("F32", list, "[0,4]"), 4), "no error") << number;
    const std::string offsets = std::string("[0,") + number + "]";
    EXPECT_NE(ErrorOf(One("F32", "[1]", offsets), 4), "no error") << number;
  }
  EXPECT_NE(ErrorOf(One("F32", "[-1]", "[0,4]"), 4).find("got -1; must be whole numbers"),
            std::string::npos);
  EXPECT_NE(ErrorOf(One("F32", "[\"1\"]", "[0,4]"), 4).find("got a text"), std::string::npos);
  EXPECT_NE(ErrorOf(One("F32", "[true]", "[0,4]"), 4).find("got true or false"), std::string::npos);
}

TEST(SafetensorsHeader, RejectsShapesThatDoNotFit) {
  EXPECT_NE(ErrorOf(One("F32", "[2]", "[0,4]"), 4).find("needs 8 bytes"), std::string::npos);
  EXPECT_NE(ErrorOf(One("F64", "[4611686018427387904]", "[0,4]"), 4).find("overflows"),
            std::string::npos);
  // 2^32 · 2^32 · 4 bytes wraps around to nothing in 64 bits.
  EXPECT_NE(ErrorOf(One("F32", "[4294967296,4294967296]", "[0,0]"), 0).find("overflows"),
            std::string::npos);
  EXPECT_NE(ErrorOf(One("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4).find("more than 8 dimensions"),
            std::string::npos);
  EXPECT_EQ(ErrorOf(One("F32", "[9223372036854775807,9223372036854775807,0]", "[0,0]"), 0),
            "no error");
}

TEST(Quoted, IsFitForOneLine) {
  EXPECT_EQ(Quoted("plain"), "'plain'");
  EXPECT_EQ(Quoted("a\nb\x1B[2J"), "'a\\x0ab\\x1b[2J'");
  EXPECT_LT(Quoted(std::string(100'000, 'x')).size(), 100u);
}

}  // namespace
}  // namespace flash_entmax::io
