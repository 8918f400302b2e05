// The options of attention that are numbers, shared by `run`, `plan` and `bench attention`, and
// what these print of problems and plans.

#ifndef FLASH_ENTMAX_TOOLS_ATTENTION_FLAGS_H_
#define FLASH_ENTMAX_TOOLS_ATTENTION_FLAGS_H_

#include <cstdint>
#include <optional>
#include <string>

#include "flash_entmax/attention.h"
#include "output.h"

namespace CLI {
class App;
}

namespace flash_entmax::cli {

struct AttentionFlags {
  double alpha = 1.5;
  std::optional<double> scale;
  bool causal = false;
  std::optional<int64_t> window_left;
  std::optional<int64_t> window_right;
  double softcap = 0.0;

  // --scale, --window-left, --window-right, --softcap; --alpha and --causal are for the caller to
  // add, who may want other defaults.
  void AddTo(CLI::App& command);
  void AddAlphaTo(CLI::App& command);
  void AddCausalTo(CLI::App& command);

  // Sets the fields of the problem that have these names.
  void ApplyTo(AttentionProblem& problem) const;
};

// Names as the safetensors layout and people write them: f32, float32, bf16, …
Expected<DType> ParseFloatingType(const std::string& name);
// For --dtype's help and errors.
inline constexpr const char* kFloatingTypeNames = "float64, float32, bfloat16 or float16";

// Prints one field a line.
void PrintPlan(const AttentionPlan& plan);
Json PlanToJson(const AttentionPlan& plan);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_ATTENTION_FLAGS_H_
