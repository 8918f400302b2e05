// What a recipe says: a task, a model, how to train and how to evaluate, for several variants and
// seeds. Recipes are JSON; unknown keys are errors.
//
//   { "name": "recall", "task": {…}, "model": {…}, "training": {…}, "evaluation": {…},
//     "seeds": [1, 2, 3],
//     "variants": { "softmax": {"model": {"attention": "softmax"}}, "asentmax": {…} } }
//
// A variant is a JSON merge patch (RFC 7396) of everything outside "variants". docs/lab.md lists
// the keys.

#ifndef FLASH_ENTMAX_LAB_CONFIG_H_
#define FLASH_ENTMAX_LAB_CONFIG_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "flash_entmax/status.h"
#include "tasks/task.h"

namespace flash_entmax::lab {

enum class Norm { kPre, kPreAndPost };  // RMSNorm before, or before and after, each sublayer
enum class AttentionKind {
  kSoftmax,
  kSsmax,            // softmax, queries scaled by s·log(i + 2) (Nakanishi 2025)
  kEntmax,           // fixed α
  kEntmaxLearnable,  // one α a head, 1 + sigmoid (Correia, Niculae & Martins 2019)
  kAsentmax,         // α-entmax with adaptive scaling (Vasylenko et al. 2026)
  kLinear,           // feature map elu + 1 (Katharopoulos et al. 2020)
  kSelectiveLinear,  // gated linear attention: decay and write gate from the token
};
enum class Positions { kNone, kRope, kAlibi, kNape };

const char* NameOf(AttentionKind kind);
const char* NameOf(Positions positions);

struct ModelConfig {
  int64_t layers = 2;
  int64_t width = 64;
  int64_t mlp = 128;
  int64_t heads = 4;
  Norm norm = Norm::kPreAndPost;
  AttentionKind attention = AttentionKind::kSoftmax;
  double alpha = 1.5;  // entmax, asentmax; where entmax_learnable starts
  Positions positions = Positions::kNape;
  double rope_base = 10000.0;
  double init = 0.02;  // standard deviation of the matrices' first entries
  // asentmax: the factor at the first step, δ + softplus(b), with W_β = W_γ = 0; or random
  // projections (standard deviation 0.02) as the published code starts them.
  double scaler_start = 1.05;
  bool scaler_random = false;
  // A token whose embedding is zero and stays so (−1: none). In the published models it is token 0:
  // MQMTAR's space, which their library takes for padding.
  int64_t zero_token = -1;
};

enum class Optimizer { kAdamW, kMuon };  // Muon: for the matrices between layers, see muon.h
// kBFloat16: products and activations; parameters and moments stay float32. kBFloat16True: those
// are rounded to bfloat16 after every step too, as in the published runs (Lightning's "bf16-true").
enum class Precision { kFloat32, kBFloat16, kBFloat16True };

struct TrainingConfig {
  int64_t steps = 1000;
  int64_t batch = 32;
  int64_t min_length = 8;
  int64_t max_length = 16;
  Optimizer optimizer = Optimizer::kAdamW;
  double learning_rate = 1e-3;
  double muon_rate = 0.02;  // muon: of the matrices; follows the same warm-up and cosine
  int64_t warmup = 100;
  double final_rate = 0.0;  // the cosine ends at this share of learning_rate
  double beta1 = 0.9;
  double beta2 = 0.99;
  double weight_decay = 0.0;
  double clip = 1.0;
  Precision precision = Precision::kFloat32;
  int64_t log_every = 50;
  int64_t evaluate_every = 0;  // steps between quick evaluations at the training length; 0: never
  int64_t checkpoint_seconds = 60;
};

struct EvaluationConfig {
  static constexpr int64_t kFewestSamples = 100;

  int64_t length = 16;                           // 1×
  std::vector<double> multiples = {1, 2, 4, 8};  // of `length`, rounded down
  int64_t samples = 200;
  // Samples of a length together have at most this many tokens (0: no limit), but there are never
  // fewer than kFewestSamples of them, or than `samples`.
  int64_t total_tokens = 0;
  int64_t max_tokens = 16384;    // of one batch; longer samples go one at a time
  int64_t statistics_rows = 64;  // query rows a sample and head for the attention statistics
};

struct RunConfig {
  std::string recipe;
  std::string variant;
  uint64_t seed = 1;
  TaskOptions task;
  ModelConfig model;
  TrainingConfig training;
  EvaluationConfig evaluation;
};

struct Recipe {
  std::string name;
  std::vector<RunConfig> runs;  // every variant with every seed
};

// Errors name the key, as in "model.heads: got 0; must be in [1, 256]"; kIo if the file cannot be
// read. `overrides` are applied last, each "training.steps=100".
Expected<Recipe> ReadRecipe(const std::string& path,
                            const std::vector<std::string>& overrides = {});
Expected<Recipe> ParseRecipe(const std::string& text, const std::string& name_for_messages,
                             const std::vector<std::string>& overrides = {});

// Everything that a result depends on, as one JSON document. ParseRun reads it back.
std::string RunToJson(const RunConfig& run);
Expected<RunConfig> ParseRun(const std::string& text);

// The task of a run, from the JSON object of its options alone.
Expected<std::unique_ptr<Task>> ParseTask(const std::string& text);

// 64-bit FNV-1a.
uint64_t Checksum(const void* data, size_t bytes, uint64_t start = 0xCBF29CE484222325u);

// The file's contents; kIo if it cannot be read.
Expected<std::string> ReadFile(const std::string& path);

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_CONFIG_H_
