// The properties of every mapping, for the library's float64 rows.

#include "flash_entmax/mapping.h"
#include "property/mapping_properties.h"
#include "testing/status.h"

namespace flash_entmax {
namespace {

struct LibraryEngine {
  reference::MappedRow Map(const std::vector<double>& scores,
                           const testing::Mapping& mapping) const {
    const auto n = static_cast<int64_t>(scores.size());
    reference::MappedRow row;
    row.probability.assign(scores.size(), 0.0);
    const Status status = MappingForward(
        TensorView::Contiguous(scores.data(), DType::kFloat64, {n}), OptionsOf(mapping),
        MutableTensorView::Contiguous(row.probability.data(), DType::kFloat64, {n}),
        {MutableTensorView::Contiguous(&row.threshold, DType::kFloat64, {1}),
         MutableTensorView::Contiguous(&row.support_size, DType::kInt64, {1})});
    RC_ASSERT(status.ok());
    return row;
  }

  reference::MappedRowGradient Backward(const std::vector<double>& p, const std::vector<double>& g,
                                        const testing::Mapping& mapping) const {
    const auto n = static_cast<int64_t>(p.size());
    reference::MappedRowGradient gradient;
    gradient.scores.assign(p.size(), 0.0);
    const bool has_alpha = mapping.kind == MappingKind::kEntmax;
    const Status status = MappingBackward(
        TensorView::Contiguous(p.data(), DType::kFloat64, {n}),
        TensorView::Contiguous(g.data(), DType::kFloat64, {n}), OptionsOf(mapping),
        MutableTensorView::Contiguous(gradient.scores.data(), DType::kFloat64, {n}),
        has_alpha ? MutableTensorView::Contiguous(&gradient.alpha, DType::kFloat64, {1})
                  : MutableTensorView{});
    RC_ASSERT(status.ok());
    return gradient;
  }

 private:
  static MappingOptions OptionsOf(const testing::Mapping& mapping) {
    MappingOptions options;
    options.kind = mapping.kind;
    options.alpha = mapping.alpha;
    options.budget = mapping.budget;
    options.num_threads = 1;
    return options;
  }
};

FLASH_ENTMAX_MAPPING_PROPERTIES(LibraryProperty, LibraryEngine)

}  // namespace
}  // namespace flash_entmax
