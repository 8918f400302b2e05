#include "tensors.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <vector>

namespace flash_entmax::python {
namespace {

// What views of tensors without elements point to.
alignas(256) char no_elements[256];

DType TypeOf(const std::string& name, ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Byte:
    case ScalarType::Bool:
      return DType::kUInt8;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    default:
      ThrowValueError(name +
                      ": got a tensor of a type that is not supported; must be "
                      "float64, float32, bfloat16, float16, bool, uint8, int32 or "
                      "int64");
  }
}

}  // namespace

void ThrowValueError(const std::string& message) {
  throw std::runtime_error("ValueError: " + message);
}

void ThrowIfError(const Status& status) {
  std::string message = status.message();
  // The two forms of α are one argument in Python.
  for (const std::string name : {"alpha_per_head", "alpha_per_row"}) {
    if (message.rfind(name, 0) == 0) message.replace(0, name.size(), "alpha");
  }
  switch (status.code()) {
    case StatusCode::kOk:
      return;
    case StatusCode::kInvalidArgument:
      ThrowValueError(message);
    case StatusCode::kOutOfMemory:
      throw std::runtime_error("MemoryError: " + message);
    case StatusCode::kUnimplemented:
      throw std::runtime_error("NotImplementedError: " + message);
    default:
      throw std::runtime_error(message);
  }
}

MutableTensorView MutableView(const std::string& name, const Tensor& tensor, bool cuda) {
  if (cuda ? !tensor.is_cuda() : !tensor.is_cpu()) {
    ThrowValueError(name + ": got a tensor on another device; must be on " +
                    (cuda ? "the CUDA device of query" : "the CPU, as query is"));
  }
  MutableTensorView view;
  view.dtype = TypeOf(name, tensor.scalar_type());
  view.rank = static_cast<int>(tensor.dim());
  if (view.rank > kMaxRank) {
    ThrowValueError(name + ": got " + std::to_string(view.rank) +
                    " dimensions; must have at most " + std::to_string(kMaxRank));
  }
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  std::copy(sizes.begin(), sizes.end(), view.shape.begin());
  std::copy(strides.begin(), strides.end(), view.strides.begin());
  view.data = tensor.numel() == 0 ? no_elements : tensor.data_ptr();
  return view;
}

TensorView View(const std::string& name, const Tensor& tensor, bool cuda) {
  return MutableView(name, tensor, cuda).view();
}

TensorView View(const std::string& name, const std::optional<Tensor>& tensor, bool cuda) {
  return tensor ? View(name, *tensor, cuda) : TensorView{};
}

void CheckSameDevice(const std::string& name, const Tensor& tensor, const Tensor& query) {
  if (tensor.is_cuda() == query.is_cuda() &&
      tensor.get_device_index() == query.get_device_index()) {
    return;
  }
  ThrowValueError(name + ": got a tensor on another device; must be on that of query");
}

Tensor Empty(const Tensor& like, std::span<const int64_t> shape, ScalarType type) {
  // The C function: calls of operators by name cost a microsecond each.
  std::array<int64_t, kMaxRank> strides{};
  if (shape.size() > strides.size()) ThrowValueError("a tensor has too many dimensions");
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(shape[i], 1);
  }
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  strides.data(), dtype, device_type,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor EmptyLike(const Tensor& like) {
  if (!like.is_contiguous() || like.dim() > kMaxRank) return torch::stable::empty_like(like);
  const auto sizes = like.sizes();
  return Empty(like, std::span<const int64_t>(sizes.data(), sizes.size()), like.scalar_type());
}

ScalarType StatisticsType(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace flash_entmax::python
