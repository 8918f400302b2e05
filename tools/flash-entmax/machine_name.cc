#include "machine_name.h"

#include <sys/resource.h>
#include <sys/utsname.h>

#include <fstream>

namespace flash_entmax::cli {

std::string ProcessorName() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind("model name", 0) != 0) continue;
    const size_t colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  struct utsname system = {};
  return uname(&system) == 0 ? system.machine : "unknown";
}

int64_t PeakMemoryBytes() {
  struct rusage usage = {};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
#ifdef __APPLE__
  return usage.ru_maxrss;
#else
  return usage.ru_maxrss * int64_t{1024};
#endif
}

}  // namespace flash_entmax::cli
