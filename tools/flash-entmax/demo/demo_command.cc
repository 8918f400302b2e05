// `flash-entmax demo`: attention as retrieval over a real text.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "command.h"
#include "demo/demo.h"
#include "demo/html_page.h"
#include "demo/report.h"
#include "demo/text_source.h"
#include "demo/wording.h"
#include "io/atomic_file.h"
#include "output.h"
#include "progress.h"

namespace flash_entmax::cli {
namespace {

constexpr size_t kMaxAlphas = 6;  // As many as the plots have marks for.

struct DemoOptions {
  std::string text;
  int64_t context = kDefaultContext;
  std::vector<double> alphas = {1.0, 1.5, 2.0};
  uint64_t seed = 1;
  std::string html = "flash-entmax-demo.html";
  bool no_html = false;
};

Status CheckOptions(const DemoOptions& options) {
  if (options.context < kMinContext || options.context > kMaxContext) {
    return Status::InvalidArgument(fmt::format("--context: got {}; must be from {} to {}",
                                               options.context, kMinContext, kMaxContext));
  }
  if (options.alphas.size() > kMaxAlphas) {
    return Status::InvalidArgument(fmt::format("--alpha: got {} values; must be at most {}",
                                               options.alphas.size(), kMaxAlphas));
  }
  for (const double alpha : options.alphas) {
    if (!(alpha >= 1.0) || !std::isfinite(alpha)) {
      return Status::InvalidArgument(
          fmt::format("--alpha: got {}; must be finite and >= 1", alpha));
    }
    if (std::count(options.alphas.begin(), options.alphas.end(), alpha) > 1) {
      return Status::InvalidArgument(fmt::format("--alpha: got {} more than once", alpha));
    }
  }
  return Status::Ok();
}

Expected<TextSource> ReadText(const DemoOptions& options) {
  Expected<TextSource> source = options.text.empty() ? FindText(UsualTextPlaces(), options.context)
                                                     : ReadTextFile(options.text, options.context);
  if (!source.ok()) return source.status();
  if (static_cast<int64_t>(source->bytes.size()) < kMinContext) {
    return Status::InvalidArgument(fmt::format("--text: {} has {} bytes; must have {} or more",
                                               source->description, source->bytes.size(),
                                               kMinContext));
  }
  return source;
}

CommandResult Demo(const Context& context, const DemoOptions& options) {
  if (const Status status = CheckOptions(options); !status.ok()) return status;
  const Expected<TextSource> source = ReadText(options);
  if (!source.ok()) return source.status();
  // Opened before the work, so that a path that cannot be written does not cost the user a minute.
  std::optional<io::AtomicFile> page;
  if (!options.no_html) {
    Expected<io::AtomicFile> file = io::AtomicFile::Create(options.html);
    if (!file.ok()) return file.status();
    page = std::move(file).value();
  }
  DemoSetting setting;
  setting.alphas = options.alphas;
  setting.seed = options.seed;
  setting.threads = context.common.threads;
  Expected<DemoResult> result = [&] {
    Progress progress(context.common, "demo",
                      ExpectedPairs(static_cast<int64_t>(source->bytes.size()), setting), "pairs");
    return RunDemo(*source, setting, [&](int64_t pairs) { progress.Add(pairs); });
  }();
  if (!result.ok()) return result.status();
  result->command_line = context.command_line;
  if (page) {
    if (const Status status = page->Write(HtmlPage(*result)); !status.ok()) return status;
    if (const Status status = page->Commit(); !status.ok()) return status;
  }
  if (context.common.json) {
    Json document = ReportToJson(*result);
    document["html"] = page ? Json(options.html) : Json(nullptr);
    PrintJson(document);
  } else {
    PrintReport(*result);
    fmt::print("\n{} in all.", Duration(result->seconds));
    if (page) fmt::print(" Page with pictures and curves: {}", options.html);
    fmt::print("\n");
  }
  if (!result->passed()) {
    return CommandResult::Failure("a row differs from the reference by more than rounding");
  }
  return {};
}

}  // namespace

void AddDemoCommand(CLI::App& program, Context& context) {
  auto options = std::make_shared<DemoOptions>();
  CLI::App* command =
      AddCommand(program, context, "demo", "Attention as retrieval over a real text",
                 [&context, options] { return Demo(context, *options); });
  command->footer(
      "Every position's query and key are embeddings of the bytes before it, its value is the "
      "byte\n"
      "that followed; attention over the whole past predicts the next byte, with no training.\n"
      "The scale of each alpha is chosen on the first tenth of the text and the rest is scored; "
      "of\n"
      "long texts the last 32,768 bytes, and fewer from a context of 131,072 on.");
  command->add_option("--text", options->text,
                      "Text to read [default: the Python standard library's sources, or what "
                      "large text this machine has]");
  command->add_option("--context", options->context, "Bytes of the text to use, 2048 to 1048576")
      ->capture_default_str();
  command
      ->add_option("--alpha", options->alphas,
                   "Values of α to compare, each ≥ 1: 1 is softmax, larger is sparser")
      ->delimiter(',')
      ->capture_default_str();
  AddSeed(*command, options->seed, "Of the embeddings' hashes and the checked rows");
  CLI::Option* html =
      command->add_option("--html", options->html, "Page to write")->capture_default_str();
  command->add_flag("--no-html", options->no_html, "Write no page")->excludes(html);
}

}  // namespace flash_entmax::cli
