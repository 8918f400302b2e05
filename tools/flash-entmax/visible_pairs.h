// How many query-key pairs a problem's masks leave.

#ifndef FLASH_ENTMAX_TOOLS_VISIBLE_PAIRS_H_
#define FLASH_ENTMAX_TOOLS_VISIBLE_PAIRS_H_

#include <cstdint>

#include "flash_entmax/attention.h"

namespace flash_entmax::cli {

// Of one head, summed over the batch. Looks at causality, windows, lengths, packed sequences and
// the key mask; keys hidden by a bias of −inf count as visible. The problem must have passed
// CheckAttention.
int64_t VisiblePairs(const AttentionProblem& problem);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_VISIBLE_PAIRS_H_
