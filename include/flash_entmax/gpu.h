// Exact α-entmax attention on NVIDIA GPUs: the problem of attention.h with device pointers.
//
// Every pointer in the problem and in the results is device memory; the numbers behind
// alpha_per_head, key_lengths, cu_query and cu_key are read on the device, so they are not checked
// (out of range they give wrong results in the rows they concern, never an access out of bounds).
// Calls only launch work on the caller's stream: nothing synchronises, allocates, or copies between
// host and device, so that they can be captured in a CUDA graph. Results are bit-identical from run
// to run on the same device.
//
// What differs from the CPU engine: 1 < α ≤ 2; bfloat16, float16 and float32; head_size and
// value_size at most 256; no key_mask and no bias; alpha_per_head, query_scale and alibi_slopes in
// float32; key_lengths, cu_query and cu_key in int32. What is not supported gives
// StatusCode::kUnimplemented, with the argument, its value and what is allowed.
//
// Order of calls: PlanAttention → allocate the buffers it asks for → AttentionForward → (with the
// saved buffer untouched, and the same problem and options) AttentionBackward.

#ifndef FLASH_ENTMAX_GPU_H_
#define FLASH_ENTMAX_GPU_H_

#include <cstdint>
#include <string>

#include "flash_entmax/attention.h"
#include "flash_entmax/status.h"
#include "flash_entmax/tensor.h"

namespace flash_entmax::gpu {

// Which kernels run. They give the same result up to rounding.
enum class Engine {
  kAutomatic,
  // Compute capability 9.0: one screening product in half precision with a certified error, then
  // only the keys that may be in the support.
  kScreening,
  // Compute capability 9.0: scores recomputed tile by tile, for rows with large supports.
  kTiles,
  // Compute capability 8.0 and later, every feature.
  kGeneral,
};

struct AttentionOptions {
  void* stream = nullptr;  // a cudaStream_t; null is the default stream
  // Keep in the saved buffer what AttentionBackward needs.
  bool save_for_backward = false;
  // AttentionBackward will be asked for the gradient in α.
  bool alpha_gradient = false;
  // With cu_query: no sequence is longer than this; 0 if unknown. Short rows run much faster when
  // they are known to be short.
  int64_t max_query_length = 0;
  int64_t max_key_length = 0;
  // Entries of the support that the saved buffer has room for; −1 chooses. Rows that find no room
  // are computed another way, exactly but more slowly.
  int64_t support_capacity = -1;
  Engine engine = Engine::kAutomatic;
  // Compute also what kGeneral proves zero before its products: the same result, bit for bit, as
  // tests check.
  bool visit_all_tiles = false;
};

struct AttentionPlan {
  Engine engine = Engine::kGeneral;  // never kAutomatic
  std::string description;           // for people, as in "screening, 1 launch of 8 heads"
  int64_t saved_bytes = 0;           // kept from forward to backward; needed without one too
  int64_t forward_bytes = 0;         // workspace of AttentionForward
  int64_t backward_bytes = 0;        // workspace of AttentionBackward
  int64_t support_capacity = 0;      // entries that `saved_bytes` has room for; 0: none are kept
};

// Device memory, aligned to 256 bytes. Contents need no initialisation.
struct DeviceBuffer {
  void* data = nullptr;
  int64_t bytes = 0;
};

// What AttentionForward writes. Only `output` is required.
struct AttentionOutputs {
  MutableTensorView output;     // [batch, heads, query_length, value_size], the query's type
  MutableTensorView threshold;  // [batch, heads, query_length], float32; NaN for rows without keys
};

// What AttentionBackward reads and writes: the gradients of a loss. Gradients that are not given
// are not written.
struct AttentionGradients {
  TensorView output;        // the loss's gradient in the output, of the output's shape and type
  MutableTensorView query;  // like query; required
  MutableTensorView key;    // like key; required
  MutableTensorView value;  // like value; required
  MutableTensorView alpha;  // [heads], float32; needs AttentionOptions::alpha_gradient
  MutableTensorView alibi_slopes;  // [heads], float32
  MutableTensorView query_scale;   // [batch, heads, query_length], float32
};

// Checks what can be checked on the host, and plans for the current device.
Expected<AttentionPlan> PlanAttention(const AttentionProblem& problem,
                                      const AttentionOptions& options = {});

// Scores are fp32 sums (float32 inputs: products of split TF32 numbers, as accurate as fp32), the
// threshold is exact for these scores up to 4e-6·max(1, |z|) in z = (α−1)·s, and the output is
// rounded once. NaN or infinity in a query row or in a key that it sees gives NaN in that row; in a
// value it matters where its probability is positive.
Status AttentionForward(const AttentionProblem& problem, const AttentionOutputs& outputs,
                        const AttentionOptions& options, DeviceBuffer saved,
                        DeviceBuffer workspace);

// Gradients as in algorithms of the CPU engine: with u = p^(2−α) on the support, dP = dO·V and
// δ = Σ u·dP / Σ u, the gradient in the scores is u·(dP − δ) (Peters, Niculae & Martins 2019); the
// one in α follows Correia, Niculae & Martins 2019.
Status AttentionBackward(const AttentionProblem& problem, const AttentionGradients& gradients,
                         const AttentionOptions& options, DeviceBuffer saved,
                         DeviceBuffer workspace);

// The support in compressed rows, from the thresholds that AttentionForward wrote. Rows are (batch,
// head, query) in row-major order. First the offsets: [batch·heads·query_length + 1], int64, on the
// device; the last one is the number of entries. `workspace`: SupportWorkspaceBytes.
Expected<int64_t> SupportWorkspaceBytes(const AttentionProblem& problem);
Status SupportOffsets(const AttentionProblem& problem, const TensorView& threshold,
                      const AttentionOptions& options, MutableTensorView row_offsets,
                      DeviceBuffer workspace);
// Then the entries: key_index int32 (ascending in a row, counted within the sequence) and
// probability float32, both [entries]. Entries that do not fit are left out.
Status SupportEntries(const AttentionProblem& problem, const TensorView& threshold,
                      const AttentionOptions& options, const TensorView& row_offsets,
                      MutableTensorView key_index, MutableTensorView probability);

// "NVIDIA H100 80GB HBM3, compute capability 9.0", or why no device can be used.
Expected<std::string> DescribeDevice();

}  // namespace flash_entmax::gpu

#endif  // FLASH_ENTMAX_GPU_H_
