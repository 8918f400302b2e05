#include "cuda/fused_layers.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/autograd/custom_function.h>

#include "cuda/kernels.h"

namespace flash_entmax::lab::cuda {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void Check(cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

cudaStream_t Stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

const __nv_bfloat16* Read(const at::Tensor& tensor) {
  return static_cast<const __nv_bfloat16*>(tensor.const_data_ptr());
}
__nv_bfloat16* Write(const at::Tensor& tensor) {
  return static_cast<__nv_bfloat16*>(tensor.mutable_data_ptr());
}

// The sum of [kPartialRows, ...] over the first dimension, flat, in bfloat16.
at::Tensor Sum(const at::Tensor& partial) {
  at::Tensor sum =
      at::empty({partial.numel() / kPartialRows}, partial.options().dtype(at::kBFloat16));
  Check(Launch(SumOfPartials{partial.const_data_ptr<float>(), Write(sum), sum.numel()}, Stream()));
  return sum;
}

class AddAndNormFunction : public torch::autograd::Function<AddAndNormFunction> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& stream_given,
                               const at::Tensor& update_given, const at::Tensor& post,
                               const at::Tensor& pre) {
    const at::Tensor stream = stream_given.contiguous(), update = update_given.contiguous();
    const at::Tensor new_stream = at::empty_like(stream), normed = at::empty_like(update);
    const at::Tensor inverse = at::empty({stream.size(0), 2}, stream.options());
    Check(
        Launch(AddAndNormForward{stream.const_data_ptr<float>(), Read(update), Read(post),
                                 Read(pre), new_stream.mutable_data_ptr<float>(), Write(normed),
                                 inverse.mutable_data_ptr<float>(), stream.size(0), stream.size(1)},
               Stream()));
    context->save_for_backward({new_stream, update, post, pre, inverse});
    return {new_stream, normed};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &new_stream = saved[0], &update = saved[1];
    // The stream that leaves the last layer has no reader of its own.
    const at::Tensor stream_in =
        gradients[0].defined() ? gradients[0].contiguous() : at::zeros_like(new_stream);
    const at::Tensor normed_in = gradients[1].contiguous();
    const at::Tensor stream_out = at::empty_like(new_stream), update_out = at::empty_like(update);
    const int64_t width = update.size(1);
    const at::Tensor partial = at::empty({kPartialRows, 2, width}, new_stream.options());
    Check(
        Launch(AddAndNormBackward{new_stream.const_data_ptr<float>(), Read(update), Read(saved[2]),
                                  Read(saved[3]), saved[4].const_data_ptr<float>(),
                                  stream_in.const_data_ptr<float>(), Read(normed_in),
                                  stream_out.mutable_data_ptr<float>(), Write(update_out),
                                  partial.mutable_data_ptr<float>(), update.size(0), width},
               Stream()));
    const at::Tensor weights = Sum(partial).view({2, width});
    return {stream_out, update_out, weights[0], weights[1]};
  }
};

class EmbedAndNormFunction : public torch::autograd::Function<EmbedAndNormFunction> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& tokens_given,
                               const at::Tensor& embedding_given, const at::Tensor& weight,
                               double scale) {
    const at::Tensor tokens = tokens_given.contiguous(), embedding = embedding_given.contiguous();
    const int64_t rows = tokens.size(0), width = embedding.size(1);
    const at::Tensor stream = at::empty({rows, width}, embedding.options().dtype(at::kFloat));
    const at::Tensor normed = at::empty({rows, width}, embedding.options());
    const at::Tensor inverse = at::empty({rows}, stream.options());
    Check(Launch(EmbedAndNormForward{tokens.const_data_ptr<int64_t>(), Read(embedding),
                                     Read(weight), stream.mutable_data_ptr<float>(), Write(normed),
                                     inverse.mutable_data_ptr<float>(), static_cast<float>(scale),
                                     rows, width},
                 Stream()));
    context->save_for_backward({tokens, stream, weight, inverse});
    context->saved_data["scale"] = scale;
    context->saved_data["entries"] = embedding.size(0);
    return {stream, normed};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &tokens = saved[0], &stream = saved[1];
    const at::Tensor stream_in = gradients[0].contiguous(), normed_in = gradients[1].contiguous();
    const int64_t rows = stream.size(0), width = stream.size(1);
    const at::Tensor row_gradient = at::empty_like(normed_in);
    const at::Tensor partial = at::empty({kPartialRows, width}, stream.options());
    Check(Launch(EmbedAndNormBackward{stream.const_data_ptr<float>(), Read(saved[2]),
                                      saved[3].const_data_ptr<float>(),
                                      stream_in.const_data_ptr<float>(), Read(normed_in),
                                      Write(row_gradient), partial.mutable_data_ptr<float>(),
                                      static_cast<float>(context->saved_data["scale"].toDouble()),
                                      rows, width},
                 Stream()));
    // A product instead of a scatter: deterministic.
    const at::Tensor one_hot =
        at::arange(context->saved_data["entries"].toInt(), tokens.options()).unsqueeze(1) == tokens;
    return {at::Tensor(), at::mm(one_hot.to(row_gradient.scalar_type()), row_gradient),
            Sum(partial), at::Tensor()};
  }
};

class GatedUnitFunction : public torch::autograd::Function<GatedUnitFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& given) {
    const at::Tensor gate_up = given.contiguous();
    const int64_t rows = gate_up.size(0), mlp = gate_up.size(1) / 2;
    at::Tensor output = at::empty({rows, mlp}, gate_up.options());
    Check(Launch(GatedUnitCall{Read(gate_up), nullptr, Write(output), rows, mlp}, Stream()));
    context->save_for_backward({gate_up});
    return output;
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const at::Tensor gate_up = context->get_saved_variables()[0];
    const at::Tensor gradient = gradients[0].contiguous();
    const at::Tensor result = at::empty_like(gate_up);
    Check(Launch(GatedUnitCall{Read(gate_up), Read(gradient), Write(result), gate_up.size(0),
                               gate_up.size(1) / 2},
                 Stream()));
    return {result};
  }
};

class AdaptiveScaleFunction : public torch::autograd::Function<AdaptiveScaleFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& given,
                            const at::Tensor& bias_given, int64_t plain) {
    const at::Tensor projected = given.contiguous(), bias = bias_given.contiguous();
    at::Tensor factor =
        at::empty({projected.size(0), projected.size(1), plain + projected.size(2) / 2},
                  projected.options().dtype(at::kFloat));
    Check(Launch(Call(projected, bias, nullptr, factor, plain), Stream()));
    context->save_for_backward({projected, bias});
    context->saved_data["plain"] = plain;
    return factor;
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor gradient = gradients[0].contiguous();
    const at::Tensor result = at::empty(saved[0].sizes(), gradient.options());
    Check(Launch(Call(saved[0], saved[1], gradient.const_data_ptr<float>(), result,
                      context->saved_data["plain"].toInt()),
                 Stream()));
    const at::ScalarType type = saved[0].scalar_type();
    return {result.to(type), result.sum(at::IntArrayRef({0, 1})).to(type), at::Tensor()};
  }

 private:
  static AdaptiveScaleCall Call(const at::Tensor& projected, const at::Tensor& bias,
                                const float* gradient, const at::Tensor& result, int64_t plain) {
    return {projected.const_data_ptr(),
            bias.const_data_ptr(),
            projected.scalar_type() == at::kBFloat16,
            gradient,
            result.mutable_data_ptr<float>(),
            projected.size(0) * projected.size(1),
            projected.size(1),
            plain,
            projected.size(2) / 2};
  }
};

}  // namespace

bool CanFuse(const at::Tensor& rows) {
  const int64_t width = rows.size(1), chunks = width / 128;
  return rows.is_cuda() && rows.scalar_type() == at::kBFloat16 && width % 128 == 0 &&
         width <= kMostWidth && chunks != 5 && chunks != 7;
}

std::pair<at::Tensor, at::Tensor> EmbedAndNorm(const at::Tensor& tokens,
                                               const at::Tensor& embedding,
                                               const at::Tensor& weight, double scale) {
  const variable_list results = EmbedAndNormFunction::apply(tokens, embedding, weight, scale);
  return {results[0], results[1]};
}

std::pair<at::Tensor, at::Tensor> AddAndNorm(const at::Tensor& stream, const at::Tensor& update,
                                             const at::Tensor& post, const at::Tensor& pre) {
  const variable_list results = AddAndNormFunction::apply(stream, update, post, pre);
  return {results[0], results[1]};
}

at::Tensor GatedUnit(const at::Tensor& gate_up) { return GatedUnitFunction::apply(gate_up); }

at::Tensor AdaptiveScale(const at::Tensor& projected, const at::Tensor& bias, int64_t plain) {
  return AdaptiveScaleFunction::apply(projected, bias, plain);
}

}  // namespace flash_entmax::lab::cuda
