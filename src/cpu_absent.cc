// The functions of the CPU engine in a build without it: each says so.

#include <string>
#include <string_view>
#include <vector>

#include "attention_checks.h"
#include "flash_entmax/flash_entmax.h"

namespace flash_entmax {
namespace {

Status Absent() {
  return Status::Unimplemented(
      "this build of flash_entmax has no CPU engine (FLASH_ENTMAX_CPU is off)");
}

}  // namespace

Status CheckAttention(const AttentionProblem&) { return Absent(); }
Status CheckAttentionOutputs(const AttentionProblem&, const AttentionOutputs&) { return Absent(); }
Expected<AttentionPlan> PlanAttention(const AttentionProblem&, const AttentionOptions&) {
  return Absent();
}
Status CheckAttentionGradients(const AttentionProblem&, const AttentionGradients&) {
  return Absent();
}
Status AttentionForward(const AttentionProblem&, const AttentionOutputs&, const AttentionOptions&,
                        AttentionBuffer) {
  return Absent();
}
Status AttentionBackward(const AttentionProblem&, const AttentionGradients&,
                         const AttentionOptions&, AttentionBuffer) {
  return Absent();
}

Status MappingForward(const TensorView&, const MappingOptions&, const MutableTensorView&,
                      const MappingExtras&) {
  return Absent();
}
Status MappingBackward(const TensorView&, const TensorView&, const MappingOptions&,
                       const MutableTensorView&, const MutableTensorView&) {
  return Absent();
}
Expected<RowSupport> MappingSupport(const TensorView&, int) { return Absent(); }
Status FenchelYoungLoss(const TensorView&, const TensorView&, const LossOptions&,
                        const MutableTensorView&, const MutableTensorView&) {
  return Absent();
}

const char* Version() { return FLASH_ENTMAX_VERSION; }
std::vector<std::string> CompiledInstructionSets() { return {}; }
std::vector<std::string> SupportedInstructionSets() { return {}; }
std::string ActiveInstructionSet() { return "none"; }
Status SelectInstructionSet(std::string_view) { return Absent(); }
int DefaultThreads() { return 1; }

}  // namespace flash_entmax
