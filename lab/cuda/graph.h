// Training steps on a GPU as replays of one captured graph.
//
// Forward, backward, clipping and the optimizer are captured once; a replay needs one launch from
// the host. What changes from step to step lies on the device as a chunk of many steps (tokens,
// where to predict, labels, rates), and the graph takes its own row of it by a counter that it
// raises itself; losses and gradient norms go the same way back. While a chunk runs, threads of the
// host make the next one in pinned memory. The host waits once a chunk.

#ifndef FLASH_ENTMAX_LAB_CUDA_GRAPH_H_
#define FLASH_ENTMAX_LAB_CUDA_GRAPH_H_

#include <memory>

#include "steps.h"

namespace flash_entmax::lab::cuda {

std::unique_ptr<Stepper> MakeGraphStepper(const Task& task, const RunConfig& run,
                                          const Model& model, TrainingState* state);

}  // namespace flash_entmax::lab::cuda

#endif  // FLASH_ENTMAX_LAB_CUDA_GRAPH_H_
