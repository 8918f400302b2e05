// Selected lanes move to the beginning of a vector in their order, for every selection, type and
// vector size that the engine uses.

#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/compress_test.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h, which includes this file once for every instruction set.
#include "cpu/compress-inl.h"
#include "hwy/highway.h"

#ifndef FLASH_ENTMAX_TESTS_CPU_COMPRESS_TEST_CC_
#define FLASH_ENTMAX_TESTS_CPU_COMPRESS_TEST_CC_
#include <cstdint>
#include <string>
#include <vector>

// What one selection gave, in double, which holds every lane.
struct Selection {
  std::string type;
  uint32_t bits = 0;
  std::vector<double> lanes;
  std::vector<double> by_bits;
  std::vector<double> by_mask;
};
#endif

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

template <class D>
void SelectLanes(D d, const char* type, std::vector<Selection>* selections) {
  using T = hn::TFromD<D>;
  const size_t lanes = hn::Lanes(d);
  HWY_ALIGN T in[HWY_MAX_BYTES / sizeof(T)];
  HWY_ALIGN T out[HWY_MAX_BYTES / sizeof(T)];
  for (size_t i = 0; i < lanes; ++i) in[i] = static_cast<T>(7 * i) - static_cast<T>(20);
  for (uint32_t bits = 0; bits < uint32_t{1} << lanes; ++bits) {
    Selection selection{type, bits, std::vector<double>(in, in + lanes), {}, {}};
    hn::Store(CompressBits(d, hn::Load(d, in), bits), d, out);
    selection.by_bits.assign(out, out + lanes);
    uint8_t bytes[8] = {};
    hwy::CopyBytes<sizeof(bits)>(&bits, bytes);
    hn::Store(CompressLanes(d, hn::Load(d, in), hn::LoadMaskBits(d, bytes)), d, out);
    selection.by_mask.assign(out, out + lanes);
    selections->push_back(selection);
  }
}

void SelectAll(std::vector<Selection>* selections) {
  const hn::ScalableTag<double> d;
  SelectLanes(hn::ScalableTag<float>(), "float", selections);
  SelectLanes(hn::ScalableTag<int32_t>(), "int32", selections);
  SelectLanes(d, "double", selections);
  // As many as a vector has doubles.
  SelectLanes(hn::Rebind<float, decltype(d)>(), "float, half a vector", selections);
  SelectLanes(hn::Rebind<int32_t, decltype(d)>(), "int32, half a vector", selections);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include <gtest/gtest.h>

namespace flash_entmax::cpu {

HWY_EXPORT(SelectAll);

namespace {

TEST(Compress, EverySelection) {
  std::vector<Selection> selections;
  HWY_DYNAMIC_DISPATCH(SelectAll)(&selections);
  ASSERT_FALSE(selections.empty());
  for (const Selection& selection : selections) {
    SCOPED_TRACE(selection.type + ", bits " + std::to_string(selection.bits));
    size_t place = 0;
    for (size_t i = 0; i < selection.lanes.size(); ++i) {
      if ((selection.bits >> i & 1) == 0) continue;
      ASSERT_EQ(selection.by_bits[place], selection.lanes[i]);
      ASSERT_EQ(selection.by_mask[place], selection.lanes[i]);
      ++place;
    }
  }
}

}  // namespace
}  // namespace flash_entmax::cpu

#endif  // HWY_ONCE
