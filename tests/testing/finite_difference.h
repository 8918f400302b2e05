// Derivatives by central differences.

#ifndef FLASH_ENTMAX_TESTS_TESTING_FINITE_DIFFERENCE_H_
#define FLASH_ENTMAX_TESTS_TESTING_FINITE_DIFFERENCE_H_

#include <vector>

namespace flash_entmax::testing {

// (f(x + h) − f(x − h))/(2h) for a function of one number.
template <typename Function>
double CentralDifference(const Function& function, double at, double step = 1e-5) {
  return (function(at + step) - function(at - step)) / (2.0 * step);
}

// The same for every element of a vector.
template <typename Function>
std::vector<double> CentralGradient(const Function& function, const std::vector<double>& at,
                                    double step = 1e-5) {
  std::vector<double> gradient(at.size());
  for (size_t i = 0; i < at.size(); ++i) {
    std::vector<double> moved = at;
    gradient[i] = CentralDifference(
        [&](double x) {
          moved[i] = x;
          return function(moved);
        },
        at[i], step);
  }
  return gradient;
}

}  // namespace flash_entmax::testing

#endif  // FLASH_ENTMAX_TESTS_TESTING_FINITE_DIFFERENCE_H_
