#include "io/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "io/atomic_file.h"

namespace flash_entmax::io {
namespace {

static_assert(std::endian::native == std::endian::little,
              "The format is little endian; a big-endian machine would have to swap bytes.");

constexpr size_t kLengthBytes = 8;

// The format's own limit; it keeps a hostile length from costing memory.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;

// Rows of strided tensors are gathered into a buffer of this size before they are written.
constexpr size_t kGatherBytes = size_t{1} << 16;

Status FileError(const std::string& name, const std::string& message) {
  return Status::InvalidArgument("file '" + name + "': " + message);
}

bool IsContiguous(const TensorView& tensor) {
  int64_t step = 1;
  for (int i = tensor.rank - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != step) return false;
    step *= tensor.shape[i];
  }
  return true;
}

// Appends the elements in row-major order.
Status WriteData(const TensorView& tensor, AtomicFile& file) {
  const auto element = static_cast<size_t>(SizeOf(tensor.dtype));
  const auto* data = static_cast<const std::byte*>(tensor.data);
  const int64_t count = tensor.num_elements();
  if (count == 0) return Status::Ok();
  if (IsContiguous(tensor)) return file.Write(data, static_cast<size_t>(count) * element);

  std::vector<std::byte> buffer(kGatherBytes);
  std::array<int64_t, kMaxRank> index{};
  int64_t offset = 0;
  size_t filled = 0;
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(&buffer[filled], data + offset * static_cast<int64_t>(element), element);
    filled += element;
    if (filled == buffer.size()) {
      if (Status status = file.Write(buffer.data(), filled); !status.ok()) return status;
      filled = 0;
    }
    for (int dim = tensor.rank - 1; dim >= 0; --dim) {
      offset += tensor.strides[dim];
      if (++index[dim] < tensor.shape[dim]) break;
      offset -= tensor.strides[dim] * tensor.shape[dim];
      index[dim] = 0;
    }
  }
  return file.Write(buffer.data(), filled);
}

Status CheckNames(const std::vector<NamedTensor>& tensors) {
  std::set<std::string_view> names;
  for (const NamedTensor& named : tensors) {
    if (named.name.empty() || named.name == "__metadata__") {
      return Status::InvalidArgument("tensor name " + Quoted(named.name) +
                                     ": must not be empty or __metadata__");
    }
    if (!names.insert(named.name).second) {
      return Status::InvalidArgument("tensor name " + Quoted(named.name) + ": given twice");
    }
  }
  return Status::Ok();
}

}  // namespace

Expected<SafetensorsFile> SafetensorsFile::FromMemory(const std::byte* data, size_t size,
                                                      const std::string& name) {
  if (size < kLengthBytes) {
    return FileError(name, "no safetensors file: " + std::to_string(size) +
                               " bytes are too few for the header length");
  }
  uint64_t length = 0;
  std::memcpy(&length, data, kLengthBytes);
  const size_t rest = size - kLengthBytes;
  if (length > kMaxHeaderBytes) {
    return FileError(name, "no safetensors file: header of " + std::to_string(length) +
                               " bytes; at most " + std::to_string(kMaxHeaderBytes) +
                               " are allowed");
  }
  if (length > rest) {
    return FileError(name, "truncated, or no safetensors file: header of " +
                               std::to_string(length) + " bytes, but only " + std::to_string(rest) +
                               " follow its length");
  }
  const std::string_view text(reinterpret_cast<const char*>(data) + kLengthBytes, length);
  Expected<SafetensorsHeader> header =
      ParseSafetensorsHeader(text, static_cast<int64_t>(rest - length));
  if (!header.ok()) return FileError(name, header.status().message());
  SafetensorsFile result;
  result.name_ = name;
  result.data_ = data + kLengthBytes + length;
  result.header_ = std::move(header).value();
  return result;
}

Expected<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  Expected<MappedFile> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  Expected<SafetensorsFile> result = FromMemory(file->data(), file->size(), path);
  if (result.ok()) result->file_ = std::move(file).value();
  return result;
}

Expected<TensorView> SafetensorsFile::Tensor(std::string_view name) {
  const auto entry = std::find_if(header_.tensors.begin(), header_.tensors.end(),
                                  [name](const auto& e) { return e.name == name; });
  if (entry == header_.tensors.end()) {
    // A few names help with a typing error; thousands do not.
    constexpr size_t kMaxListed = 10;
    std::string present;
    for (size_t i = 0; i < std::min(header_.tensors.size(), kMaxListed); ++i) {
      present += (i == 0 ? " " : ", ") + Quoted(header_.tensors[i].name);
    }
    if (header_.tensors.size() > kMaxListed) present += ", …";
    return FileError(name_, "has no tensor " + Quoted(name) + "; it has" +
                                (present.empty() ? " none" : present));
  }
  if (!entry->dtype.has_value()) {
    return Status::Unimplemented("file '" + name_ + "': tensor " + Quoted(name) + " has type " +
                                 Quoted(entry->dtype_name) +
                                 "; must be F64, F32, BF16, F16, U8, BOOL, I32 or I64");
  }
  const std::byte* data = data_ + entry->begin;
  const int64_t alignment = SizeOf(*entry->dtype);
  if (reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(alignment) != 0) {
    std::unique_ptr<std::byte[]>& copy =
        copies_[static_cast<size_t>(entry - header_.tensors.begin())];
    const auto bytes = static_cast<size_t>(entry->end - entry->begin);
    if (copy == nullptr) {
      // new aligns for every fundamental type; one byte keeps the pointer of empty tensors valid.
      copy.reset(new (std::nothrow) std::byte[std::max<size_t>(bytes, 1)]);
      if (copy == nullptr) {
        return Status::OutOfMemory("file '" + name_ + "': tensor " + Quoted(name) +
                                   ": cannot allocate " + std::to_string(bytes) + " bytes");
      }
      std::memcpy(copy.get(), data, bytes);
    }
    data = copy.get();
  }
  TensorView view;
  view.data = data;
  view.dtype = *entry->dtype;
  view.rank = static_cast<int>(entry->shape.size());
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = entry->shape[i];
    view.strides[i] = stride;
    // An empty tensor may have other sizes whose product overflows; its strides are never used.
    if (__builtin_mul_overflow(stride, entry->shape[i], &stride)) stride = 0;
  }
  return view;
}

Status WriteSafetensors(const std::string& path, const std::vector<NamedTensor>& tensors,
                        const std::map<std::string, std::string>& metadata) {
  if (Status status = CheckNames(tensors); !status.ok()) return status;
  std::vector<const NamedTensor*> ordered;
  ordered.reserve(tensors.size());
  for (const NamedTensor& named : tensors) ordered.push_back(&named);
  std::stable_sort(ordered.begin(), ordered.end(), [](const auto* a, const auto* b) {
    return SizeOf(a->tensor.dtype) > SizeOf(b->tensor.dtype);
  });

  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t end = 0;
  for (const NamedTensor* named : ordered) {
    const TensorView& tensor = named->tensor;
    const int64_t begin = end;
    end += tensor.num_elements() * SizeOf(tensor.dtype);
    nlohmann::ordered_json shape = nlohmann::ordered_json::array();
    for (int i = 0; i < tensor.rank; ++i) shape.push_back(tensor.shape[i]);
    header[named->name] = {{"dtype", SafetensorsNameOf(tensor.dtype)},
                           {"shape", std::move(shape)},
                           {"data_offsets", {begin, end}}};
  }
  // Names that are not UTF-8 get replacement characters rather than an exception.
  std::string text = header.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  while (text.size() % kLengthBytes != 0) text += ' ';
  if (text.size() > kMaxHeaderBytes) {
    return Status::InvalidArgument("the header needs " + std::to_string(text.size()) +
                                   " bytes; at most " + std::to_string(kMaxHeaderBytes) +
                                   " are allowed");
  }

  Expected<AtomicFile> file = AtomicFile::Create(path);
  if (!file.ok()) return file.status();
  const uint64_t length = text.size();
  if (Status status = file->Write(&length, kLengthBytes); !status.ok()) return status;
  if (Status status = file->Write(text); !status.ok()) return status;
  for (const NamedTensor* named : ordered) {
    if (Status status = WriteData(named->tensor, *file); !status.ok()) return status;
  }
  return file->Commit();
}

}  // namespace flash_entmax::io
