// Tensors that own their memory, allocated with an error instead of an exception.

#ifndef FLASH_ENTMAX_TOOLS_OWNED_TENSOR_H_
#define FLASH_ENTMAX_TOOLS_OWNED_TENSOR_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "flash_entmax/status.h"
#include "flash_entmax/tensor.h"

namespace flash_entmax::cli {

// Row-major. Moving keeps views valid.
class OwnedTensor {
 public:
  OwnedTensor() = default;  // Empty: view() is "not given".

  // `name` stands for the tensor in the error: kOutOfMemory, also when the tensor would fit into
  // the address space but not into this machine's memory.
  static Expected<OwnedTensor> Allocate(const std::string& name, DType dtype,
                                        const std::vector<int64_t>& shape);

  const MutableTensorView& mutable_view() const { return view_; }
  TensorView view() const { return view_.view(); }

 private:
  struct Free {
    void operator()(void* memory) const;
  };
  std::unique_ptr<void, Free> memory_;
  MutableTensorView view_;
};

// An error if `bytes` more than this machine's memory are needed; `name` says by what.
Status CheckMemory(const std::string& name, int64_t bytes);

// The row-major view of `shape` over `data`.
MutableTensorView RowMajor(void* data, DType dtype, const std::vector<int64_t>& shape);

// The same over read-only memory.
TensorView RowMajor(const void* data, DType dtype, const std::vector<int64_t>& shape);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_OWNED_TENSOR_H_
