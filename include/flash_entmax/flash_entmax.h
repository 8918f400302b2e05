// Everything at once.

#ifndef FLASH_ENTMAX_FLASH_ENTMAX_H_
#define FLASH_ENTMAX_FLASH_ENTMAX_H_

#include "flash_entmax/attention.h"
#include "flash_entmax/gpu.h"
#include "flash_entmax/loss.h"
#include "flash_entmax/machine.h"
#include "flash_entmax/mapping.h"
#include "flash_entmax/query_scaling.h"
#include "flash_entmax/status.h"
#include "flash_entmax/tensor.h"

#endif  // FLASH_ENTMAX_FLASH_ENTMAX_H_
