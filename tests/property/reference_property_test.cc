// The properties of every mapping, for the reference.

#include "property/mapping_properties.h"
#include "reference/mapping_reference.h"

namespace flash_entmax {
namespace {

struct ReferenceEngine {
  reference::MappedRow Map(const std::vector<double>& scores,
                           const testing::Mapping& mapping) const {
    return reference::MapRow(scores, mapping.kind, mapping.alpha, mapping.budget);
  }
  reference::MappedRowGradient Backward(const std::vector<double>& p, const std::vector<double>& g,
                                        const testing::Mapping& mapping) const {
    return reference::MapRowBackward(p, g, mapping.kind, mapping.alpha);
  }
};

FLASH_ENTMAX_MAPPING_PROPERTIES(ReferenceProperty, ReferenceEngine)

}  // namespace
}  // namespace flash_entmax
