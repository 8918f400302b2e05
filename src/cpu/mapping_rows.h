// The mappings over one row in contiguous memory, compiled for every instruction set.

#ifndef FLASH_ENTMAX_SRC_CPU_MAPPING_ROWS_H_
#define FLASH_ENTMAX_SRC_CPU_MAPPING_ROWS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "flash_entmax/mapping.h"

namespace flash_entmax::cpu {

struct RowMapping {
  MappingKind kind = MappingKind::kEntmax;
  double alpha = 1.5;
  double budget = 1.0;
};

struct RowResult {
  double threshold = 0.0;
  int64_t support_size = 0;
};

// Memory that a row needs besides input and output; one a thread, reused.
template <typename T>
struct RowScratch {
  std::vector<T> candidates;
};

// scores (n) → probabilities (n), T is float or double; n ≥ 0. The two may be the same memory.
//
// α > 1 reads the row three times while it is in the first-level cache: (1) maxima of disjoint
// groups of scores, whose threshold is a lower bound of the row's (fact F1b); (2) the scores above
// that bound are compressed into a short list, on which the threshold is solved; (3) probabilities.
// There is no exponential, so for α = 1.5 and 2 a row costs about what moving it costs.
template <typename T>
RowResult MapRow(const T* scores, int64_t n, const RowMapping& mapping, T* probabilities,
                 RowScratch<T>* scratch);

// probabilities, grad_probabilities (n) → grad_scores (n); grad_alpha may be null. grad_scores may
// be the same memory as grad_probabilities.
template <typename T>
void MapRowBackward(const T* probabilities, const T* grad_probabilities, int64_t n,
                    const RowMapping& mapping, T* grad_scores, double* grad_alpha);

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_MAPPING_ROWS_H_
