// Checkpoints: the training state and the number of finished steps in one safetensors file,
// replaced atomically. A checksum over the tensors and the step finds damage; the run's
// configuration finds checkpoints of another run.

#ifndef FLASH_ENTMAX_LAB_CHECKPOINT_H_
#define FLASH_ENTMAX_LAB_CHECKPOINT_H_

#include <cstdint>
#include <string>

#include "config.h"
#include "flash_entmax/status.h"
#include "optimizer.h"

namespace flash_entmax::lab {

// What must be equal for training to go on: everything but how to evaluate and how often to log.
std::string TrainingIdentity(const RunConfig& run);

Status WriteCheckpoint(const std::string& path, const RunConfig& run, int64_t step,
                       const TrainingState& state);

// Fills `state`, whose tensors have the right sizes and devices, and returns the number of finished
// steps. Nothing is changed on error: kIo if the file cannot be read, kInvalidArgument if it is
// damaged or of another run.
Expected<int64_t> ReadCheckpoint(const std::string& path, const RunConfig& run,
                                 TrainingState* state);

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_CHECKPOINT_H_
