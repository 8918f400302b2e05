#include "io/safetensors_header.h"

#include <algorithm>
#include <limits>
#include <new>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

namespace flash_entmax::io {
namespace {

constexpr std::string_view kMetadataName = "__metadata__";

// Names longer than this are cut in messages.
constexpr size_t kMaxQuoted = 80;

// Bits per element of every type the format knows, so that shapes can be checked against offsets
// even for those we cannot compute with.
struct FileType {
  std::string_view name;
  int bits;
  std::optional<DType> dtype;
};

constexpr FileType kFileTypes[] = {
    {"F64", 64, DType::kFloat64}, {"F32", 32, DType::kFloat32}, {"BF16", 16, DType::kBFloat16},
    {"F16", 16, DType::kFloat16}, {"U8", 8, DType::kUInt8},     {"BOOL", 8, DType::kUInt8},
    {"I32", 32, DType::kInt32},   {"I64", 64, DType::kInt64},   {"I8", 8, std::nullopt},
    {"I16", 16, std::nullopt},    {"U16", 16, std::nullopt},    {"U32", 32, std::nullopt},
    {"U64", 64, std::nullopt},    {"C64", 64, std::nullopt},    {"F8_E4M3", 8, std::nullopt},
    {"F8_E5M2", 8, std::nullopt}, {"F8_E8M0", 8, std::nullopt}, {"F6_E2M3", 6, std::nullopt},
    {"F6_E3M2", 6, std::nullopt}, {"F4", 4, std::nullopt},
};

const FileType* FindFileType(std::string_view name) {
  for (const FileType& type : kFileTypes) {
    if (type.name == name) return &type;
  }
  return nullptr;
}

// Receives the JSON text piece by piece. The object's shape is fixed, so a small state machine
// checks it as it arrives: nesting is bounded, duplicate names are seen, and nothing throws.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  SafetensorsHeader header;
  std::string error;

  bool null() override { return Unexpected("null"); }
  bool boolean(bool) override { return Unexpected("true or false"); }
  bool number_float(number_float_t, const string_t& text) override {
    return InNumberList() ? Fail(Where() + ": got " + text.substr(0, kMaxQuoted) +
                                 "; must be whole numbers ≥ 0 that fit in 63 bits")
                          : Unexpected("a number");
  }
  bool number_integer(number_integer_t value) override {
    return InNumberList() ? Fail(Where() + ": got " + std::to_string(value) +
                                 "; must be whole numbers ≥ 0 that fit in 63 bits")
                          : Unexpected("a number");
  }
  bool binary(binary_t&) override { return Unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (!InNumberList()) return Unexpected("a number");
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return Fail(Where() + ": got " + std::to_string(value) +
                  "; must be whole numbers ≥ 0 that fit in 63 bits");
    }
    const auto number = static_cast<int64_t>(value);
    if (state_ == State::kShape) {
      if (entry_.shape.size() == static_cast<size_t>(kMaxRank)) {
        return Fail(Where() + ": more than " + std::to_string(kMaxRank) + " dimensions");
      }
      entry_.shape.push_back(number);
    } else {
      if (num_offsets_ == 2) return Fail(Where() + ": more than two numbers");
      (num_offsets_ == 0 ? entry_.begin : entry_.end) = number;
      ++num_offsets_;
    }
    return true;
  }

  bool string(string_t& value) override {
    if (state_ == State::kMetadata) {
      header.metadata[key_] = std::move(value);
      return true;
    }
    if (state_ != State::kEntry || key_ != "dtype") return Unexpected("a text");
    entry_.dtype_name = std::move(value);
    return true;
  }

  bool start_object(size_t) override {
    switch (state_) {
      case State::kStart:
        state_ = State::kNames;
        return true;
      case State::kNames:
        state_ = key_ == kMetadataName ? State::kMetadata : State::kEntry;
        fields_.clear();
        entry_ = SafetensorsEntry();
        entry_.name = key_;
        num_offsets_ = 0;
        return true;
      default:
        return Unexpected("an object");
    }
  }

  bool end_object() override {
    switch (state_) {
      case State::kEntry:
        state_ = State::kNames;
        return FinishEntry();
      case State::kMetadata:
        state_ = State::kNames;
        return true;
      default:
        state_ = State::kEnd;
        return true;
    }
  }

  bool start_array(size_t) override {
    if (state_ == State::kEntry && key_ == "shape") {
      state_ = State::kShape;
    } else if (state_ == State::kEntry && key_ == "data_offsets") {
      state_ = State::kOffsets;
    } else {
      return Unexpected("a list");
    }
    return true;
  }

  bool end_array() override {
    if (state_ == State::kOffsets && num_offsets_ != 2) {
      return Fail(Where() + ": must be two numbers, begin and end");
    }
    state_ = State::kEntry;
    return true;
  }

  bool key(string_t& value) override {
    key_ = std::move(value);
    if (state_ == State::kNames) {
      if (!names_.insert(key_).second) return Fail("the name " + Quoted(key_) + " appears twice");
    } else if (state_ == State::kMetadata) {
      if (header.metadata.contains(key_)) {
        return Fail("__metadata__: the key " + Quoted(key_) + " appears twice");
      }
    } else {
      if (key_ != "dtype" && key_ != "shape" && key_ != "data_offsets") {
        return Fail("tensor " + Quoted(entry_.name) + ": unknown field " + Quoted(key_));
      }
      if (!fields_.insert(key_).second) {
        return Fail("tensor " + Quoted(entry_.name) + ": the field " + Quoted(key_) +
                    " appears twice");
      }
    }
    return true;
  }

  bool parse_error(size_t position, const std::string&, const nlohmann::json::exception&) override {
    return Fail("not valid JSON near byte " + std::to_string(position));
  }

 private:
  enum class State { kStart, kNames, kEntry, kShape, kOffsets, kMetadata, kEnd };

  bool Fail(std::string message) {
    error = std::move(message);
    return false;
  }

  bool InNumberList() const { return state_ == State::kShape || state_ == State::kOffsets; }

  std::string Where() const {
    switch (state_) {
      case State::kStart:
      case State::kEnd:
        return "the header";
      case State::kNames:
        return "entry " + Quoted(key_);
      case State::kMetadata:
        return "__metadata__ key " + Quoted(key_);
      default:
        return "tensor " + Quoted(entry_.name) + ", field " + Quoted(key_);
    }
  }

  bool Unexpected(const char* what) {
    const char* allowed = "a number";
    if (state_ == State::kStart || state_ == State::kNames) allowed = "an object";
    if (state_ == State::kMetadata) allowed = "a text";
    if (state_ == State::kEntry) allowed = key_ == "dtype" ? "a text" : "a list of numbers";
    return Fail(Where() + ": got " + what + "; must be " + allowed);
  }

  bool FinishEntry() {
    if (fields_.size() != 3) {
      return Fail("tensor " + Quoted(entry_.name) + ": must have dtype, shape and data_offsets");
    }
    header.tensors.push_back(std::move(entry_));
    return true;
  }

  State state_ = State::kStart;
  std::string key_;
  std::set<std::string> names_;
  std::set<std::string> fields_;
  SafetensorsEntry entry_;
  int num_offsets_ = 0;
};

// Bytes of a tensor, or nothing if that does not fit in 63 bits or is no whole number of bytes.
std::optional<int64_t> ByteCount(const std::vector<int64_t>& shape, int bits) {
  int64_t total_bits = bits;
  for (const int64_t size : shape) {
    if (__builtin_mul_overflow(total_bits, size, &total_bits)) {
      // A later zero makes the tensor empty, whatever the other sizes are.
      if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
      return std::nullopt;
    }
  }
  if (total_bits % 8 != 0) return std::nullopt;
  return total_bits / 8;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

Status CheckEntry(SafetensorsEntry& entry, int64_t data_bytes) {
  const std::string where = "tensor " + Quoted(entry.name) + ": ";
  const std::string range =
      "data_offsets [" + std::to_string(entry.begin) + ", " + std::to_string(entry.end) + "]";
  if (entry.begin > entry.end) {
    return Status::InvalidArgument(where + range + ": the end lies before the begin");
  }
  if (entry.end > data_bytes) {
    return Status::InvalidArgument(where + range + ": outside the file, which holds " +
                                   std::to_string(data_bytes) + " bytes of data");
  }
  const FileType* type = FindFileType(entry.dtype_name);
  if (type == nullptr) return Status::Ok();  // A type of the future: an error only when asked for.
  entry.dtype = type->dtype;
  const std::optional<int64_t> bytes = ByteCount(entry.shape, type->bits);
  const std::string shape = "shape " + ShapeText(entry.shape) + " of " + entry.dtype_name;
  if (!bytes.has_value()) {
    return Status::InvalidArgument(where + shape + ": the number of bytes overflows or is no " +
                                   "whole number");
  }
  if (*bytes != entry.end - entry.begin) {
    return Status::InvalidArgument(where + shape + " needs " + std::to_string(*bytes) +
                                   " bytes, but " + range + " holds " +
                                   std::to_string(entry.end - entry.begin));
  }
  return Status::Ok();
}

}  // namespace

std::string Quoted(std::string_view text) {
  std::string result = "'";
  for (const char c : text.substr(0, kMaxQuoted)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7F) {
      result += "\\x";
      result += "0123456789abcdef"[byte >> 4];
      result += "0123456789abcdef"[byte & 15];
    } else {
      result += c;
    }
  }
  if (text.size() > kMaxQuoted) result += "…";
  return result + "'";
}

const char* SafetensorsNameOf(DType dtype) {
  for (const FileType& type : kFileTypes) {
    if (type.dtype == dtype) return type.name.data();
  }
  return "";
}

Expected<SafetensorsHeader> ParseSafetensorsHeader(std::string_view text, int64_t data_bytes) {
  if (text.empty() || text.front() != '{') {
    return Status::InvalidArgument("the header must be a JSON object that starts with '{'");
  }
  HeaderReader reader;
  try {
    const bool parsed = nlohmann::json::sax_parse(text.begin(), text.end(), &reader);
    if (!parsed) return Status::InvalidArgument(reader.error);
  } catch (const std::bad_alloc&) {
    // A header may be 100 MB, which need not fit.
    return Status::OutOfMemory("no memory to read a header of " + std::to_string(text.size()) +
                               " bytes");
  }

  std::vector<SafetensorsEntry>& tensors = reader.header.tensors;
  for (SafetensorsEntry& entry : tensors) {
    if (Status status = CheckEntry(entry, data_bytes); !status.ok()) return status;
  }
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  int64_t covered = 0;
  for (const SafetensorsEntry& entry : tensors) {
    if (entry.begin != covered) {
      return Status::InvalidArgument(
          "tensor " + Quoted(entry.name) + ": its data begins at byte " +
          std::to_string(entry.begin) + (entry.begin < covered ? " and overlaps" : ", not right") +
          " after the tensor before it, which ends at byte " + std::to_string(covered));
    }
    covered = entry.end;
  }
  if (covered != data_bytes) {
    return Status::InvalidArgument("the tensors end at byte " + std::to_string(covered) +
                                   " of the data, but the file holds " +
                                   std::to_string(data_bytes) + " bytes of data");
  }
  return std::move(reader.header);
}

}  // namespace flash_entmax::io
