// How well a trained model does, by length, and what its attention looks like there.

#ifndef FLASH_ENTMAX_LAB_EVALUATION_H_
#define FLASH_ENTMAX_LAB_EVALUATION_H_

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "config.h"
#include "mistakes.h"
#include "model.h"

namespace flash_entmax::lab {

// Means over query rows of one head; the rows are those that predict targets.
struct HeadStatistics {
  double support = 0.0;  // keys with a positive probability
  double entropy = 0.0;  // in nats
  double largest = 0.0;  // the largest probability
};

struct LengthResult {
  double multiple = 1.0;
  int64_t length = 0;
  int64_t samples = 0;
  double exact_match = 0.0;     // share of the samples whose whole target is right
  double token_accuracy = 0.0;  // share of the target tokens, each with the true ones before it
  double loss = 0.0;            // mean cross entropy of a target token
  std::vector<double> slot_accuracy;  // by place in the target, for targets of up to 64 tokens
  std::vector<Mistake> mistakes;      // the first few
  std::vector<std::vector<HeadStatistics>> attention;  // [layers][heads]; empty for linear kinds
  std::string error;  // not empty: why there is no result, as when memory ran out
};

// How many samples of `length` source symbols an evaluation takes.
int64_t SamplesOfLength(const Task& task, const EvaluationConfig& evaluation, int64_t length);

// `parameters` is of the compute type.
// `samples` 0: as many as SamplesOfLength says.
LengthResult EvaluateLength(const Task& task, const RunConfig& run, const Model& model,
                            const at::Tensor& parameters, double multiple, bool statistics,
                            int64_t samples = 0);

// The results as one JSON document that names the run.
std::string ResultsToJson(const RunConfig& run, const std::vector<LengthResult>& results,
                          int64_t step, double final_loss, double seconds,
                          const std::string& machine);

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_EVALUATION_H_
