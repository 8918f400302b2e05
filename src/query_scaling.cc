// Query scaling: checks, and one pass over the rows. It is a number a query row against a row of
// scores in attention, so plain loops in double serve.

#include "flash_entmax/query_scaling.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "math/element.h"
#include "views.h"

namespace flash_entmax {
namespace {

using Index = std::array<int64_t, 3>;  // batch, head, query

int64_t OffsetOf(const TensorView& view, const Index& index) {
  return index[0] * view.strides[0] + index[1] * view.strides[1] + index[2] * view.strides[2];
}

// The parameters, broadcast to the rows.
struct Resolved {
  Shape shape;
  TensorView beta;
  TensorView gamma;
  TensorView positions;
};

Status BroadcastFloating(const std::string& name, const TensorView& tensor, const Shape& shape,
                         TensorView* result) {
  if (!tensor && tensor.rank == 0) return BadArgument(name, "nothing", "a tensor");
  if (!IsFloating(tensor.dtype)) return BadArgument(name, NameOf(tensor.dtype), "floating point");
  if (Status status = CheckView(name, tensor); !status.ok()) return status;
  Expected<TensorView> view = BroadcastTo(name, tensor, shape);
  if (!view.ok()) return view.status();
  *result = *view;
  return Status::Ok();
}

template <typename Body>
void ForEachRow(const Shape& shape, const Body& body) {
  for (int64_t b = 0; b < shape.size[0]; ++b) {
    for (int64_t h = 0; h < shape.size[1]; ++h) {
      for (int64_t i = 0; i < shape.size[2]; ++i) body(Index{b, h, i});
    }
  }
}

Status BroadcastPositions(const QueryScaling& scaling, Resolved* resolved) {
  if (scaling.first_position < 0) {
    return BadArgument("first_position", std::to_string(scaling.first_position), "≥ 0");
  }
  const TensorView& positions = scaling.positions;
  if (!positions) return Status::Ok();
  if (positions.dtype != DType::kInt32 && positions.dtype != DType::kInt64) {
    return BadArgument("positions", NameOf(positions.dtype), "int32 or int64");
  }
  if (Status status = CheckView("positions", positions); !status.ok()) return status;
  Expected<TensorView> view = BroadcastTo("positions", positions, resolved->shape);
  if (!view.ok()) return view.status();
  resolved->positions = *view;
  Status status = Status::Ok();
  ForEachRow(resolved->shape, [&](const Index& index) {
    const double position = ReadElement(*view, OffsetOf(*view, index));
    if (status.ok() && position < 0.0) {
      status = BadArgument("positions", std::to_string(static_cast<int64_t>(position)), "≥ 0");
    }
  });
  return status;
}

// `rows` is query_scale or its gradient.
Expected<Resolved> Resolve(const QueryScaling& scaling, const std::string& name,
                           const TensorView& rows) {
  if (!rows && rows.rank == 0) return BadArgument(name, "nothing", "a tensor");
  if (!IsFloating(rows.dtype)) return BadArgument(name, NameOf(rows.dtype), "floating point");
  if (rows.rank != 3) {
    return BadArgument(name, "shape " + ShapeToString(rows), "[batch, heads, query_length]");
  }
  if (Status status = CheckView(name, rows); !status.ok()) return status;
  Resolved resolved;
  resolved.shape = ShapeOf(rows);
  if (Status status = BroadcastFloating("beta", scaling.beta, resolved.shape, &resolved.beta);
      !status.ok()) {
    return status;
  }
  if (scaling.kind == QueryScalingKind::kAsEntmax) {
    if (Status status = BroadcastFloating("gamma", scaling.gamma, resolved.shape, &resolved.gamma);
        !status.ok()) {
      return status;
    }
    if (!std::isfinite(scaling.delta)) {
      return BadArgument("delta", Number(scaling.delta), "finite");
    }
  } else if (scaling.gamma) {
    return BadArgument("gamma", "a tensor", "left out with kSsmax");
  }
  if (Status status = BroadcastPositions(scaling, &resolved); !status.ok()) return status;
  return resolved;
}

// log(i + 2) of a row.
double LogPosition(const QueryScaling& scaling, const Resolved& resolved, const Index& index) {
  const TensorView& positions = resolved.positions;
  const double position =
      positions ? ReadElement(positions, OffsetOf(positions, index))
                : static_cast<double>(scaling.first_position) + static_cast<double>(index[2]);
  return std::log(position + 2.0);
}

// Sums over the rows that share an element of a parameter, in the order of rows.
class ParameterSums {
 public:
  ParameterSums(const MutableTensorView& out, int rank) : out_(out) {
    int64_t elements = 1;
    for (int d = out.rank - 1; d >= 0; --d) {
      if (out.shape[d] != 1) stride_[static_cast<size_t>(d + rank - out.rank)] = elements;
      elements *= out.shape[d];
    }
    if (out) sums_.assign(static_cast<size_t>(elements), 0.0);
  }

  void Add(const Index& index, double value) {
    if (!out_) return;
    sums_[static_cast<size_t>(index[0] * stride_[0] + index[1] * stride_[1] +
                              index[2] * stride_[2])] += value;
  }

  void Write() const {
    for (size_t e = 0; e < sums_.size(); ++e) {
      auto rest = static_cast<int64_t>(e);
      int64_t offset = 0;
      for (int d = out_.rank - 1; d >= 0; --d) {
        offset += rest % out_.shape[d] * out_.strides[d];
        rest /= out_.shape[d];
      }
      WriteElement(out_, offset, sums_[e]);
    }
  }

 private:
  MutableTensorView out_;
  Index stride_{};
  std::vector<double> sums_;
};

Status CheckParameterGradient(const std::string& name, const MutableTensorView& gradient,
                              const TensorView& parameter) {
  if (!gradient) return Status::Ok();
  if (!IsFloating(gradient.dtype)) {
    return BadArgument(name, NameOf(gradient.dtype), "floating point");
  }
  bool same = gradient.rank == parameter.rank;
  for (int d = 0; same && d < parameter.rank; ++d) {
    same = gradient.shape[d] == parameter.shape[d];
  }
  if (!same) {
    return BadArgument(name, "shape " + ShapeToString(gradient.view()),
                       "that of its parameter, " + ShapeToString(parameter));
  }
  return CheckWritable(name, gradient);
}

}  // namespace

Status QueryScaleForward(const QueryScaling& scaling, const MutableTensorView& query_scale) {
  const Expected<Resolved> checked = Resolve(scaling, "query_scale", query_scale.view());
  if (!checked.ok()) return checked.status();
  const Resolved& resolved = *checked;
  if (Status status = CheckWritable("query_scale", query_scale); !status.ok()) return status;
  for (const Status& status :
       {CheckDisjoint("query_scale", query_scale.view(), "beta", scaling.beta),
        CheckDisjoint("query_scale", query_scale.view(), "gamma", scaling.gamma),
        CheckDisjoint("query_scale", query_scale.view(), "positions", scaling.positions)}) {
    if (!status.ok()) return status;
  }
  ForEachRow(resolved.shape, [&](const Index& index) {
    const double log_position = LogPosition(scaling, resolved, index);
    const double beta = ReadElement(resolved.beta, OffsetOf(resolved.beta, index));
    double scale = beta * log_position;
    if (scaling.kind == QueryScalingKind::kAsEntmax) {
      const double gamma = ReadElement(resolved.gamma, OffsetOf(resolved.gamma, index));
      scale = scaling.delta + beta * std::pow(log_position, gamma);
    }
    WriteElement(query_scale, OffsetOf(query_scale.view(), index), scale);
  });
  return Status::Ok();
}

Status QueryScaleBackward(const QueryScaling& scaling, const TensorView& grad_query_scale,
                          const QueryScalingGradients& gradients) {
  const Expected<Resolved> checked = Resolve(scaling, "grad_query_scale", grad_query_scale);
  if (!checked.ok()) return checked.status();
  const Resolved& resolved = *checked;
  if (gradients.gamma && scaling.kind != QueryScalingKind::kAsEntmax) {
    return BadArgument("grad_gamma", "a tensor", "left out with kSsmax");
  }
  for (const Status& status :
       {CheckParameterGradient("grad_beta", gradients.beta, scaling.beta),
        CheckParameterGradient("grad_gamma", gradients.gamma, scaling.gamma),
        CheckDisjoint("grad_gamma", gradients.gamma.view(), "grad_beta", gradients.beta.view())}) {
    if (!status.ok()) return status;
  }
  for (const auto& [name, gradient] :
       {std::pair<const char*, const MutableTensorView*>{"grad_beta", &gradients.beta},
        {"grad_gamma", &gradients.gamma}}) {
    for (const Status& status :
         {CheckDisjoint(name, gradient->view(), "grad_query_scale", grad_query_scale),
          CheckDisjoint(name, gradient->view(), "beta", scaling.beta),
          CheckDisjoint(name, gradient->view(), "gamma", scaling.gamma),
          CheckDisjoint(name, gradient->view(), "positions", scaling.positions)}) {
      if (!status.ok()) return status;
    }
  }
  try {
    ParameterSums beta_sums(gradients.beta, 3);
    ParameterSums gamma_sums(gradients.gamma, 3);
    ForEachRow(resolved.shape, [&](const Index& index) {
      const double log_position = LogPosition(scaling, resolved, index);
      const double grad = ReadElement(grad_query_scale, OffsetOf(grad_query_scale, index));
      if (scaling.kind == QueryScalingKind::kSsmax) {
        beta_sums.Add(index, grad * log_position);
        return;
      }
      const double gamma = ReadElement(resolved.gamma, OffsetOf(resolved.gamma, index));
      const double power = std::pow(log_position, gamma);
      beta_sums.Add(index, grad * power);
      const double beta = ReadElement(resolved.beta, OffsetOf(resolved.beta, index));
      gamma_sums.Add(index, grad * beta * power * std::log(log_position));
    });
    beta_sums.Write();
    gamma_sums.Write();
  } catch (const std::bad_alloc&) {
    return Status::OutOfMemory("beta: no memory for the sums of its gradient");
  }
  return Status::Ok();
}

}  // namespace flash_entmax
