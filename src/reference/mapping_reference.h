// The mappings of mapping.h as plain double loops over one row, written to be read.
//
// Thresholds are found by bisection until the bracket holds no further double: slow, and free of
// every idea that the fast code uses, so that agreement between the two means something.

#ifndef FLASH_ENTMAX_SRC_REFERENCE_MAPPING_REFERENCE_H_
#define FLASH_ENTMAX_SRC_REFERENCE_MAPPING_REFERENCE_H_

#include <cstdint>
#include <vector>

#include "flash_entmax/mapping.h"

namespace flash_entmax::reference {

struct MappedRow {
  std::vector<double> probability;
  double threshold = 0.0;  // As MappingExtras::threshold says; NaN without a distribution.
  int64_t support_size = 0;
};

// scores (n): −inf marks masked entries; n = 0 and all-masked rows give zeros, NaN or +inf give
// NaN. alpha > 0 for kEntmax, > 1 for kNormmax, unused for kBudget; budget > 0, for kBudget only.
MappedRow MapRow(const std::vector<double>& scores, MappingKind kind, double alpha,
                 double budget = 1.0);

struct MappedRowGradient {
  std::vector<double> scores;
  double alpha = 0.0;  // kEntmax only, else 0.
};

// probability, grad_probability (n).
MappedRowGradient MapRowBackward(const std::vector<double>& probability,
                                 const std::vector<double>& grad_probability, MappingKind kind,
                                 double alpha);

}  // namespace flash_entmax::reference

#endif  // FLASH_ENTMAX_SRC_REFERENCE_MAPPING_REFERENCE_H_
