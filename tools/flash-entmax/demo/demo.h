// The demonstration without its command line: everything from a text to a DemoResult.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_DEMO_H_
#define FLASH_ENTMAX_TOOLS_DEMO_DEMO_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "demo/demo_result.h"
#include "demo/text_source.h"
#include "flash_entmax/status.h"

namespace flash_entmax::cli {

inline constexpr int64_t kMinContext = 2048;
inline constexpr int64_t kMaxContext = 1'048'576;
inline constexpr int64_t kDefaultContext = 32'768;

struct DemoSetting {
  std::vector<double> alphas = {1.0, 1.5, 2.0};
  uint64_t seed = 1;
  int threads = 0;
};

// Where the parts of a text of `size` bytes lie. The first tenth is for calibration; of the rest,
// at most the last 32,768 bytes are scored.
Stretch ScoredStretch(int64_t size);
Stretch CalibrationPart(int64_t size);

// Query-key pairs that RunDemo() will report, about.
int64_t ExpectedPairs(int64_t size, const DemoSetting& setting);

// Runs on source.bytes, which must have at least kMinContext bytes. `report` is called with the
// number of query-key pairs of every piece of work that is done.
Expected<DemoResult> RunDemo(const TextSource& source, const DemoSetting& setting,
                             const std::function<void(int64_t)>& report);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_DEMO_H_
