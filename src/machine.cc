#include "flash_entmax/machine.h"

#include "cpu/instruction_sets.h"
#include "cpu/parallel.h"

namespace flash_entmax {
namespace {

// The bits of `targets` from the lowest, which is the best instruction set.
std::vector<int64_t> Bits(int64_t targets) {
  std::vector<int64_t> bits;
  for (auto rest = static_cast<uint64_t>(targets); rest != 0; rest &= rest - 1) {
    bits.push_back(static_cast<int64_t>(rest & (~rest + 1)));
  }
  return bits;
}

std::vector<std::string> Names(int64_t targets) {
  std::vector<std::string> names;
  for (const int64_t target : Bits(targets)) names.emplace_back(cpu::TargetNameOf(target));
  return names;
}

}  // namespace

const char* Version() { return FLASH_ENTMAX_VERSION; }

std::vector<std::string> CompiledInstructionSets() { return Names(cpu::CompiledTargets()); }

std::vector<std::string> SupportedInstructionSets() { return Names(cpu::MachineTargets()); }

std::string ActiveInstructionSet() { return cpu::TargetNameOf(cpu::ActiveTarget()); }

Status SelectInstructionSet(std::string_view name) {
  if (name == "best") {
    cpu::AllowTargets(0);
    return Status::Ok();
  }
  std::string allowed = "best";
  for (const int64_t target : Bits(cpu::MachineTargets())) {
    if (name == cpu::TargetNameOf(target)) {
      cpu::AllowTargets(target);
      return Status::Ok();
    }
    allowed += std::string(", ") + cpu::TargetNameOf(target);
  }
  return Status::InvalidArgument("instruction set: got \"" + std::string(name) +
                                 "\"; must be one of " + allowed + " on this machine");
}

int DefaultThreads() { return cpu::ThreadCount(0); }

}  // namespace flash_entmax
