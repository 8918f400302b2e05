// What a comparison of many numbers found wrong.

#ifndef FLASH_ENTMAX_TESTS_TESTING_REPORT_H_
#define FLASH_ENTMAX_TESTS_TESTING_REPORT_H_

#include <sstream>
#include <string>

#include "testing/compare.h"

namespace flash_entmax::testing {

// Collects disagreements, of which it words the first few.
class Report {
 public:
  // Adds a line unless the error is within the bound.
  void Expect(const std::string& what, double got, double want, double bound) {
    const double error = Error(got, want);
    if (error == 0.0 || error <= bound) return;  // The bound of a NaN is NaN.
    std::ostringstream line;
    line.precision(17);
    line << what << ": got " << got << ", want " << want << ", error " << error << " against "
         << bound;
    Add(line.str());
  }

  void Add(const std::string& line) {
    ++count_;
    if (count_ <= kWorded) text_ += line + '\n';
  }

  // Empty if nothing was wrong.
  std::string text() const {
    if (count_ <= kWorded) return text_;
    return text_ + "and " + std::to_string(count_ - kWorded) + " more\n";
  }

 private:
  static constexpr int kWorded = 3;
  int count_ = 0;
  std::string text_;
};

}  // namespace flash_entmax::testing

#endif  // FLASH_ENTMAX_TESTS_TESTING_REPORT_H_
