// Arrays that begin at a cache line: a load of a whole vector that crosses lines costs two, which
// takes a third of the register tile's speed.

#ifndef FLASH_ENTMAX_SRC_CPU_ALIGNED_ARRAY_H_
#define FLASH_ENTMAX_SRC_CPU_ALIGNED_ARRAY_H_

#include <cstddef>
#include <memory>
#include <new>
#include <vector>

namespace flash_entmax::cpu {

inline constexpr std::align_val_t kCacheLine{64};

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, kCacheLine); }
};

template <typename T>
using AlignedArray = std::unique_ptr<T[], AlignedDelete>;

// Numbers that are not initialised. May throw std::bad_alloc.
template <typename T>
AlignedArray<T> MakeAligned(size_t count) {
  return AlignedArray<T>(static_cast<T*>(::operator new(count * sizeof(T), kCacheLine)));
}

template <typename T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <typename U>
  explicit AlignedAllocator(const AlignedAllocator<U>& /*other*/) {}
  T* allocate(size_t count) { return MakeAligned<T>(count).release(); }
  void deallocate(T* data, size_t /*count*/) { AlignedDelete()(data); }
  bool operator==(const AlignedAllocator& /*other*/) const { return true; }
};

// A vector of numbers whose first element begins a cache line.
template <typename T>
using AlignedVector = std::vector<T, AlignedAllocator<T>>;

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_ALIGNED_ARRAY_H_
