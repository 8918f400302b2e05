// Everything that one run of the demonstration found out; what the terminal, the JSON document and
// the page are written from.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_DEMO_RESULT_H_
#define FLASH_ENTMAX_TOOLS_DEMO_DEMO_RESULT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "demo/attention_map.h"
#include "demo/curves.h"
#include "demo/embedding.h"
#include "demo/evaluation.h"
#include "demo/passages.h"
#include "demo/scoring.h"
#include "demo/verification.h"

namespace flash_entmax::cli {

struct DemoResult {
  // What was run, and on what.
  std::string command_line;
  std::string version;
  std::string processor;
  std::string instruction_set;
  int threads = 0;
  std::string text_description;
  int64_t text_bytes = 0;
  int64_t text_files = 0;
  EmbeddingOptions embedding;

  Stretch calibrated;  // Positions that scale and prior weight were chosen on.
  Stretch scored;
  Stretch curve_positions;
  std::vector<Baseline> baselines;

  // One entry an α, in the order that was asked for.
  std::vector<Evaluation> evaluations;
  std::vector<Verification> verifications;
  std::vector<Curve> curves;
  std::vector<AttentionMap> maps;

  int64_t shown = -1;  // Index of the α whose passages are shown; −1 if none is sparse.
  std::vector<ChosenPosition> passages;
  double seconds = 0.0;  // Of the whole run.

  // Keys that a scored query sees, on average.
  double mean_visible() const {
    return static_cast<double>(Retrieval::VisiblePairs(scored, {})) /
           static_cast<double>(scored.size());
  }

  bool passed() const {
    for (const Verification& verification : verifications) {
      if (!verification.passed) return false;
    }
    return true;
  }
};

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_DEMO_RESULT_H_
