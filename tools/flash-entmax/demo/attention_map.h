// Pictures of attention: the weights of a stretch of queries over the keys just before them.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_ATTENTION_MAP_H_
#define FLASH_ENTMAX_TOOLS_DEMO_ATTENTION_MAP_H_

#include <cstdint>
#include <string>
#include <vector>

#include "demo/evaluation.h"
#include "demo/png.h"
#include "demo/retrieval.h"
#include "flash_entmax/status.h"

namespace flash_entmax::cli {

struct AttentionMap {
  double alpha = 0.0;
  Stretch queries;
  Stretch keys;
  std::vector<float> weight;  // [queries, keys]; 0 is an exact zero.
  double share_inside = 0.0;  // Of the queries' weight, how much lies on these keys.
  double zero_share = 0.0;    // Of the pairs in the picture that are visible.
};

inline constexpr int64_t kMapQueries = 256;
inline constexpr int64_t kMapKeys = 1024;

// The queries that show most: of the stretches of kMapQueries (fewer in a short text) whose last
// kMapKeys keys exist, the one whose letters and digits have the most weight on those keys, the
// nearest ones aside.
Stretch ChooseMapQueries(const Retrieval& retrieval, const Prediction& with_support);

// The weights of every evaluation for these queries.
Expected<std::vector<AttentionMap>> MakeMaps(const Retrieval& retrieval, const Stretch& queries,
                                             const std::vector<Evaluation>& evaluations);

// One pixel a query-key pair, queries downwards. An exact zero is clear, so that what lies below
// the picture shows; positive weights are one colour, in steps of their logarithm, from faint for
// kFaintestWeight and less to full for 1.
std::string MapToPng(const AttentionMap& map);

inline constexpr double kFaintestWeight = 1e-6;

// Clear, then the steps from faint to full.
std::vector<PaletteColour> MapPalette();

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_ATTENTION_MAP_H_
