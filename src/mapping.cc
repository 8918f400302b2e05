// Argument checks of the mappings, and the walk over rows of tensors with any strides.

#include "flash_entmax/mapping.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <string>
#include <vector>

#include "cpu/mapping_rows.h"
#include "cpu/parallel.h"
#include "math/element.h"
#include "views.h"

namespace flash_entmax {
namespace {

using cpu::RowMapping;

// Rows gathered at a time when a row's elements are not adjacent: neighbouring rows then share the
// cache lines that are read.
constexpr int64_t kRowsPerGather = 16;
// Elements that a thread takes at a time.
constexpr int64_t kElementsPerPiece = 1 << 15;

// The rows of a tensor along one dimension: the outer dimensions, and where the row lies in each of
// several tensors.
struct Rows {
  int64_t count = 1;
  int64_t length = 1;
  int outer_rank = 0;
  std::array<int64_t, kMaxRank> outer_shape{};
  std::array<int, kMaxRank> outer_dim{};

  Rows(const TensorView& tensor, int dim) : length(tensor.shape[dim]) {
    for (int i = 0; i < tensor.rank; ++i) {
      if (i == dim) continue;
      outer_shape[outer_rank] = tensor.shape[i];
      outer_dim[outer_rank++] = i;
      count *= tensor.shape[i];
    }
  }

  // Offset of row `row` of a tensor that has these outer dimensions.
  int64_t Offset(const std::array<int64_t, kMaxRank>& strides, int64_t row) const {
    int64_t offset = 0;
    for (int i = outer_rank - 1; i >= 0; --i) {
      offset += row % outer_shape[i] * strides[outer_dim[i]];
      row /= outer_shape[i];
    }
    return offset;
  }
};

float ToCompute(BFloat16 x) { return ToFloat(x); }
float ToCompute(Float16 x) { return ToFloat(x); }
float ToCompute(float x) { return x; }
double ToCompute(double x) { return x; }
template <typename T>
T FromCompute(double x) {
  return static_cast<T>(x);
}
template <typename T>
T FromCompute(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) return ToBFloat16(x);
  if constexpr (std::is_same_v<T, Float16>) return ToFloat16(x);
  if constexpr (std::is_same_v<T, float>) return x;
}
template <typename T>
using ComputeType = decltype(ToCompute(T{}));

// Dimension `dim` of a tensor of rank ≥ 1, counted from 0.
Expected<int> ResolveDim(const TensorView& tensor, int dim) {
  if (tensor.rank < 1) return BadArgument("scores", "rank 0", "of rank 1 to 8");
  if (dim < -tensor.rank || dim >= tensor.rank) {
    return BadArgument(
        "dim", std::to_string(dim),
        "in [" + std::to_string(-tensor.rank) + ", " + std::to_string(tensor.rank - 1) + "]");
  }
  return dim < 0 ? dim + tensor.rank : dim;
}

Shape RowShape(const TensorView& tensor, int dim) {
  Shape shape = ShapeOf(tensor);
  shape.size[dim] = 1;
  return shape;
}

Status CheckFloating(const std::string& name, const TensorView& tensor) {
  if (IsFloating(tensor.dtype)) return CheckView(name, tensor);
  return BadArgument(name, NameOf(tensor.dtype), "float64, float32, bfloat16 or float16");
}

Status CheckAlpha(MappingKind kind, double alpha) {
  if (kind == MappingKind::kEntmax && !(std::isfinite(alpha) && alpha > 0.0)) {
    return BadArgument("alpha", Number(alpha), "finite and > 0");
  }
  if (kind == MappingKind::kNormmax && !(std::isfinite(alpha) && alpha > 1.0)) {
    return BadArgument("alpha", Number(alpha), "finite and > 1 for normmax");
  }
  return Status::Ok();
}

Status CheckSameShape(const std::string& name, const TensorView& tensor, const std::string& other,
                      const TensorView& wanted) {
  bool same = tensor.rank == wanted.rank;
  for (int i = 0; same && i < tensor.rank; ++i) same = tensor.shape[i] == wanted.shape[i];
  if (!same) {
    return BadArgument(name, "shape " + ShapeToString(tensor),
                       "that of " + other + ", " + ShapeToString(wanted));
  }
  if (tensor.dtype != wanted.dtype) {
    return BadArgument(name, NameOf(tensor.dtype),
                       std::string("of the type of ") + other + ", " + NameOf(wanted.dtype));
  }
  return Status::Ok();
}

bool SameView(const TensorView& a, const TensorView& b) {
  if (a.data != b.data || a.rank != b.rank) return false;
  for (int i = 0; i < a.rank; ++i) {
    if (a.shape[i] > 1 && a.strides[i] != b.strides[i]) return false;
  }
  return true;
}

// Options that passed the checks, with everything broadcast to the tensor.
struct ResolvedOptions {
  int dim = 0;
  TensorView alpha;  // Empty if one for all.
  TensorView mask;   // Empty if none.
};

Expected<ResolvedOptions> Resolve(const TensorView& tensor, const MappingOptions& options) {
  Expected<int> dim = ResolveDim(tensor, options.dim);
  if (!dim.ok()) return dim.status();
  ResolvedOptions resolved;
  resolved.dim = *dim;
  switch (options.kind) {
    case MappingKind::kEntmax:
    case MappingKind::kNormmax:
      break;
    case MappingKind::kBudget: {
      const double most = static_cast<double>(tensor.shape[*dim]);
      if (!(options.budget > 0.0 && options.budget <= most) && tensor.num_elements() > 0) {
        return BadArgument("budget", Number(options.budget),
                           "> 0 and at most the row length, " + std::to_string(tensor.shape[*dim]));
      }
      break;
    }
    default:
      return BadArgument("kind", std::to_string(static_cast<int>(options.kind)),
                         "kEntmax, kNormmax or kBudget");
  }
  if (options.num_threads < 0) {
    return BadArgument("num_threads", std::to_string(options.num_threads), "≥ 0");
  }
  if (options.alpha_per_row) {
    const TensorView& alpha = options.alpha_per_row;
    if (alpha.dtype != DType::kFloat32 && alpha.dtype != DType::kFloat64) {
      return BadArgument("alpha_per_row", NameOf(alpha.dtype), "float32 or float64");
    }
    if (Status status = CheckView("alpha_per_row", alpha); !status.ok()) return status;
    Expected<TensorView> broadcast =
        BroadcastTo("alpha_per_row", alpha, RowShape(tensor, resolved.dim));
    if (!broadcast.ok()) return broadcast.status();
    resolved.alpha = *broadcast;
    const Rows rows(tensor, resolved.dim);
    if (rows.length > 0) {
      for (int64_t row = 0; row < rows.count; ++row) {
        const double value = ReadElement(resolved.alpha, rows.Offset(resolved.alpha.strides, row));
        if (Status status = CheckAlpha(options.kind, value); !status.ok()) {
          return Status::InvalidArgument("alpha_per_row: row " + std::to_string(row) + ", " +
                                         status.message());
        }
      }
    }
  } else if (Status status = CheckAlpha(options.kind, options.alpha); !status.ok()) {
    return status;
  }
  if (options.mask) {
    if (options.mask.dtype != DType::kUInt8) {
      return BadArgument("mask", NameOf(options.mask.dtype), "uint8");
    }
    if (Status status = CheckView("mask", options.mask); !status.ok()) return status;
    Expected<TensorView> broadcast = BroadcastTo("mask", options.mask, ShapeOf(tensor));
    if (!broadcast.ok()) return broadcast.status();
    resolved.mask = *broadcast;
  }
  return resolved;
}

// An optional result with one element a row.
Status CheckPerRow(const std::string& name, const MutableTensorView& tensor, const TensorView& like,
                   int dim, DType first, DType second) {
  if (!tensor) return Status::Ok();
  if (tensor.dtype != first && tensor.dtype != second) {
    return BadArgument(name, NameOf(tensor.dtype),
                       std::string(NameOf(first)) + " or " + NameOf(second));
  }
  if (Status status = CheckWritable(name, tensor); !status.ok()) return status;
  TensorView wanted = like;
  wanted.shape[dim] = 1;
  wanted.dtype = tensor.dtype;
  if (Status status = CheckSameShape(name, tensor.view(), "scores with size 1 at dim", wanted);
      !status.ok()) {
    return status;
  }
  return Status::Ok();
}

// A row as contiguous numbers of the type that is computed in: the tensor's own memory where that
// already is so, else a copy.
template <typename T>
class RowReader {
 public:
  using Compute = ComputeType<T>;

  RowReader(const TensorView& tensor, int dim, const Rows& rows)
      : data_(static_cast<const T*>(tensor.data)),
        strides_(tensor.strides),
        stride_(tensor.strides[dim]),
        rows_(rows),
        direct_(std::is_same_v<T, Compute> && (stride_ == 1 || rows.length == 1)) {}

  bool direct() const { return direct_; }

  // Rows [first, last) into `buffer`, `length` apart. Only for readers that are not direct.
  void Gather(int64_t first, int64_t last, Compute* buffer) const {
    int64_t offset[kRowsPerGather] = {};
    for (int64_t row = first; row < last; ++row) {
      offset[row - first] = rows_.Offset(strides_, row);
    }
    for (int64_t i = 0; i < rows_.length; ++i) {
      for (int64_t r = 0; r < last - first; ++r) {
        buffer[r * rows_.length + i] = ToCompute(data_[offset[r] + i * stride_]);
      }
    }
  }

  const Compute* Direct(int64_t row) const {
    if constexpr (std::is_same_v<T, Compute>) return data_ + rows_.Offset(strides_, row);
    return nullptr;
  }

 private:
  const T* data_;
  std::array<int64_t, kMaxRank> strides_;
  int64_t stride_;
  const Rows& rows_;
  bool direct_;
};

// The same for results.
template <typename T>
class RowWriter {
 public:
  using Compute = ComputeType<T>;

  RowWriter(const MutableTensorView& tensor, int dim, const Rows& rows)
      : data_(static_cast<T*>(tensor.data)),
        strides_(tensor.strides),
        stride_(tensor.strides[dim]),
        rows_(rows),
        direct_(std::is_same_v<T, Compute> && (stride_ == 1 || rows.length == 1)) {}

  bool direct() const { return direct_; }

  void Scatter(int64_t first, int64_t last, const Compute* buffer) const {
    int64_t offset[kRowsPerGather] = {};
    for (int64_t row = first; row < last; ++row) {
      offset[row - first] = rows_.Offset(strides_, row);
    }
    for (int64_t i = 0; i < rows_.length; ++i) {
      for (int64_t r = 0; r < last - first; ++r) {
        data_[offset[r] + i * stride_] = FromCompute<T>(buffer[r * rows_.length + i]);
      }
    }
  }

  Compute* Direct(int64_t row) const {
    if constexpr (std::is_same_v<T, Compute>) return data_ + rows_.Offset(strides_, row);
    return nullptr;
  }

 private:
  T* data_;
  std::array<int64_t, kMaxRank> strides_;
  int64_t stride_;
  const Rows& rows_;
  bool direct_;
};

// Rows are taken in groups so that gathers of strided rows share cache lines.
int64_t RowsPerPiece(const Rows& rows) {
  const int64_t wanted = kElementsPerPiece / std::max<int64_t>(rows.length, 1);
  return (std::max<int64_t>(wanted, 1) + kRowsPerGather - 1) / kRowsPerGather * kRowsPerGather;
}

RowMapping RowMappingOf(const MappingOptions& options) {
  return {options.kind, options.alpha, options.budget};
}

// Memory of one thread. Allocated before any thread starts, so that running out is an error value.
template <typename Compute>
struct ThreadMemory {
  std::vector<Compute> in;
  std::vector<Compute> second;
  std::vector<Compute> out;
  cpu::RowScratch<Compute> scratch;
};

template <typename Compute>
std::vector<ThreadMemory<Compute>> AllocateThreads(int count, int64_t length, bool in, bool second,
                                                   bool out, bool candidates) {
  std::vector<ThreadMemory<Compute>> threads(static_cast<size_t>(count));
  const auto group = static_cast<size_t>(length * kRowsPerGather);
  for (ThreadMemory<Compute>& memory : threads) {
    if (in) memory.in.resize(group);
    if (second) memory.second.resize(group);
    if (out) memory.out.resize(group);
    if (candidates) memory.scratch.candidates.resize(static_cast<size_t>(length) + 256);
  }
  return threads;
}

// Calls run_group(first row, last row, memory of the thread) for all rows, kRowsPerGather at a
// time.
template <typename Compute, typename RunGroup>
void ForEachGroup(const Rows& rows, int num_threads, std::vector<ThreadMemory<Compute>>* threads,
                  const RunGroup& run_group) {
  cpu::ParallelFor(rows.count, RowsPerPiece(rows), num_threads,
                   [&](int64_t first, int64_t last, int thread) {
                     for (int64_t row = first; row < last; row += kRowsPerGather) {
                       run_group(row, std::min(last, row + kRowsPerGather),
                                 (*threads)[static_cast<size_t>(thread)]);
                     }
                   });
}

template <typename T>
void RunForward(const TensorView& scores, const MappingOptions& options,
                const ResolvedOptions& resolved, const MutableTensorView& probabilities,
                const MappingExtras& extras) {
  using Compute = ComputeType<T>;
  const Rows rows(scores, resolved.dim);
  const RowReader<T> reader(scores, resolved.dim, rows);
  const RowWriter<T> writer(probabilities, resolved.dim, rows);
  const bool gather = !reader.direct() || resolved.mask;
  auto threads = AllocateThreads<Compute>(cpu::ThreadCount(options.num_threads), rows.length,
                                          gather, false, !writer.direct(), true);
  const auto run_group = [&](int64_t first, int64_t last, ThreadMemory<Compute>& memory) {
    if (gather) reader.Gather(first, last, memory.in.data());
    for (int64_t row = first; row < last; ++row) {
      Compute* copy = memory.in.data() + (gather ? (row - first) * rows.length : 0);
      if (resolved.mask) {
        const auto* mask = static_cast<const uint8_t*>(resolved.mask.data) +
                           rows.Offset(resolved.mask.strides, row);
        const int64_t stride = resolved.mask.strides[resolved.dim];
        for (int64_t i = 0; i < rows.length; ++i) {
          if (mask[i * stride] == 0) copy[i] = -std::numeric_limits<Compute>::infinity();
        }
      }
      RowMapping mapping = RowMappingOf(options);
      if (resolved.alpha) {
        mapping.alpha = ReadElement(resolved.alpha, rows.Offset(resolved.alpha.strides, row));
      }
      const Compute* in = gather ? copy : reader.Direct(row);
      Compute* out =
          writer.direct() ? writer.Direct(row) : memory.out.data() + (row - first) * rows.length;
      const cpu::RowResult result =
          cpu::MapRow<Compute>(in, rows.length, mapping, out, &memory.scratch);
      if (extras.threshold) {
        WriteElement(extras.threshold, rows.Offset(extras.threshold.strides, row),
                     result.threshold);
      }
      if (extras.support_size) {
        int64_t size = result.support_size;
        if constexpr (!std::is_same_v<T, Compute>) {  // Rounding to T may make small ones zero.
          size = std::count_if(out, out + rows.length,
                               [](Compute p) { return ToCompute(FromCompute<T>(p)) > Compute{0}; });
        }
        WriteElement(extras.support_size, rows.Offset(extras.support_size.strides, row),
                     static_cast<double>(size));
      }
    }
    if (!writer.direct()) writer.Scatter(first, last, memory.out.data());
  };
  ForEachGroup(rows, options.num_threads, &threads, run_group);
}

template <typename T>
void RunBackward(const TensorView& probabilities, const TensorView& grad_probabilities,
                 const MappingOptions& options, const ResolvedOptions& resolved,
                 const MutableTensorView& grad_scores, const MutableTensorView& grad_alpha) {
  using Compute = ComputeType<T>;
  const Rows rows(probabilities, resolved.dim);
  const RowReader<T> p_reader(probabilities, resolved.dim, rows);
  const RowReader<T> g_reader(grad_probabilities, resolved.dim, rows);
  const RowWriter<T> writer(grad_scores, resolved.dim, rows);
  auto threads =
      AllocateThreads<Compute>(cpu::ThreadCount(options.num_threads), rows.length,
                               !p_reader.direct(), !g_reader.direct(), !writer.direct(), false);
  const auto run_group = [&](int64_t first, int64_t last, ThreadMemory<Compute>& memory) {
    if (!p_reader.direct()) p_reader.Gather(first, last, memory.in.data());
    if (!g_reader.direct()) g_reader.Gather(first, last, memory.second.data());
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = (row - first) * rows.length;
      RowMapping mapping = RowMappingOf(options);
      if (resolved.alpha) {
        mapping.alpha = ReadElement(resolved.alpha, rows.Offset(resolved.alpha.strides, row));
      }
      double row_grad_alpha = 0.0;
      cpu::MapRowBackward<Compute>(
          p_reader.direct() ? p_reader.Direct(row) : memory.in.data() + at,
          g_reader.direct() ? g_reader.Direct(row) : memory.second.data() + at, rows.length,
          mapping, writer.direct() ? writer.Direct(row) : memory.out.data() + at,
          grad_alpha ? &row_grad_alpha : nullptr);
      if (grad_alpha) {
        WriteElement(grad_alpha, rows.Offset(grad_alpha.strides, row), row_grad_alpha);
      }
    }
    if (!writer.direct()) writer.Scatter(first, last, memory.out.data());
  };
  ForEachGroup(rows, options.num_threads, &threads, run_group);
}

// The first failure among checks that are all evaluated; each is cheap.
Status FirstError(std::initializer_list<Status> statuses) {
  for (const Status& status : statuses) {
    if (!status.ok()) return status;
  }
  return Status::Ok();
}

}  // namespace

Status MappingForward(const TensorView& scores, const MappingOptions& options,
                      const MutableTensorView& probabilities, const MappingExtras& extras) {
  if (Status status = CheckFloating("scores", scores); !status.ok()) return status;
  const Expected<ResolvedOptions> resolved = Resolve(scores, options);
  if (!resolved.ok()) return resolved.status();
  const TensorView out = probabilities.view();
  Status status = FirstError(
      {CheckSameShape("probabilities", out, "scores", scores),
       CheckWritable("probabilities", probabilities),
       SameView(out, scores) ? Status::Ok() : CheckDisjoint("probabilities", out, "scores", scores),
       CheckDisjoint("probabilities", out, "mask", options.mask),
       CheckDisjoint("probabilities", out, "alpha_per_row", options.alpha_per_row),
       CheckPerRow("threshold", extras.threshold, scores, resolved->dim, DType::kFloat32,
                   DType::kFloat64),
       CheckPerRow("support_size", extras.support_size, scores, resolved->dim, DType::kInt32,
                   DType::kInt64)});
  if (!status.ok()) return status;
  if (scores.num_elements() == 0) {
    // Rows without entries have no distribution.
    if (scores.shape[resolved->dim] != 0) return Status::Ok();
  }
  try {
    DispatchFloating(scores.dtype, [&](auto type) {
      RunForward<decltype(type)>(scores, options, *resolved, probabilities, extras);
    });
  } catch (const std::bad_alloc&) {
    return Status::OutOfMemory("scores: no memory for a row of " +
                               std::to_string(scores.shape[resolved->dim]) + " in every thread");
  }
  return Status::Ok();
}

Status MappingBackward(const TensorView& probabilities, const TensorView& grad_probabilities,
                       const MappingOptions& options, const MutableTensorView& grad_scores,
                       const MutableTensorView& grad_alpha) {
  if (Status status = CheckFloating("probabilities", probabilities); !status.ok()) return status;
  MappingOptions without_mask = options;
  without_mask.mask = {};
  const Expected<ResolvedOptions> resolved = Resolve(probabilities, without_mask);
  if (!resolved.ok()) return resolved.status();
  const TensorView out = grad_scores.view();
  Status status = FirstError(
      {CheckSameShape("grad_probabilities", grad_probabilities, "probabilities", probabilities),
       CheckView("grad_probabilities", grad_probabilities),
       CheckSameShape("grad_scores", out, "probabilities", probabilities),
       CheckWritable("grad_scores", grad_scores),
       CheckDisjoint("grad_scores", out, "probabilities", probabilities),
       SameView(out, grad_probabilities)
           ? Status::Ok()
           : CheckDisjoint("grad_scores", out, "grad_probabilities", grad_probabilities),
       CheckPerRow("grad_alpha", grad_alpha, probabilities, resolved->dim, DType::kFloat32,
                   DType::kFloat64)});
  if (!status.ok()) return status;
  if (grad_alpha && options.kind != MappingKind::kEntmax) {
    return Status::Unimplemented(
        "grad_alpha: got a tensor; must be left out for normmax and budget, whose gradient in α "
        "is not provided");
  }
  try {
    DispatchFloating(probabilities.dtype, [&](auto type) {
      RunBackward<decltype(type)>(probabilities, grad_probabilities, options, *resolved,
                                  grad_scores, grad_alpha);
    });
  } catch (const std::bad_alloc&) {
    return Status::OutOfMemory("probabilities: no memory for a row of " +
                               std::to_string(probabilities.shape[resolved->dim]) +
                               " in every thread");
  }
  return Status::Ok();
}

Expected<RowSupport> MappingSupport(const TensorView& probabilities, int dim) {
  if (Status status = CheckFloating("probabilities", probabilities); !status.ok()) return status;
  const Expected<int> resolved_dim = ResolveDim(probabilities, dim);
  if (!resolved_dim.ok()) return resolved_dim.status();
  const Rows rows(probabilities, *resolved_dim);
  const int64_t stride = probabilities.strides[*resolved_dim];
  RowSupport support;
  try {
    support.row_offsets.push_back(0);
    for (int64_t row = 0; row < rows.count; ++row) {
      const int64_t offset = rows.Offset(probabilities.strides, row);
      for (int64_t i = 0; i < rows.length; ++i) {
        const double p = ReadElement(probabilities, offset + i * stride);
        if (!(p > 0.0)) continue;
        support.index.push_back(i);
        support.probability.push_back(p);
      }
      support.row_offsets.push_back(static_cast<int64_t>(support.index.size()));
    }
  } catch (const std::bad_alloc&) {
    return Status::OutOfMemory("probabilities: no memory for the support's entries");
  }
  return support;
}

}  // namespace flash_entmax
