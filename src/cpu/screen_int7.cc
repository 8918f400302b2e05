#include "cpu/screen_int7.h"

#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/screen_int7.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h, which includes this file once for every instruction set.
#include "cpu/screen_int7-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

// Highway's tables hold plain functions.
bool HasInt7() { return kScreensInt7; }
bool Queries(const float* query, size_t stride, size_t depth, uint8_t* rounded, ScreenRows* rows) {
  return RoundQueriesInt7Impl(query, stride, depth, rounded, rows);
}
void Keys(const float* block, size_t depth, uint8_t* rounded, KeyBlockBound* bound) {
  RoundKeysInt7Impl(block, depth, rounded, bound);
}
void OneTile(const ScreenRows& rows, const uint8_t* query, const KeyBlockBound& bound,
             const uint8_t* keys, size_t depth, const float* limit, float slack, uint32_t tag,
             ScreenHits* hits) {
  ScreenTileInt7Impl(rows, query, bound, keys, depth, limit, slack, tag, hits);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_entmax::cpu {

HWY_EXPORT(HasInt7);
HWY_EXPORT(Queries);
HWY_EXPORT(Keys);
HWY_EXPORT(OneTile);

bool CanScreenInt7() { return HWY_DYNAMIC_DISPATCH(HasInt7)(); }
bool RoundQueriesInt7(const float* query, size_t stride, size_t depth, uint8_t* rounded,
                      ScreenRows* rows) {
  return HWY_DYNAMIC_DISPATCH(Queries)(query, stride, depth, rounded, rows);
}
void RoundKeysInt7(const float* block, size_t depth, uint8_t* rounded, KeyBlockBound* bound) {
  HWY_DYNAMIC_DISPATCH(Keys)(block, depth, rounded, bound);
}
void ScreenTileInt7(const ScreenRows& rows, const uint8_t* query, const KeyBlockBound& bound,
                    const uint8_t* keys, size_t depth, const float* limit, float slack,
                    uint32_t tag, ScreenHits* hits) {
  HWY_DYNAMIC_DISPATCH(OneTile)(rows, query, bound, keys, depth, limit, slack, tag, hits);
}

}  // namespace flash_entmax::cpu
#endif  // HWY_ONCE
