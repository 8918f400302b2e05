// Rows of the demonstration's attention against the plain double-precision reference.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_VERIFICATION_H_
#define FLASH_ENTMAX_TOOLS_DEMO_VERIFICATION_H_

#include <cstdint>
#include <vector>

#include "demo/retrieval.h"
#include "flash_entmax/status.h"

namespace flash_entmax::cli {

struct Verification {
  int64_t rows = 0;
  double largest_error = 0.0;     // Of any output of any row.
  double bound = 0.0;             // What the error of that row may be.
  int64_t equal_supports = 0;     // Rows whose kept keys are the reference's.
  int64_t possible_supports = 0;  // Rows whose kept keys are so up to rounding.
  bool passed = false;            // Every error within its bound, every support possible.
};

// Compares `prediction` at `rows` random positions with reference::AttentionForwardRow. The kept
// keys are those of `prediction` if it has them, else of a call for the one row.
//
// A score of two float32 rows of length 1 is off by at most δ = scale·(head_size + 2)·ε. To first
// order a probability then moves by 2δ·u at most, u = p^(2−α), and an output by the sum of that
// over the support (the backward formula of mapping.h, entry by entry); 4ε more are for the sum. A
// key may be kept or not if its score is within 2δ of the threshold, or if float32 has no number as
// small as its probability.
Expected<Verification> Verify(const Retrieval& retrieval, const Prediction& prediction,
                              const RetrievalSetting& setting, int64_t rows, uint64_t seed);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_VERIFICATION_H_
