#include "flash_entmax/tensor.h"

#include <algorithm>

namespace flash_entmax {
namespace {

template <typename View>
View MakeContiguous(decltype(View::data) data, DType dtype, std::initializer_list<int64_t> shape) {
  View view;
  view.data = data;
  view.dtype = dtype;
  view.rank = static_cast<int>(std::min<size_t>(shape.size(), kMaxRank));
  std::copy_n(shape.begin(), view.rank, view.shape.begin());
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.strides[i] = stride;
    stride *= view.shape[i];
  }
  return view;
}

template <typename View>
int64_t CountElements(const View& view) {
  int64_t count = 1;
  for (int i = 0; i < view.rank; ++i) count *= view.shape[i];
  return count;
}

}  // namespace

int64_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kUInt8:
      return 1;
  }
  return 0;
}

const char* NameOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kUInt8:
      return "uint8";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
  }
  return "an unknown type";
}

bool IsFloating(DType dtype) {
  return dtype == DType::kFloat64 || dtype == DType::kFloat32 || dtype == DType::kBFloat16 ||
         dtype == DType::kFloat16;
}

TensorView TensorView::Contiguous(const void* data, DType dtype,
                                  std::initializer_list<int64_t> shape) {
  return MakeContiguous<TensorView>(data, dtype, shape);
}

int64_t TensorView::num_elements() const { return CountElements(*this); }

MutableTensorView MutableTensorView::Contiguous(void* data, DType dtype,
                                                std::initializer_list<int64_t> shape) {
  return MakeContiguous<MutableTensorView>(data, dtype, shape);
}

int64_t MutableTensorView::num_elements() const { return CountElements(*this); }

std::string ShapeToString(const TensorView& tensor) {
  std::string text = "[";
  for (int i = 0; i < tensor.rank; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(tensor.shape[i]);
  }
  return text + "]";
}

}  // namespace flash_entmax
