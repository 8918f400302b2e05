// RapidCheck with a fixed seed, and the inputs that property tests draw.

#ifndef FLASH_ENTMAX_TESTS_TESTING_PROPERTY_H_
#define FLASH_ENTMAX_TESTS_TESTING_PROPERTY_H_

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "flash_entmax/mapping.h"
#include "testing/mapping_case.h"
#include "testing/random.h"

namespace flash_entmax::testing {

// RapidCheck reads RC_PARAMS before its first property; one that the caller has set wins.
inline const bool kRapidCheckIsSeeded =
    setenv("RC_PARAMS", ("max_success=400 seed=" + std::to_string(TestSeed())).c_str(),
           /*overwrite=*/0) == 0;

struct Mapping {
  MappingKind kind = MappingKind::kEntmax;
  double alpha = 1.5;
  double budget = 1.0;
};

inline std::ostream& operator<<(std::ostream& out, const Mapping& mapping) {
  return out << (mapping.kind == MappingKind::kEntmax    ? "entmax "
                 : mapping.kind == MappingKind::kNormmax ? "normmax "
                                                         : "budget ")
             << mapping.alpha << ' ' << mapping.budget;
}

// 1 to about 100 scores. They are multiples of 2^-9 up to ±8192/512 times a power of 2, so that
// ties are common and sums of scores and integers are exact.
inline rc::Gen<std::vector<double>> AnyScores() {
  const auto numbers =
      rc::gen::nonEmpty(rc::gen::container<std::vector<int>>(rc::gen::weightedOneOf<int>(
          {{5, rc::gen::inRange(-2048, 2048)}, {1, rc::gen::element(0, 512, -512, 256)}})));
  return rc::gen::apply(
      [](const std::vector<int>& multiples, double quantum) {
        std::vector<double> scores;
        for (int multiple : multiples) scores.push_back(multiple * quantum);
        return scores;
      },
      numbers, rc::gen::element(0x1p-9, 0x1p-9, 0x1p-12, 0x1p-6));
}

inline rc::Gen<double> AnyAlpha() { return rc::gen::elementOf(TestAlphas()); }

// An α of TestAlphas() in [low, high].
inline rc::Gen<double> AlphaWithin(double low, double high) {
  std::vector<double> alphas;
  for (double alpha : TestAlphas()) {
    if (low <= alpha && alpha <= high) alphas.push_back(alpha);
  }
  return rc::gen::elementOf(alphas);
}

// Budgets fit any row of `entries`.
inline rc::Gen<Mapping> AnyMapping(size_t entries) {
  return rc::gen::oneOf(
      rc::gen::map(AnyAlpha(),
                   [](double alpha) {
                     return Mapping{MappingKind::kEntmax, alpha};
                   }),
      rc::gen::map(AlphaWithin(1.0001, 20.0),
                   [](double alpha) {
                     return Mapping{MappingKind::kNormmax, alpha};
                   }),
      rc::gen::map(rc::gen::inRange(1, 65), [entries](int part) {
        return Mapping{MappingKind::kBudget, 2.0, part / 64.0 * static_cast<double>(entries)};
      }));
}

}  // namespace flash_entmax::testing

#endif  // FLASH_ENTMAX_TESTS_TESTING_PROPERTY_H_
