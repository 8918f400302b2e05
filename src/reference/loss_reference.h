// The losses of loss.h as plain double loops over one row.

#ifndef FLASH_ENTMAX_SRC_REFERENCE_LOSS_REFERENCE_H_
#define FLASH_ENTMAX_SRC_REFERENCE_LOSS_REFERENCE_H_

#include <cstdint>
#include <vector>

#include "flash_entmax/mapping.h"

namespace flash_entmax::reference {

struct LossRow {
  double loss = 0.0;
  std::vector<double> grad;  // p − e_y
};

// scores (classes), 0 ≤ target < classes.
LossRow FenchelYoungLoss(const std::vector<double>& scores, int64_t target, MappingKind kind,
                         double alpha);

}  // namespace flash_entmax::reference

#endif  // FLASH_ENTMAX_SRC_REFERENCE_LOSS_REFERENCE_H_
