// What a model answered wrongly, and what its answers may come from: the samples that a result
// lists are made again and looked at.

#ifndef FLASH_ENTMAX_LAB_MISTAKES_H_
#define FLASH_ENTMAX_LAB_MISTAKES_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "flash_entmax/status.h"
#include "tasks/task.h"

namespace flash_entmax::lab {

// A result lists at most so many samples of a length, and so many tokens of each.
inline constexpr size_t kMostMistakes = 20, kMostWrongTokens = 20;

// A sample whose target is not all right; each token was predicted after the true ones before it.
struct Mistake {
  int64_t sample = 0;  // its number: batch.h, EvaluationSample
  std::vector<WrongToken> wrong;
};

struct ExplainedLength {
  double multiple = 1.0;
  int64_t length = 0;
  std::string error;  // not empty: why the length was not evaluated
  double exact_match = 0.0;
  std::vector<Mistake> samples;  // as many of those that were wrong as the result lists
  // Over the wrong tokens whose task tells sources: how many have one, and how many random tokens
  // would be expected to.
  int64_t tokens = 0;
  int64_t with_source = 0;
  double by_chance = 0.0;
};

// `result`: the text of a result.json (evaluation.h, ResultsToJson). kInvalidArgument if it is no
// such text, or if its samples are not those that its task makes.
Expected<std::vector<ExplainedLength>> ExplainMistakes(const std::string& result);

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_MISTAKES_H_
