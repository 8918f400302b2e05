// PyTorch tensors as the library's views, and its errors as exceptions that Python understands.
//
// Only the stable part of LibTorch's ABI is used (torch/csrc/stable), so that one binary serves
// every PyTorch from 2.10 on and every version of Python.

#ifndef FLASH_ENTMAX_PYTHON_TENSORS_H_
#define FLASH_ENTMAX_PYTHON_TENSORS_H_

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>

#include "flash_entmax/status.h"
#include "flash_entmax/tensor.h"

namespace flash_entmax::python {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Exceptions keep nothing but their text on the way through PyTorch, so that the text begins with
// the name of the one that Python is to raise (see `translated` in _library.py).
[[noreturn]] void ThrowValueError(const std::string& message);
// Returns if the status is ok.
void ThrowIfError(const Status& status);

// A view of the tensor's memory. A ValueError if the tensor is not on a device of
// the kind that `cuda` names, has more than eight dimensions or a type that the library lacks
// (bool counts as uint8). Tensors without elements get a pointer that is not null, because a null
// pointer means "not given".
TensorView View(const std::string& name, const Tensor& tensor, bool cuda = false);
MutableTensorView MutableView(const std::string& name, const Tensor& tensor, bool cuda = false);

// An empty view if there is no tensor.
TensorView View(const std::string& name, const std::optional<Tensor>& tensor, bool cuda = false);

// A ValueError unless both are on one device. Kernels cannot read memory of another.
void CheckSameDevice(const std::string& name, const Tensor& tensor, const Tensor& query);

// A new row-major tensor without values on the device of `like`.
Tensor Empty(const Tensor& like, std::span<const int64_t> shape, ScalarType type);
inline Tensor Empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return Empty(like, std::span<const int64_t>(shape.begin(), shape.size()), type);
}
// A new tensor of the type, shape and memory order of `like`, as torch.empty_like makes it.
Tensor EmptyLike(const Tensor& like);

// Type of thresholds and of gradients of single numbers: float64 for float64, else float32.
ScalarType StatisticsType(const Tensor& tensor);

}  // namespace flash_entmax::python

#endif  // FLASH_ENTMAX_PYTHON_TENSORS_H_
