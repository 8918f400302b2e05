#include "owned_tensor.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <limits>

#include "output.h"

namespace flash_entmax::cli {
namespace {

// Cache lines, and the widest vectors of any instruction set.
constexpr size_t kAlignment = 64;

}  // namespace

void OwnedTensor::Free::operator()(void* memory) const { std::free(memory); }

MutableTensorView RowMajor(void* data, DType dtype, const std::vector<int64_t>& shape) {
  MutableTensorView view;
  view.data = data;
  view.dtype = dtype;
  view.rank = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = shape[static_cast<size_t>(i)];
    view.strides[i] = stride;
    // Only an empty tensor can overflow here, and its strides are never used.
    if (__builtin_mul_overflow(stride, view.shape[i], &stride)) stride = 0;
  }
  return view;
}

TensorView RowMajor(const void* data, DType dtype, const std::vector<int64_t>& shape) {
  return RowMajor(const_cast<void*>(data), dtype, shape).view();
}

Status CheckMemory(const std::string& name, int64_t bytes) {
  const int64_t memory =
      static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<int64_t>(sysconf(_SC_PAGESIZE));
  // Linux promises more memory than there is and ends the process later, so ask before.
  if (memory > 0 && bytes > memory) {
    return Status::OutOfMemory(fmt::format("{}: needs {}, more than this machine's memory of {}",
                                           name, FormatBytes(bytes), FormatBytes(memory)));
  }
  return Status::Ok();
}

Expected<OwnedTensor> OwnedTensor::Allocate(const std::string& name, DType dtype,
                                            const std::vector<int64_t>& shape) {
  int64_t bytes = SizeOf(dtype);
  for (const int64_t size : shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) {
      return Status::OutOfMemory(fmt::format("{}: shape {} has more bytes than 63 bits can count",
                                             name, FormatShape(shape)));
    }
  }
  if (Status status = CheckMemory(name, bytes); !status.ok()) return status;
  const size_t rounded = (static_cast<size_t>(bytes) + kAlignment) / kAlignment * kAlignment;
  OwnedTensor tensor;
  tensor.memory_.reset(std::aligned_alloc(kAlignment, rounded));
  if (tensor.memory_ == nullptr) {
    return Status::OutOfMemory(fmt::format("{}: cannot allocate {}", name, FormatBytes(bytes)));
  }
  tensor.view_ = RowMajor(tensor.memory_.get(), dtype, shape);
  return tensor;
}

}  // namespace flash_entmax::cli
