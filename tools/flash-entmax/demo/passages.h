// Where attention went: a few positions of the text and the passages that each of them kept.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_PASSAGES_H_
#define FLASH_ENTMAX_TOOLS_DEMO_PASSAGES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "demo/evaluation.h"
#include "demo/retrieval.h"
#include "flash_entmax/status.h"

namespace flash_entmax::cli {

// A byte of the text and what stands around it.
struct Excerpt {
  int64_t position = 0;
  std::string before;
  unsigned char byte = 0;
  std::string after;
};

struct KeptPassage {
  double weight = 0.0;
  int64_t distance = 0;  // Bytes back.
  Excerpt excerpt;
};

// What one α does at the position.
struct PositionView {
  double alpha = 0.0;
  int64_t kept = 0;
  int64_t for_99_percent = 0;  // Fewest keys that hold 99 % of the weight.
  double probability = 0.0;    // That attention gives the byte that came.
};

struct ChosenPosition {
  std::string reason;
  Excerpt excerpt;
  int64_t visible = 0;                // Keys that the position sees.
  std::vector<KeptPassage> passages;  // Of the α shown, the heaviest first, at most kShownPassages.
  double rest_weight = 0.0;           // Of kept keys that are not shown.
  std::vector<PositionView> views;    // One an α.
};

inline constexpr size_t kShownPassages = 6;

// The α whose passages are shown: the smallest that is sparse, or none (−1).
int64_t ShownEvaluation(const std::vector<Evaluation>& evaluations);

// Picks positions by what the shown α did there: right and sure of it from far away, right with
// several continuations in view, and wrong and sure.
Expected<std::vector<ChosenPosition>> ChoosePassages(const Retrieval& retrieval,
                                                     const std::vector<Evaluation>& evaluations,
                                                     const std::vector<Prediction>& predictions);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_PASSAGES_H_
