// What tests say about a Status.

#ifndef FLASH_ENTMAX_TESTS_TESTING_STATUS_H_
#define FLASH_ENTMAX_TESTS_TESTING_STATUS_H_

#include <gtest/gtest.h>

#include <string>

#include "flash_entmax/status.h"

namespace flash_entmax::testing {

inline ::testing::AssertionResult IsOk(const Status& status) {
  if (status.ok()) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << status.message();
}

// Invalid argument, with a one-line message of the form "argument: got …; must …".
inline ::testing::AssertionResult Rejects(const Status& status, const std::string& argument) {
  const std::string& message = status.message();
  if (status.code() != StatusCode::kInvalidArgument) {
    return ::testing::AssertionFailure()
           << "accepted, or failed with the wrong code: \"" << message << '"';
  }
  if (message.rfind(argument + ":", 0) != 0 && message.rfind(argument + "[", 0) != 0) {
    return ::testing::AssertionFailure()
           << "does not start with \"" << argument << ":\": \"" << message << '"';
  }
  if (message.find("got") == std::string::npos || message.find('\n') != std::string::npos) {
    return ::testing::AssertionFailure()
           << "not of the form \"argument: got …\": \"" << message << '"';
  }
  return ::testing::AssertionSuccess();
}

}  // namespace flash_entmax::testing

#endif  // FLASH_ENTMAX_TESTS_TESTING_STATUS_H_
