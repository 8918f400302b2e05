// What tests look for in the tensors of a checkpoint.

#ifndef FLASH_ENTMAX_LAB_TESTS_CHECKPOINT_VALUES_H_
#define FLASH_ENTMAX_LAB_TESTS_CHECKPOINT_VALUES_H_

#include <gtest/gtest.h>

#include <string>

namespace flash_entmax::lab {

// Whether all numbers of the run's checkpoint, parameters and moments, are bfloat16 and some of
// each tensor are not zero.
::testing::AssertionResult KeepsBfloat16(const std::string& folder);

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_TESTS_CHECKPOINT_VALUES_H_
