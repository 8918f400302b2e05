// What this build contains and what this machine runs.

#ifndef FLASH_ENTMAX_MACHINE_H_
#define FLASH_ENTMAX_MACHINE_H_

#include <string>
#include <string_view>
#include <vector>

#include "flash_entmax/status.h"

namespace flash_entmax {

// "0.1.0".
const char* Version();

// Names of the instruction sets compiled into this build, best first.
std::vector<std::string> CompiledInstructionSets();
// Those of them that this machine can run, best first. Never empty.
std::vector<std::string> SupportedInstructionSets();
// The one that the next call will use.
std::string ActiveInstructionSet();
// Uses `name` (one of SupportedInstructionSets()) from now on, or the best again for "best".
// For tests and command lines; call it while no other call is running.
Status SelectInstructionSet(std::string_view name);

// Threads that num_threads = 0 stands for.
int DefaultThreads();

}  // namespace flash_entmax

#endif  // FLASH_ENTMAX_MACHINE_H_
