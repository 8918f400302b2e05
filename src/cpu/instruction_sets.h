// The instruction sets of this build and this machine, as the bits that Highway gives them; a lower
// bit is a better set.

#ifndef FLASH_ENTMAX_SRC_CPU_INSTRUCTION_SETS_H_
#define FLASH_ENTMAX_SRC_CPU_INSTRUCTION_SETS_H_

#include <cstdint>

namespace flash_entmax::cpu {

int64_t CompiledTargets();
// Those that the machine can run, whatever AllowTargets() says.
int64_t MachineTargets();
const char* TargetNameOf(int64_t target);
// Restricts what is used to these bits; 0 lifts it.
void AllowTargets(int64_t targets);
int64_t ActiveTarget();

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_INSTRUCTION_SETS_H_
