// A small decoder: Gemma 2's blocks (RMSNorm before, or before and after, each sublayer; gated MLP
// with gelu; embeddings times √width; output head of its own) around a choice of attention.
//
// All parameters live in one flat tensor, so that the optimizer, the checkpoint, gradient clipping
// and the copy to lower precision are each one operation. Forward takes the flat tensor and splits
// it; the gradient of the split is one concatenation.

#ifndef FLASH_ENTMAX_LAB_MODEL_H_
#define FLASH_ENTMAX_LAB_MODEL_H_

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "attention.h"
#include "config.h"
#include "muon.h"

namespace flash_entmax::lab {

// Called with each layer's number and the inputs of its attention.
using AttentionObserver = std::function<void(int64_t, const AttentionInputs&)>;

class Model {
 public:
  Model(const ModelConfig& config, int64_t vocabulary, at::Device device, at::ScalarType compute);

  int64_t num_parameters() const { return total_; }
  // First values, float32 on the CPU: the same on every machine.
  at::Tensor Initialise(uint64_t seed) const;
  // Zeroes what belongs to ModelConfig::zero_token, if there is one. flat: [num_parameters],
  // parameters or their gradient.
  void ClearZeroToken(at::Tensor flat) const;
  // The matrices between the layers' norms, by offset.
  std::vector<HiddenMatrix> HiddenMatrices() const;
  // The value of a named parameter, as "layer0.qkv"; undefined if there is none.
  at::Tensor Find(const at::Tensor& parameters, const std::string& name) const;

  // parameters: [num_parameters] of the compute type. tokens: [batch, length] int64. index:
  // [batch·targets] int64 rows of the flattened tokens whose next token is asked for. Returns
  // [batch·targets, padded vocabulary] of the compute type.
  at::Tensor Forward(const at::Tensor& parameters, const at::Tensor& tokens,
                     const at::Tensor& index, const AttentionObserver& observer = nullptr) const;

 private:
  struct Parameter {
    std::string name;
    std::vector<int64_t> shape;
    double mean = 0.0;
    double deviation = 0.0;
  };
  using Pieces = std::vector<at::Tensor>;

  void Add(const std::string& name, std::vector<int64_t> shape, double mean, double deviation);
  void AddLayer(int64_t layer);
  const at::Tensor& Piece(const Pieces& pieces, int64_t layer, const char* name) const;
  int64_t IndexOf(const std::string& name) const;
  // [batch·length, width] normed hidden state → [batch·length, width].
  at::Tensor Attend(const Pieces& pieces, int64_t layer, const at::Tensor& hidden, int64_t batch,
                    int64_t length, const AttentionObserver& observer) const;
  at::Tensor Rotate(const at::Tensor& qkv) const;

  const ModelConfig config_;
  const at::ScalarType compute_;
  const int64_t vocabulary_;  // padded to a multiple of 8, which matrix products want
  const int64_t head_size_;
  int64_t plain_heads_ = 0;  // the first heads, whose scores are not scaled (those with slopes)
  std::vector<Parameter> parameters_;
  std::vector<int64_t> sizes_;
  int64_t total_ = 0;
  at::Tensor slopes_;  // [heads], or undefined
};

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_MODEL_H_
