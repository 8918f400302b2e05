// The checks of attention problems that need no look at what the tensors hold: every engine's calls
// begin with them.

#ifndef FLASH_ENTMAX_SRC_ATTENTION_CHECKS_H_
#define FLASH_ENTMAX_SRC_ATTENTION_CHECKS_H_

#include <string>
#include <utility>
#include <vector>

#include "attention_resolved.h"
#include "flash_entmax/attention.h"
#include "flash_entmax/status.h"
#include "views.h"

namespace flash_entmax {

// Ranks, types and sizes of query, key and value.
Status CheckAttentionShapes(const AttentionProblem& problem);

// α, scale, softcap and windows.
Status CheckAttentionNumbers(const AttentionProblem& problem);

// query_scale, key_mask and bias, broadcast to the sizes in `resolved`.
Status BroadcastOptionalTensors(const AttentionProblem& problem, ResolvedAttention* resolved);

// The tensors of a problem and their names. Those not given are empty.
std::vector<std::pair<const char*, const TensorView*>> NamedInputs(const AttentionProblem& problem);

// A result of exactly this shape that may be written to.
Status CheckOutputShape(const std::string& name, const MutableTensorView& tensor,
                        const Shape& shape);

}  // namespace flash_entmax

#endif  // FLASH_ENTMAX_SRC_ATTENTION_CHECKS_H_
