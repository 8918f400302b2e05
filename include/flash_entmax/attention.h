// Exact α-entmax attention. One plain struct describes a problem; check, plan and run read it.
//
// For query row i of a head and the keys j it may see,
//     s_ij = cap(query_scale_i · scale · q_i·k_j) + slope·(−|i' − j|) + bias_ij,
//     p_i  = α-entmax of (s_ij)_j        (see mapping.h),
//     o_i  = Σ_j p_ij v_j,
// with cap(x) = softcap·tanh(x/softcap) if softcap > 0, and i' = i + key_length − query_length the
// position of the query among the keys. Speed comes from proving keys zero, never from skipping
// them: the result is that of the dense computation.

#ifndef FLASH_ENTMAX_ATTENTION_H_
#define FLASH_ENTMAX_ATTENTION_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "flash_entmax/status.h"
#include "flash_entmax/tensor.h"

namespace flash_entmax {

struct AttentionProblem {
  // Shapes, always four dimensions, any strides. One floating-point type for all three.
  TensorView query;  // [batch, heads, query_length, head_size]
  TensorView key;    // [batch, kv_heads, key_length, head_size], heads a multiple of kv_heads
  TensorView value;  // [batch, kv_heads, key_length, value_size]

  // One α > 0 for all heads, or one a head: [heads], float32 or float64. α = 1 is softmax; below
  // it weights have heavier tails, and like softmax's none is zero.
  double alpha = 1.5;
  TensorView alpha_per_head;

  // Factor of the dot products; 1/√head_size if not given.
  std::optional<double> scale;
  // Optional factor per query row: [batch, heads, query_length], broadcastable, floating point.
  TensorView query_scale;

  // Query i sees key j only if j ≤ i + key_length − query_length (aligned at the bottom right).
  bool causal = false;
  // Sliding window: query i sees key j only if i' − window_left ≤ j ≤ i' + window_right.
  // Each is ≥ 0 if given; not given means unlimited.
  std::optional<int64_t> window_left;
  std::optional<int64_t> window_right;

  // Optional number of keys each batch entry really has: [batch], int32 or int64, in
  // [0, key_length]. The keys after it are hidden; causal and window positions follow from it.
  TensorView key_lengths;
  // Optional: uint8 [batch, key_length], broadcastable; 0 hides the key.
  TensorView key_mask;
  // Optional additive bias, broadcastable to [batch, heads, query_length, key_length].
  TensorView bias;
  // Optional ALiBi slopes ≥ 0: [heads], float32 or float64; 0 means no position bias.
  TensorView alibi_slopes;
  // Cap of the scores by tanh; 0 means none.
  double softcap = 0.0;

  // Optional packed sequences: int32 or int64 [sequences + 1], ascending from 0 to the length. With
  // them the
  // batch is 1, and sequence b is query rows cu_query[b] … cu_query[b+1]−1 and key rows
  // cu_key[b] … cu_key[b+1]−1; i and j above count within the sequence. Give both or none; not
  // together with key_lengths, key_mask or bias.
  TensorView cu_query;
  TensorView cu_key;
};

// How an attention call runs. Nothing here changes the result beyond rounding; num_threads changes
// no bit of it.
struct AttentionOptions {
  int num_threads = 0;  // 0 means the OpenMP default.
  // Reject keys by products in lower precision with a certified error, where the machine is faster
  // at them. Changes no bit of any result.
  bool screening = true;
  // Keep in the saved buffer what AttentionBackward needs.
  bool save_for_backward = false;
  // Entries of the support (8 bytes each, 12 for float64) that the saved buffer has room for; −1
  // chooses. The support of rows that find no room is found again by AttentionBackward.
  int64_t support_capacity = -1;
};

// Memory of the caller, aligned to 64 bytes. Contents need no initialisation.
struct AttentionBuffer {
  void* data = nullptr;
  int64_t bytes = 0;
};

// The positive probabilities in compressed rows; rows are (batch, head, query) in row-major order.
struct AttentionSupport {
  std::vector<int64_t> row_offsets;  // [batch·heads·query_length + 1]
  std::vector<int32_t> key_index;    // [entries], ascending in a row; counts within the sequence
  std::vector<float> probability;    // [entries]
};

// What one call can produce. Only `output` is required.
struct AttentionOutputs {
  MutableTensorView output;  // [batch, heads, query_length, value_size], the query's type
  // τ of each row (log Σ exp(s) for α = 1): [batch, heads, query_length], float32 or float64. NaN
  // for rows that see no key.
  MutableTensorView threshold;
  // Filled if not null.
  AttentionSupport* support = nullptr;
};

// How a problem would be run: the one decision that the workspace query, the explanation
// (`flash-entmax plan`) and the launch all read.
struct AttentionPlan {
  std::string engine;           // "cpu"
  std::string path;             // "one-pass candidates", "online softmax", "dense products", …
  std::string instruction_set;  // "AVX3", "AVX2", …
  int num_threads = 1;
  int rows_per_panel = 0;        // query rows that one thread works on together
  int keys_per_block = 0;        // keys whose scores are made before any of them is looked at
  int64_t workspace_bytes = 0;   // packed keys and values, and buffers of all threads as they start
  int64_t backward_bytes = 0;    // the same of AttentionBackward
  int64_t saved_bytes = 0;       // kept from forward to backward; 0 if nothing is to be kept
  int64_t support_capacity = 0;  // entries that `saved_bytes` has room for
};

// What AttentionBackward reads and writes: the gradients of a loss. Gradients that are not given
// are not computed.
struct AttentionGradients {
  TensorView output;        // the loss's gradient in the output, of the output's shape and type
  MutableTensorView query;  // like query
  MutableTensorView key;    // like key
  MutableTensorView value;  // like value
  MutableTensorView alpha;  // [heads], float32 or float64
  MutableTensorView bias;   // of the bias's own shape (summed where it was broadcast), floating
  MutableTensorView alibi_slopes;  // [heads], float32 or float64
  MutableTensorView query_scale;   // of query_scale's own shape, float32 or float64
};

// Errors name the argument, its value and what is allowed. Every run calls it first.
Status CheckAttention(const AttentionProblem& problem);
Status CheckAttentionOutputs(const AttentionProblem& problem, const AttentionOutputs& outputs);
Status CheckAttentionGradients(const AttentionProblem& problem,
                               const AttentionGradients& gradients);

Expected<AttentionPlan> PlanAttention(const AttentionProblem& problem,
                                      const AttentionOptions& options = {});

// Runs the forward pass on the CPU. Inputs of bfloat16, float16 and float32 are computed in
// float32, float64 in float64; thresholds are solved in double. The output's error is at most
// twice that of a plain computation in the same precision. Rows that see no key give zeros.
// NaN in a query row or in a key that it sees gives NaN in that row; NaN in a value matters where
// its probability is positive.
// `saved` is used with options.save_for_backward: at least AttentionPlan::saved_bytes.
Status AttentionForward(const AttentionProblem& problem, const AttentionOutputs& outputs,
                        const AttentionOptions& options = {}, AttentionBuffer saved = {});

// Gradients over the support, from what AttentionForward saved for the same problem and options.
// With u = p^(2−α) on the support, dP = dO·V and δ = Σ u·dP / Σ u, the gradient in the scores is
// u·(dP − δ) (Peters, Niculae & Martins 2019); the one in α follows Correia, Niculae & Martins
// 2019. Rows that see no key get and give zeros. Deterministic: every gradient row has one owner,
// and any number of threads gives the same bits.
// A row whose output is NaN gives NaN to its own gradients and to those of every key and value that
// it sees. NaN in a row of gradients.output, or in a value of positive probability, gives NaN to
// the row's own gradients and to those of the keys in its support. No other gradient of query, key
// or value is touched.
Status AttentionBackward(const AttentionProblem& problem, const AttentionGradients& gradients,
                         const AttentionOptions& options, AttentionBuffer saved);

}  // namespace flash_entmax

#endif  // FLASH_ENTMAX_ATTENTION_H_
