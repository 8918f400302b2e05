// Which pairs of views are taken for separate memory.

#include "views.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <set>
#include <vector>

#include "flash_entmax/attention.h"
#include "testing/backward_case.h"
#include "testing/random.h"
#include "testing/status.h"

namespace flash_entmax {
namespace {

using testing::IsOk;
using testing::Rejects;

// Part `part` of `parts` of a [batch, length, parts, heads, size] tensor as [batch, heads, length,
// size].
template <typename View, typename T>
View Part(T* data, std::array<int64_t, 4> shape, int64_t part, int64_t parts) {
  const auto [batch, heads, length, size] = shape;
  View view =
      View::Contiguous(data + part * heads * size, DType::kFloat32, {batch, heads, length, size});
  const int64_t row = parts * heads * size;
  view.strides = {length * row, size, row, 1};
  return view;
}

std::set<const float*> Elements(const TensorView& view) {
  std::set<const float*> elements;
  for (int64_t i = 0; i < view.num_elements(); ++i) {
    int64_t rest = i, offset = 0;
    for (size_t d = 4; d-- > 0;) {
      offset += rest % view.shape[d] * view.strides[d];
      rest /= view.shape[d];
    }
    elements.insert(static_cast<const float*>(view.data) + offset);
  }
  return elements;
}

bool Meet(const TensorView& a, const TensorView& b) {
  const std::set<const float*> first = Elements(a), second = Elements(b);
  return std::any_of(first.begin(), first.end(),
                     [&](const float* element) { return second.count(element) != 0; });
}

TEST(Views, ColumnsSideBySideAreSeparate) {
  std::vector<float> data(2 * 5 * 3 * 4 * 6 + 60);
  for (int64_t a = 0; a < 3; ++a) {
    for (int64_t b = 0; b < 3; ++b) {
      const auto first = Part<TensorView>(data.data() + 30, {2, 4, 5, 6}, a, 3);
      const auto second = Part<TensorView>(data.data() + 30, {2, 4, 5, 6}, b, 3);
      const Status status = CheckDisjoint("grad_key", first, "grad_query", second);
      EXPECT_TRUE(a != b ? IsOk(status) : Rejects(status, "grad_key")) << a << " " << b;
      // Moved until they meet, in every amount.
      for (int64_t shift = -30; shift <= 30; ++shift) {
        auto shifted = second;
        shifted.data = static_cast<const float*>(second.data) + shift;
        if (!Meet(first, shifted)) continue;
        EXPECT_TRUE(Rejects(CheckDisjoint("grad_key", first, "grad_query", shifted), "grad_key"))
            << a << " " << b << " " << shift;
      }
    }
  }
}

TEST(Views, WhatDoesNotLieInRowsOfOnePitchIsRefused) {
  std::vector<float> data(1000);
  const auto first = TensorView::Contiguous(data.data(), DType::kFloat32, {1, 1, 10, 4});
  auto second = first;
  auto wide = first;
  wide.strides = {160, 160, 8, 1};
  second.strides = {160, 160, 12, 1};  // rows of 12, where the other has rows of 8
  second.data = data.data() + 4;
  EXPECT_TRUE(Rejects(CheckDisjoint("b", wide, "a", second), "b"));
  second.strides = {160, 160, 8, 1};
  EXPECT_TRUE(IsOk(CheckDisjoint("b", wide, "a", second)));
  second.dtype = DType::kFloat16;
  EXPECT_TRUE(Rejects(CheckDisjoint("b", wide, "a", second), "b"));
  EXPECT_TRUE(Rejects(CheckDisjoint("b", first, "a", first), "b"));
}

TEST(Views, GradientsMayBePartsOfOneTensor) {
  SCOPED_TRACE(testing::SeedMessage());
  testing::Random random(50);
  const std::array<int64_t, 4> shape = {2, 3, 20, 8};
  const size_t size = 2 * 3 * 20 * 8;
  std::vector<float> inputs(3 * size), gradient(size), output(size), fused(3 * size);
  for (std::vector<float>* values : {&inputs, &gradient}) {
    for (float& value : *values) value = static_cast<float>(random.Gauss());
  }
  AttentionProblem problem;
  problem.query = Part<TensorView>(inputs.data(), shape, 0, 3);
  problem.key = Part<TensorView>(inputs.data(), shape, 1, 3);
  problem.value = Part<TensorView>(inputs.data(), shape, 2, 3);
  problem.causal = true;
  AttentionOptions options;
  options.save_for_backward = true;
  const Expected<AttentionPlan> plan = PlanAttention(problem, options);
  ASSERT_TRUE(IsOk(plan.status()));
  const testing::AlignedBytes saved(plan->saved_bytes);
  AttentionOutputs outputs;
  outputs.output = MutableTensorView::Contiguous(output.data(), DType::kFloat32, {2, 3, 20, 8});
  ASSERT_TRUE(IsOk(AttentionForward(problem, outputs, options, {saved.data(), plan->saved_bytes})));

  AttentionGradients gradients;
  gradients.output = TensorView::Contiguous(gradient.data(), DType::kFloat32, {2, 3, 20, 8});
  gradients.query = Part<MutableTensorView>(fused.data(), shape, 0, 3);
  gradients.key = Part<MutableTensorView>(fused.data(), shape, 1, 3);
  gradients.value = Part<MutableTensorView>(fused.data(), shape, 2, 3);
  ASSERT_TRUE(
      IsOk(AttentionBackward(problem, gradients, options, {saved.data(), plan->saved_bytes})));

  std::vector<float> separate(3 * size);
  gradients.query = MutableTensorView::Contiguous(separate.data(), DType::kFloat32, {2, 3, 20, 8});
  gradients.key =
      MutableTensorView::Contiguous(separate.data() + size, DType::kFloat32, {2, 3, 20, 8});
  gradients.value =
      MutableTensorView::Contiguous(separate.data() + 2 * size, DType::kFloat32, {2, 3, 20, 8});
  ASSERT_TRUE(
      IsOk(AttentionBackward(problem, gradients, options, {saved.data(), plan->saved_bytes})));
  const auto at = [&](int64_t part, int64_t b, int64_t h, int64_t i, int64_t d) {
    return fused[static_cast<size_t>((((b * 20 + i) * 3 + part) * 3 + h) * 8 + d)];
  };
  size_t next = 0;
  for (int64_t part = 0; part < 3; ++part) {
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t h = 0; h < 3; ++h) {
        for (int64_t i = 0; i < 20; ++i) {
          for (int64_t d = 0; d < 8; ++d) ASSERT_EQ(at(part, b, h, i, d), separate[next++]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace flash_entmax
