// What to call the machine that a measurement was made on.

#ifndef FLASH_ENTMAX_TOOLS_MACHINE_NAME_H_
#define FLASH_ENTMAX_TOOLS_MACHINE_NAME_H_

#include <cstdint>
#include <string>

namespace flash_entmax::cli {

// The processor's own name, or its architecture where the system tells no more.
std::string ProcessorName();

// The most memory this process has had at once, in bytes.
int64_t PeakMemoryBytes();

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_MACHINE_NAME_H_
