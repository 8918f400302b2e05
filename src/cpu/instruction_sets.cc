#include "cpu/instruction_sets.h"

#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/instruction_sets.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h, which includes this file once for every instruction set.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::cpu {
namespace HWY_NAMESPACE {

int64_t ThisTarget() { return HWY_TARGET; }

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_entmax::cpu {

HWY_EXPORT(ThisTarget);

int64_t CompiledTargets() { return HWY_TARGETS; }

int64_t MachineTargets() {
  // Asked before anything is restricted, and then remembered.
  static const int64_t targets = HWY_SUPPORTED_TARGETS & HWY_TARGETS;
  return targets;
}

const char* TargetNameOf(int64_t target) { return hwy::TargetName(target); }

void AllowTargets(int64_t targets) {
  MachineTargets();
  hwy::SetSupportedTargetsForTest(targets);
}

int64_t ActiveTarget() { return HWY_DYNAMIC_DISPATCH(ThisTarget)(); }

}  // namespace flash_entmax::cpu
#endif  // HWY_ONCE
