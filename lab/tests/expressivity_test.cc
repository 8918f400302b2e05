// The identities of expressivity.h on the inputs of real attention calls.

#include "expressivity.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "attention.h"
#include "testing/random.h"

namespace flash_entmax::lab {
namespace {

at::Tensor Gauss(testing::Random& random, std::vector<int64_t> shape) {
  at::Tensor values = at::zeros(shape, at::kDouble);
  double* at = values.mutable_data_ptr<double>();
  for (int64_t i = 0; i < values.numel(); ++i) at[i] = random.Gauss();
  return values;
}

// Both identities need the supports and thresholds alone: those of exact attention.
struct Case {
  at::Tensor query, key, value, selected, threshold, output;
};

Case MakeCase(testing::Random& random, int64_t degree, int64_t rows, int64_t keys, int64_t size) {
  Case c;
  c.query = Gauss(random, {rows, size}) / std::sqrt(static_cast<double>(size));
  c.key = 1.7 * Gauss(random, {keys, size});
  c.value = Gauss(random, {keys, 5});
  const double alpha = 1.0 + 1.0 / static_cast<double>(degree);
  const at::Tensor scores = at::mm(c.query, c.key.t());
  const at::Tensor p = BisectedEntmax(scores.unsqueeze(0), at::full({1, 1}, alpha, at::kDouble))[0];
  c.selected = p > 0;
  c.output = at::mm(p, c.value);
  // p^(1/degree) = score/degree − τ on the support; its largest entry tells τ most exactly.
  const auto [largest, where] = p.max(1);
  c.threshold = scores.gather(1, where.unsqueeze(1)).squeeze(1) / static_cast<double>(degree) -
                largest.pow(1.0 / static_cast<double>(degree));
  return c;
}

TEST(Expressivity, SparsemaxIsLinearAttentionWithASelectedState) {
  SCOPED_TRACE(testing::SeedMessage());
  testing::Random random(10);
  for (const int64_t keys : {1, 2, 9, 200}) {
    const Case c = MakeCase(random, 1, 7, keys, 6);
    const at::Tensor output =
        SelectedStateAttention(c.query, c.key, c.value, c.selected, c.threshold);
    EXPECT_LE((output - c.output).abs().max().item<double>(), 1e-9) << keys;
    // The rule of selection is the score against the threshold, nothing else.
    const at::Tensor above = at::mm(c.query, c.key.t()) > c.threshold.unsqueeze(1);
    EXPECT_TRUE(above.equal(c.selected));
  }
}

TEST(Expressivity, EntmaxIsPolynomialAttentionWithASelectedState) {
  SCOPED_TRACE(testing::SeedMessage());
  testing::Random random(11);
  for (const int64_t degree : {1, 2, 3, 4}) {
    for (const int64_t keys : {1, 3, 60}) {
      const Case c = MakeCase(random, degree, 5, keys, 4);
      const at::Tensor output =
          PolynomialStateAttention(c.query, c.key, c.value, c.selected, c.threshold, degree);
      EXPECT_LE((output - c.output).abs().max().item<double>(), 1e-8)
          << "degree " << degree << ", keys " << keys;
    }
  }
}

TEST(Expressivity, WithoutSelectionTheIdentityFails) {
  SCOPED_TRACE(testing::SeedMessage());
  testing::Random random(12);
  const Case c = MakeCase(random, 1, 7, 100, 6);
  const at::Tensor all = at::ones_like(c.selected);
  const at::Tensor output = SelectedStateAttention(c.query, c.key, c.value, all, c.threshold);
  EXPECT_GE((output - c.output).abs().max().item<double>(), 0.1);
}

}  // namespace
}  // namespace flash_entmax::lab
