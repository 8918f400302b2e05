#include "model.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "layers.h"
#include "random.h"

namespace flash_entmax::lab {
namespace {

constexpr uint64_t kInitialisationStream = 0x696E;
// The decay gate of selective attention starts by forgetting 1.8 % a token.
constexpr double kDecayStart = -4.0;
constexpr double kWriteStart = 2.0;

}  // namespace

Model::Model(const ModelConfig& config, int64_t vocabulary, at::Device device,
             at::ScalarType compute)
    : config_(config),
      compute_(compute),
      vocabulary_((vocabulary + 7) / 8 * 8),
      head_size_(config.width / config.heads) {
  const int64_t heads = config.heads;
  if (config.positions == Positions::kAlibi || config.positions == Positions::kNape) {
    // ALiBi: 2^(−8h/H) (Press, Smith & Lewis 2022). NAPE: 1, 1/2, …, 1/(H/2), then none.
    at::Tensor slopes = at::zeros({heads}, at::kFloat);
    plain_heads_ = config.positions == Positions::kAlibi ? heads : heads / 2;
    for (int64_t head = 0; head < plain_heads_; ++head) {
      const auto number = static_cast<double>(head + 1);
      slopes[head] = config.positions == Positions::kAlibi
                         ? std::exp2(-8.0 * number / static_cast<double>(heads))
                         : 1.0 / number;
    }
    slopes_ = slopes.to(device);
    // With slopes everywhere every head is scaled: there would be no head left otherwise.
    if (config.positions == Positions::kAlibi) plain_heads_ = 0;
  }
  Add("embedding", {vocabulary_, config.width}, 0.0, config.init);
  Add("head", {config.width, vocabulary_}, 0.0, config.init);
  Add("final_norm", {config.width}, 0.0, 0.0);
  for (int64_t layer = 0; layer < config.layers; ++layer) AddLayer(layer);
  // Products want operands aligned to 8 elements: what is smaller goes to the end.
  std::stable_partition(parameters_.begin(), parameters_.end(), [](const Parameter& parameter) {
    int64_t size = 1;
    for (const int64_t extent : parameter.shape) size *= extent;
    return size % 8 == 0;
  });
  for (const Parameter& parameter : parameters_) {
    int64_t size = 1;
    for (const int64_t extent : parameter.shape) size *= extent;
    sizes_.push_back(size);
    total_ += size;
  }
}

void Model::Add(const std::string& name, std::vector<int64_t> shape, double mean,
                double deviation) {
  parameters_.push_back({name, std::move(shape), mean, deviation});
}

void Model::AddLayer(int64_t layer) {
  const std::string prefix = "layer" + std::to_string(layer) + ".";
  const int64_t width = config_.width, heads = config_.heads;
  const int64_t scaled = heads - plain_heads_;
  Add(prefix + "qkv", {width, 3 * width}, 0.0, config_.init);
  Add(prefix + "out", {width, width}, 0.0, config_.init);
  Add(prefix + "gate_up", {width, 2 * config_.mlp}, 0.0, config_.init);
  Add(prefix + "down", {config_.mlp, width}, 0.0, config_.init);
  Add(prefix + "attention_norm", {width}, 0.0, 0.0);
  Add(prefix + "mlp_norm", {width}, 0.0, 0.0);
  if (config_.norm == Norm::kPreAndPost) {
    Add(prefix + "attention_post_norm", {width}, 0.0, 0.0);
    Add(prefix + "mlp_post_norm", {width}, 0.0, 0.0);
  }
  switch (config_.attention) {
    case AttentionKind::kSsmax:
      Add(prefix + "ssmax", {scaled}, 1.0, 0.01);
      break;
    case AttentionKind::kAsentmax: {
      // softplus(b) = start − 1 at the first step; 0 with random projections.
      const double beta =
          config_.scaler_random ? 0.0 : std::log(std::expm1(config_.scaler_start - 1.0));
      Add(prefix + "scaler", {width, 2 * scaled}, 0.0, config_.scaler_random ? 0.02 : 0.0);
      Add(prefix + "scaler_bias_beta", {scaled}, beta, 0.0);
      Add(prefix + "scaler_bias_gamma", {scaled}, 0.0, 0.0);
      break;
    }
    case AttentionKind::kEntmaxLearnable:
      // α = 1 + sigmoid(a).
      Add(prefix + "alpha", {heads}, std::log((config_.alpha - 1.0) / (2.0 - config_.alpha)), 0.0);
      break;
    case AttentionKind::kSelectiveLinear:
      Add(prefix + "gates", {width, 2 * heads}, 0.0, config_.init);
      Add(prefix + "decay_bias", {heads}, kDecayStart, 0.0);
      Add(prefix + "write_bias", {heads}, kWriteStart, 0.0);
      break;
    case AttentionKind::kSoftmax:
    case AttentionKind::kEntmax:
    case AttentionKind::kLinear:
      break;
  }
}

int64_t Model::IndexOf(const std::string& name) const {
  for (size_t i = 0; i < parameters_.size(); ++i) {
    if (parameters_[i].name == name) return static_cast<int64_t>(i);
  }
  return -1;
}

at::Tensor Model::Initialise(uint64_t seed) const {
  at::Tensor values = at::zeros({total_}, at::kFloat);
  float* at = values.mutable_data_ptr<float>();
  for (size_t i = 0; i < parameters_.size(); ++i) {
    Random random(seed, kInitialisationStream, i);
    const Parameter& parameter = parameters_[i];
    for (int64_t element = 0; element < sizes_[i]; ++element) {
      const double noise = parameter.deviation > 0.0 ? parameter.deviation * random.Gauss() : 0.0;
      *at++ = static_cast<float>(parameter.mean + noise);
    }
  }
  ClearZeroToken(values);
  return values;
}

void Model::ClearZeroToken(at::Tensor flat) const {
  if (config_.zero_token >= 0) Find(flat, "embedding")[config_.zero_token].zero_();
}

at::Tensor Model::Find(const at::Tensor& parameters, const std::string& name) const {
  const int64_t index = IndexOf(name);
  if (index < 0) return {};
  int64_t offset = 0;
  for (int64_t i = 0; i < index; ++i) offset += sizes_[static_cast<size_t>(i)];
  const auto i = static_cast<size_t>(index);
  return parameters.narrow(0, offset, sizes_[i]).view(parameters_[i].shape);
}

std::vector<HiddenMatrix> Model::HiddenMatrices() const {
  std::vector<HiddenMatrix> matrices;
  int64_t offset = 0;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& parameter = parameters_[i];
    const size_t dot = parameter.name.find('.');
    const std::string kind = dot == std::string::npos ? "" : parameter.name.substr(dot + 1);
    const int64_t parts = kind == "qkv"                     ? 3
                          : kind == "gate_up"               ? 2
                          : kind == "out" || kind == "down" ? 1
                                                            : 0;
    if (parts > 0) matrices.push_back({offset, parameter.shape[0], parameter.shape[1], parts});
    offset += sizes_[i];
  }
  return matrices;
}

const at::Tensor& Model::Piece(const Pieces& pieces, int64_t layer, const char* name) const {
  static const at::Tensor none;
  const int64_t index =
      IndexOf(layer < 0 ? name : "layer" + std::to_string(layer) + "." + std::string(name));
  return index < 0 ? none : pieces[static_cast<size_t>(index)];
}

at::Tensor Model::Rotate(const at::Tensor& qkv) const {
  // Rotary embedding (Su et al. 2021): pairs (x_d, x_{d + size/2}) turned by i·base^(−2d/size).
  const int64_t length = qkv.size(1), half = head_size_ / 2;
  const auto options = qkv.options().dtype(at::kFloat);
  const at::Tensor frequency =
      (at::arange(half, options) * (-std::log(config_.rope_base) / static_cast<double>(half)))
          .exp();
  const at::Tensor angle = at::arange(length, options).view({length, 1, 1, 1}) * frequency;
  const at::Tensor cosine = angle.cos().to(qkv.scalar_type());
  const at::Tensor sine = angle.sin().to(qkv.scalar_type());
  const at::Tensor query_key = qkv.narrow(2, 0, 2);
  const at::Tensor low = query_key.narrow(4, 0, half), high = query_key.narrow(4, half, half);
  return at::cat(
      {at::cat({low * cosine - high * sine, high * cosine + low * sine}, 4), qkv.narrow(2, 2, 1)},
      2);
}

at::Tensor Model::Attend(const Pieces& pieces, int64_t layer, const at::Tensor& hidden,
                         int64_t batch, int64_t length, const AttentionObserver& observer) const {
  const auto piece = [&](const char* name) -> const at::Tensor& {
    return Piece(pieces, layer, name);
  };
  const int64_t heads = config_.heads;
  AttentionInputs inputs;
  inputs.qkv = at::mm(hidden, piece("qkv")).view({batch, length, 3, heads, head_size_});
  if (config_.positions == Positions::kRope) inputs.qkv = Rotate(inputs.qkv);
  inputs.slopes = slopes_;
  inputs.fixed_alpha = config_.alpha;
  const int64_t scaled = heads - plain_heads_;
  const auto float_options = inputs.qkv.options().dtype(at::kFloat);
  at::Tensor decay, write;
  switch (config_.attention) {
    case AttentionKind::kSoftmax:
      inputs.fixed_alpha = 1.0;
      break;
    case AttentionKind::kSsmax: {
      inputs.fixed_alpha = 1.0;
      const at::Tensor position =
          at::arange(2, length + 2, float_options).log().view({1, length, 1});
      const at::Tensor factor = (position * piece("ssmax").to(at::kFloat)).expand({batch, -1, -1});
      inputs.query_scale =
          plain_heads_ == 0
              ? factor
              : at::cat({at::ones({batch, length, plain_heads_}, float_options), factor}, 2);
      break;
    }
    case AttentionKind::kEntmax:
      break;
    case AttentionKind::kEntmaxLearnable:
      inputs.alpha = 1.0 + piece("alpha").to(at::kFloat).sigmoid();
      break;
    case AttentionKind::kAsentmax: {
      const at::Tensor bias = at::cat({piece("scaler_bias_beta"), piece("scaler_bias_gamma")}, 0);
      inputs.query_scale = AdaptiveScale(
          at::mm(hidden, piece("scaler")).view({batch, length, 2 * scaled}), bias, plain_heads_);
      break;
    }
    case AttentionKind::kLinear:
      break;
    case AttentionKind::kSelectiveLinear: {
      const at::Tensor gates =
          at::mm(hidden, piece("gates")).view({batch, length, 2 * heads}).to(at::kFloat);
      decay = -at::softplus(gates.narrow(2, 0, heads) + piece("decay_bias").to(at::kFloat));
      write = (gates.narrow(2, heads, heads) + piece("write_bias").to(at::kFloat)).sigmoid();
      break;
    }
  }
  const bool linear = config_.attention == AttentionKind::kLinear ||
                      config_.attention == AttentionKind::kSelectiveLinear;
  if (observer && !linear) observer(layer, inputs);
  at::Tensor output;
  if (linear) {
    output = LinearAttention(inputs, decay, write);
  } else if (inputs.fixed_alpha == 1.0 && !inputs.alpha.defined() && inputs.qkv.is_cuda()) {
    output = ComposedSoftmax(inputs);
  } else {
    output = EngineAttention(inputs);
  }
  return output.reshape({batch * length, config_.width});
}

at::Tensor Model::Forward(const at::Tensor& parameters, const at::Tensor& tokens,
                          const at::Tensor& index, const AttentionObserver& observer) const {
  const int64_t batch = tokens.size(0), length = tokens.size(1);
  Pieces pieces = parameters.split_with_sizes(sizes_);
  for (size_t i = 0; i < pieces.size(); ++i) pieces[i] = pieces[i].view(parameters_[i].shape);
  auto [stream, hidden] = EmbedAndNorm(tokens.reshape({-1}), Piece(pieces, -1, "embedding"),
                                       Piece(pieces, 0, "attention_norm"), compute_);
  for (int64_t layer = 0; layer < config_.layers; ++layer) {
    const bool last = layer + 1 == config_.layers;
    at::Tensor attended = Attend(pieces, layer, hidden, batch, length, observer);
    if (last) {
      // Only the rows that predict something matter from here on.
      attended = attended.index_select(0, index);
      stream = stream.index_select(0, index);
    }
    std::tie(stream, hidden) = AddAndNorm(stream, at::mm(attended, Piece(pieces, layer, "out")),
                                          Piece(pieces, layer, "attention_post_norm"),
                                          Piece(pieces, layer, "mlp_norm"), compute_);
    const at::Tensor unit = GatedUnit(at::mm(hidden, Piece(pieces, layer, "gate_up")));
    std::tie(stream, hidden) = AddAndNorm(
        stream, at::mm(unit, Piece(pieces, layer, "down")), Piece(pieces, layer, "mlp_post_norm"),
        last ? Piece(pieces, -1, "final_norm") : Piece(pieces, layer + 1, "attention_norm"),
        compute_);
  }
  return at::mm(hidden, Piece(pieces, -1, "head"));
}

}  // namespace flash_entmax::lab
