// `flash-entmax plan`: how a problem of given shapes would be run, without its tensors.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attention_flags.h"
#include "command.h"
#include "flash_entmax/attention.h"
#include "output.h"
#include "owned_tensor.h"

namespace flash_entmax::cli {
namespace {

struct PlanOptions {
  int64_t batch = 1;
  int64_t heads = 8;
  std::optional<int64_t> kv_heads;      // As many as heads if not given.
  std::optional<int64_t> query_length;  // key_length if not given.
  int64_t key_length = 8192;
  int64_t head_size = 64;
  std::optional<int64_t> value_size;  // head_size if not given.
  std::string dtype = "float32";
  AttentionFlags attention;
};

CommandResult Plan(const CommonOptions& common, const PlanOptions& options) {
  const Expected<DType> dtype = ParseFloatingType(options.dtype);
  if (!dtype.ok()) return dtype.status();
  const int64_t kv_heads = options.kv_heads.value_or(options.heads);
  const int64_t queries = options.query_length.value_or(options.key_length);
  const int64_t value_size = options.value_size.value_or(options.head_size);
  // A plan looks at shapes only, so no memory stands behind these. The bytes of tensors must be
  // countable all the same.
  alignas(double) static const char kNothing[sizeof(double)] = {};
  AttentionProblem problem;
  const std::vector<std::vector<int64_t>> shapes = {
      {options.batch, options.heads, queries, options.head_size},
      {options.batch, kv_heads, options.key_length, options.head_size},
      {options.batch, kv_heads, options.key_length, value_size}};
  for (const auto& shape : shapes) {
    int64_t bytes = SizeOf(*dtype);
    for (const int64_t size : shape) {
      if (__builtin_mul_overflow(bytes, size, &bytes)) {
        return Status::InvalidArgument(
            fmt::format("shape {} has more bytes than 63 bits can count", FormatShape(shape)));
      }
    }
  }
  problem.query = RowMajor(kNothing, *dtype, shapes[0]);
  problem.key = RowMajor(kNothing, *dtype, shapes[1]);
  problem.value = RowMajor(kNothing, *dtype, shapes[2]);
  options.attention.ApplyTo(problem);
  AttentionOptions run;
  run.num_threads = common.threads;
  const Expected<AttentionPlan> plan = PlanAttention(problem, run);
  if (!plan.ok()) return plan.status();
  if (!common.json) {
    fmt::print("query            {} {}\n", FormatShape(shapes[0]), NameOf(*dtype));
    fmt::print("key              {}\n", FormatShape(shapes[1]));
    fmt::print("value            {}\n", FormatShape(shapes[2]));
    PrintPlan(*plan);
    return {};
  }
  PrintJson({{"command", "plan"},
             {"dtype", NameOf(*dtype)},
             {"query", shapes[0]},
             {"key", shapes[1]},
             {"value", shapes[2]},
             {"alpha", options.attention.alpha},
             {"plan", PlanToJson(*plan)}});
  return {};
}

}  // namespace

void AddPlanCommand(CLI::App& program, Context& context) {
  auto options = std::make_shared<PlanOptions>();
  CLI::App* command =
      AddCommand(program, context, "plan", "Show how attention of given shapes would be run",
                 [&context, options] { return Plan(context.common, *options); });
  const CLI::Validator size = SizeRange();
  command->add_option("--batch", options->batch, "Batch entries")
      ->check(size)
      ->capture_default_str();
  command->add_option("--heads", options->heads, "Query heads")->check(size)->capture_default_str();
  command->add_option("--kv-heads", options->kv_heads, "Key and value heads [default: --heads]")
      ->check(size);
  command->add_option("--query-length", options->query_length,
                      "Query positions [default: --key-length]");
  command->add_option("--key-length", options->key_length, "Key positions")->capture_default_str();
  command->add_option("--head-size", options->head_size, "Numbers in a query or key")
      ->capture_default_str();
  command->add_option("--value-size", options->value_size,
                      "Numbers in a value [default: --head-size]");
  command
      ->add_option("--dtype", options->dtype, std::string("Type of numbers: ") + kFloatingTypeNames)
      ->capture_default_str();
  options->attention.AddAlphaTo(*command);
  options->attention.AddCausalTo(*command);
  options->attention.AddTo(*command);
}

}  // namespace flash_entmax::cli
