#include "attention_flags.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>

namespace flash_entmax::cli {

void AttentionFlags::AddAlphaTo(CLI::App& command) {
  command
      .add_option("--alpha", alpha,
                  "α of the mapping, > 0: 1 is softmax, 2 sparsemax; larger is sparser")
      ->capture_default_str();
}

void AttentionFlags::AddCausalTo(CLI::App& command) {
  command.add_flag("--causal", causal,
                   "Query i sees key j only if j ≤ i + key length − query length");
}

void AttentionFlags::AddTo(CLI::App& command) {
  command.add_option("--scale", scale,
                     "Factor of the dot products [default: 1/√(size of a query)]");
  command.add_option("--window-left", window_left,
                     "Keys before its own position that a query sees [default: all]");
  command.add_option("--window-right", window_right,
                     "Keys after its own position that a query sees [default: all]");
  command
      .add_option("--softcap", softcap,
                  "Cap the scores s to softcap·tanh(s/softcap), in units of the scores; 0 for none")
      ->capture_default_str();
}

void AttentionFlags::ApplyTo(AttentionProblem& problem) const {
  problem.alpha = alpha;
  problem.scale = scale;
  problem.causal = causal;
  problem.window_left = window_left;
  problem.window_right = window_right;
  problem.softcap = softcap;
}

Expected<DType> ParseFloatingType(const std::string& name) {
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    if (name == NameOf(dtype)) return dtype;
  }
  return Status::InvalidArgument(
      fmt::format("--dtype: got {}; must be {}", name, kFloatingTypeNames));
}

void PrintPlan(const AttentionPlan& plan) {
  fmt::print("engine           {}\n", plan.engine);
  fmt::print("path             {}\n", plan.path);
  fmt::print("instruction set  {}\n", plan.instruction_set);
  fmt::print("threads          {}\n", plan.num_threads);
  fmt::print("rows per panel   {}\n", plan.rows_per_panel);
  fmt::print("keys per block   {}\n", plan.keys_per_block);
  fmt::print("workspace        {}\n", FormatBytes(plan.workspace_bytes));
}

Json PlanToJson(const AttentionPlan& plan) {
  return {{"engine", plan.engine},
          {"path", plan.path},
          {"instruction_set", plan.instruction_set},
          {"threads", plan.num_threads},
          {"rows_per_panel", plan.rows_per_panel},
          {"keys_per_block", plan.keys_per_block},
          {"workspace_bytes", plan.workspace_bytes}};
}

}  // namespace flash_entmax::cli
