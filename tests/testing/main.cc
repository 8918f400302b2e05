// main() of every test program. The environment variable FLASH_ENTMAX_ISA chooses the instruction
// set; a name that this machine cannot run skips the program with exit code 77.

#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "flash_entmax/machine.h"

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  if (const char* name = std::getenv("FLASH_ENTMAX_ISA")) {
    const flash_entmax::Status status = flash_entmax::SelectInstructionSet(name);
    if (!status.ok()) {
      std::printf("skipped: %s\n", status.message().c_str());
      return 77;
    }
  }
  return RUN_ALL_TESTS();
}
