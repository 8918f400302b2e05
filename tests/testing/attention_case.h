// Random attention problems with every mask and modifier that can be switched on, and the memory
// behind them.

#ifndef FLASH_ENTMAX_TESTS_TESTING_ATTENTION_CASE_H_
#define FLASH_ENTMAX_TESTS_TESTING_ATTENTION_CASE_H_

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <vector>

#include "flash_entmax/attention.h"
#include "testing/random.h"
#include "testing/stored_tensor.h"

namespace flash_entmax::testing {

// Which features a problem uses. Plain data, so that a test can count through all of them.
struct AttentionFeatures {
  bool causal = false;
  bool window_left = false;
  bool window_right = false;
  bool key_lengths = false;
  bool key_mask = false;
  bool bias = false;
  bool alibi = false;
  bool softcap = false;
  bool query_scale = false;
  bool alpha_per_head = false;
  bool packed = false;  // cu_query and cu_key; excludes key_lengths, key_mask and bias

  static constexpr int kCount = 11;

  // Bit b of `bits` is field b in the order above.
  static AttentionFeatures FromBits(uint32_t bits) {
    const auto bit = [bits](int b) { return ((bits >> b) & 1u) != 0; };
    return {bit(0), bit(1), bit(2), bit(3), bit(4), bit(5),
            bit(6), bit(7), bit(8), bit(9), bit(10)};
  }
  bool IsValid() const { return !packed || (!key_lengths && !key_mask && !bias); }
};

inline std::ostream& operator<<(std::ostream& out, const AttentionFeatures& f) {
  const auto name = [&out](bool on, const char* text) {
    if (on) out << text << ' ';
  };
  name(f.causal, "causal");
  name(f.window_left, "window_left");
  name(f.window_right, "window_right");
  name(f.key_lengths, "key_lengths");
  name(f.key_mask, "key_mask");
  name(f.bias, "bias");
  name(f.alibi, "alibi");
  name(f.softcap, "softcap");
  name(f.query_scale, "query_scale");
  name(f.alpha_per_head, "alpha_per_head");
  name(f.packed, "packed");
  return out;
}

struct AttentionShape {
  int64_t batch = 2;
  int64_t heads = 2;
  int64_t kv_heads = 1;
  int64_t queries = 3;
  int64_t keys = 5;
  int64_t head_size = 3;
  int64_t value_size = 2;
};

// A problem and its tensors. Packed problems have batch 1 and up to four sequences, some empty.
class AttentionCase {
 public:
  AttentionCase(AttentionShape shape, const AttentionFeatures& features, DType dtype, double alpha,
                Random* random, Random* layout = nullptr)
      : alpha_(alpha), features_(features) {
    if (features.packed) shape.batch = 1;
    shape_ = shape;
    const auto gauss = [&](const Index& dims, DType type) {
      StoredTensor tensor(type, dims, layout);
      tensor.SetValues(random->GaussVector(tensor.size()));
      return tensor;
    };
    query = gauss({shape.batch, shape.heads, shape.queries, shape.head_size}, dtype);
    key = gauss({shape.batch, shape.kv_heads, shape.keys, shape.head_size}, dtype);
    value = gauss({shape.batch, shape.kv_heads, shape.keys, shape.value_size}, dtype);
    if (features.query_scale) {
      query_scale = gauss(BroadcastableShape({shape.batch, shape.heads, shape.queries}, -1, random),
                          DType::kFloat64);
    }
    if (features.bias) {
      bias = gauss(
          BroadcastableShape({shape.batch, shape.heads, shape.queries, shape.keys}, -1, random),
          DType::kFloat64);
    }
    if (features.alibi) {
      alibi_slopes = StoredTensor(DType::kFloat64, {shape.heads});
      for (int64_t h = 0; h < shape.heads; ++h) {
        alibi_slopes.Set({h}, h == 0 ? 0.5 : random->Uniform(0.0, 1.0));
      }
    }
    if (features.alpha_per_head) {
      alpha_per_head = StoredTensor(DType::kFloat64, {shape.heads});
      for (int64_t h = 0; h < shape.heads; ++h) {
        alpha_per_head.Set({h}, h == 0 ? alpha : random->Pick<double>({0.6, 1.0, 1.1, 1.25, 1.3}));
      }
    }
    if (features.key_mask) {
      key_mask = StoredTensor(DType::kUInt8, {random->Chance(0.5) ? shape.batch : 1, shape.keys});
      for (int64_t i = 0; i < key_mask.size(); ++i) {
        key_mask.Set(Unravel(key_mask.shape(), i), random->Chance(0.75) ? 1.0 : 0.0);
      }
    }
    if (features.key_lengths) {
      key_lengths =
          StoredTensor(random->Chance(0.5) ? DType::kInt32 : DType::kInt64, {shape.batch});
      for (int64_t b = 0; b < shape.batch; ++b) {
        key_lengths.Set({b}, static_cast<double>(random->Integer(0, shape.keys)));
      }
    }
    if (features.window_left) window_left_ = random->Integer(0, shape.keys);
    if (features.window_right) window_right_ = random->Integer(0, shape.keys);
    if (features.packed) {
      const int64_t sequences = random->Integer(1, 4);
      cu_query = Boundaries(sequences, shape.queries, random);
      cu_key = Boundaries(sequences, shape.keys, random);
    }
  }

  const AttentionShape& shape() const { return shape_; }

  // The views of the tensors as they are now.
  AttentionProblem problem() const {
    AttentionProblem problem;
    problem.query = query.view();
    problem.key = key.view();
    problem.value = value.view();
    problem.alpha = alpha_;
    problem.causal = features_.causal;
    if (features_.window_left) problem.window_left = window_left_;
    if (features_.window_right) problem.window_right = window_right_;
    if (features_.softcap) problem.softcap = 1.5;
    if (features_.query_scale) problem.query_scale = query_scale.view();
    if (features_.bias) problem.bias = bias.view();
    if (features_.alibi) problem.alibi_slopes = alibi_slopes.view();
    if (features_.alpha_per_head) problem.alpha_per_head = alpha_per_head.view();
    if (features_.key_mask) problem.key_mask = key_mask.view();
    if (features_.key_lengths) problem.key_lengths = key_lengths.view();
    if (features_.packed) {
      problem.cu_query = cu_query.view();
      problem.cu_key = cu_key.view();
    }
    return problem;
  }

  StoredTensor query, key, value;
  StoredTensor query_scale, bias, alibi_slopes, alpha_per_head;
  StoredTensor key_mask, key_lengths, cu_query, cu_key;

 private:
  // sequences + 1 ascending numbers from 0 to `end`.
  static StoredTensor Boundaries(int64_t sequences, int64_t end, Random* random) {
    std::vector<double> values(sequences + 1, 0.0);
    for (int64_t b = 1; b < sequences; ++b) {
      values[b] = static_cast<double>(random->Integer(0, end));
    }
    values[sequences] = static_cast<double>(end);
    std::sort(values.begin(), values.end());
    StoredTensor tensor(random->Chance(0.5) ? DType::kInt32 : DType::kInt64, {sequences + 1});
    tensor.SetValues(values);
    return tensor;
  }

  AttentionShape shape_;
  double alpha_;
  AttentionFeatures features_;
  int64_t window_left_ = 0;
  int64_t window_right_ = 0;
};

}  // namespace flash_entmax::testing

#endif  // FLASH_ENTMAX_TESTS_TESTING_ATTENTION_CASE_H_
