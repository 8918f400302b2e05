// The library against the reference on random tensors: any type, rank, dimension, memory order,
// mask and α.

#include <algorithm>
#include <string>
#include <vector>

#include "flash_entmax/loss.h"
#include "flash_entmax/mapping.h"
#include "testing/loss_case.h"
#include "testing/mapping_case.h"
#include "testing/property.h"

namespace flash_entmax {
namespace {

using testing::AlphaWithin;
using testing::AnyAlpha;
using testing::FloatingTypes;
using testing::Index;
using testing::LossCase;
using testing::LossProblem;
using testing::MappingCase;
using testing::MappingProblem;

DType ThresholdType() { return *rc::gen::element(DType::kFloat64, DType::kFloat32); }

// Up to 8 dimensions, of which one may be long and any may be 0 or 1.
MappingCase AnyCase() {
  MappingCase c;
  c.kind = *rc::gen::element(MappingKind::kEntmax, MappingKind::kEntmax, MappingKind::kNormmax,
                             MappingKind::kBudget);
  const int rank = *rc::gen::inRange(1, kMaxRank + 1);
  c.shape.clear();
  for (int d = 0; d < rank; ++d) {
    c.shape.push_back(*rc::gen::weightedElement<int64_t>(
        {{8, 1}, {8, 2}, {rank < 5 ? 8 : 2, 3}, {rank < 4 ? 4 : 0, 5}, {1, 0}}));
  }
  const int dim = *rc::gen::inRange(0, rank);
  c.shape[dim] = *rc::gen::weightedOneOf<int>(
      {{4, rc::gen::inRange(1, 40)}, {1, rc::gen::inRange(1, 300)}, {1, rc::gen::just(0)}});
  c.dim = *rc::gen::arbitrary<bool>() ? dim : dim - rank;
  c.dtype = *rc::gen::elementOf(FloatingTypes());
  c.threshold_dtype = ThresholdType();
  c.strided = *rc::gen::arbitrary<bool>();
  c.masked = *rc::gen::arbitrary<bool>();
  c.ties = *rc::gen::arbitrary<bool>();
  c.spread = *rc::gen::element(1.0, 0.0, 0.05, 4.0, 30.0);
  c.alpha = c.kind == MappingKind::kNormmax ? *AlphaWithin(1.0001, 20.0) : *AnyAlpha();
  c.alpha_per_row = c.kind != MappingKind::kBudget && *rc::gen::arbitrary<bool>();
  if (c.kind == MappingKind::kBudget && c.shape[dim] > 0) {
    c.budget = static_cast<double>(c.shape[dim]) * *rc::gen::inRange(1, 17) / 16.0;
  }
  c.stream = *rc::gen::arbitrary<uint32_t>();
  return c;
}

RC_GTEST_PROP(LibraryAgreement, ForwardAndBackward, ()) {
  const MappingCase c = AnyCase();
  RC_LOG() << c;
  MappingProblem problem(c);
  RC_ASSERT(testing::ForwardDisagreement(c, &problem) == "");
  RC_ASSERT(testing::ThresholdDisagreement(c, problem) == "");
  RC_ASSERT(testing::BackwardDisagreement(c, &problem) == "");
}

RC_GTEST_PROP(LibraryAgreement, Support, ()) {
  const MappingCase c = AnyCase();
  RC_LOG() << c;
  MappingProblem problem(c);
  RC_ASSERT(problem.RunForward().ok());
  const Expected<RowSupport> support = MappingSupport(problem.probabilities.view(), c.dim);
  RC_ASSERT(support.ok());
  RowSupport want;
  want.row_offsets.push_back(0);
  for (int64_t row = 0; row < problem.num_rows(); ++row) {
    const std::vector<double> p = problem.Row(problem.probabilities, row);
    for (size_t i = 0; i < p.size(); ++i) {
      if (!(p[i] > 0.0)) continue;
      want.index.push_back(static_cast<int64_t>(i));
      want.probability.push_back(p[i]);
    }
    want.row_offsets.push_back(static_cast<int64_t>(want.index.size()));
  }
  RC_ASSERT(support->row_offsets == want.row_offsets);
  RC_ASSERT(support->index == want.index);
  RC_ASSERT(support->probability == want.probability);
}

RC_GTEST_PROP(LibraryAgreement, Loss, ()) {
  LossCase c;
  c.kind = *rc::gen::element(MappingKind::kEntmax, MappingKind::kNormmax);
  c.alpha = c.kind == MappingKind::kNormmax ? *AlphaWithin(1.0001, 20.0) : *AnyAlpha();
  c.dtype = *rc::gen::elementOf(FloatingTypes());
  c.loss_dtype = ThresholdType();
  c.reduction = *rc::gen::element(Reduction::kMean, Reduction::kSum, Reduction::kNone);
  c.rows = *rc::gen::inRange(0, 8);
  c.classes = *rc::gen::inRange(1, 60);
  c.ignored = *rc::gen::element(0.0, 0.3, 1.0);
  c.with_grad = *rc::gen::arbitrary<bool>();
  c.strided = *rc::gen::arbitrary<bool>();
  c.spread = *rc::gen::element(1.0, 0.0, 0.1, 5.0, 40.0);
  c.stream = *rc::gen::arbitrary<uint32_t>();
  RC_LOG() << c;
  LossProblem problem(c);
  RC_ASSERT(testing::LossDisagreement(c, &problem) == "");
}

}  // namespace
}  // namespace flash_entmax
