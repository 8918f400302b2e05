// Arrays that begin at a cache line: a load of a whole vector that crosses lines costs two, which
// takes a third of the register tile's speed. Large ones begin at a large page and ask for such
// pages, since rows that are far apart otherwise need more address translations than a core keeps.

#ifndef FLASH_ENTMAX_SRC_CPU_ALIGNED_ARRAY_H_
#define FLASH_ENTMAX_SRC_CPU_ALIGNED_ARRAY_H_

#include <cstddef>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

namespace flash_entmax::cpu {

// Memory that std::free gives back; null if there is none.
void* AllocateAligned(size_t bytes);

struct AlignedDelete {
  void operator()(void* p) const { std::free(p); }
};

template <typename T>
using AlignedArray = std::unique_ptr<T[], AlignedDelete>;

// Numbers that are not initialised. May throw std::bad_alloc.
template <typename T>
AlignedArray<T> MakeAligned(size_t count) {
  const bool fits = count <= std::numeric_limits<size_t>::max() / 2 / sizeof(T);
  void* const data = fits ? AllocateAligned(count * sizeof(T)) : nullptr;
  if (data == nullptr) throw std::bad_alloc();
  return AlignedArray<T>(static_cast<T*>(data));
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
