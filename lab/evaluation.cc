#include "evaluation.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <new>
#include <nlohmann/json.hpp>

#include "attention.h"
#include "batch.h"

namespace flash_entmax::lab {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMostSlots = 64;

at::Tensor AsTensor(const std::vector<int64_t>& values, std::vector<int64_t> shape) {
  return at::from_blob(const_cast<int64_t*>(values.data()), shape, at::kLong);
}

// Statistics of the last rows of the first sample.
std::vector<HeadStatistics> Observe(const AttentionInputs& inputs, const RunConfig& run) {
  AttentionInputs first = inputs;
  first.qkv = inputs.qkv.narrow(0, 0, 1).to(at::kFloat);
  if (inputs.query_scale.defined()) first.query_scale = inputs.query_scale.narrow(0, 0, 1);
  const int64_t length = first.qkv.size(1), heads = first.qkv.size(3);
  const int64_t rows = std::min(run.evaluation.statistics_rows, length);
  const at::Tensor scores = CausalScores(first, length - rows, rows);
  at::Tensor alpha = inputs.alpha;
  if (!alpha.defined()) alpha = at::full({heads}, inputs.fixed_alpha, scores.options());
  const at::Tensor p = BisectedEntmax(scores, alpha.view({1, heads, 1}));
  const auto mean = [](const at::Tensor& values) {  // [1, heads, rows] → [heads] on the CPU
    return values.to(at::kDouble).mean(-1).view({-1}).cpu();
  };
  const at::Tensor support = mean((p > 0).sum(-1));
  const at::Tensor entropy = mean(-(p * p.clamp_min(1e-300).log()).sum(-1));
  const at::Tensor largest = mean(p.amax(-1));
  std::vector<HeadStatistics> result(static_cast<size_t>(heads));
  for (int64_t head = 0; head < heads; ++head) {
    result[static_cast<size_t>(head)] = {support[head].item<double>(), entropy[head].item<double>(),
                                         largest[head].item<double>()};
  }
  return result;
}

void EvaluateSamples(const Task& task, const RunConfig& run, const Model& model,
                     const at::Tensor& parameters, bool statistics, LengthResult* result) {
  const int64_t per_batch =
      std::clamp<int64_t>(run.evaluation.max_tokens / task.MaxTokens(result->length), 1, 1024);
  int64_t exact = 0, right = 0, asked = 0;
  double loss = 0.0;
  std::vector<int64_t> slot_right, slot_asked;
  for (int64_t first = 0; first < result->samples; first += per_batch) {
    const int64_t count = std::min(per_batch, result->samples - first);
    const Batch batch = EvaluationBatch(task, result->length, first, count);
    const at::Device device = parameters.device();
    const int64_t slots = batch.targets_per_row;
    AttentionObserver observer;
    if (statistics && first == 0) {
      observer = [&](int64_t /*layer*/, const AttentionInputs& inputs) {
        result->attention.push_back(Observe(inputs, run));
      };
    }
    const at::Tensor logits =
        model
            .Forward(parameters,
                     AsTensor(batch.tokens, {batch.rows, batch.tokens_per_row}).to(device),
                     AsTensor(batch.index, {batch.rows * slots}).to(device), observer)
            .to(at::kFloat);
    const at::Tensor labels = AsTensor(batch.labels, {batch.rows * slots});
    loss +=
        at::cross_entropy_loss(logits, labels.to(device), {}, at::Reduction::Sum, Batch::kIgnored)
            .item<double>();
    const at::Tensor predicted = logits.argmax(-1).cpu();
    const int64_t* prediction = predicted.const_data_ptr<int64_t>();
    slot_right.resize(
        static_cast<size_t>(std::max<int64_t>(static_cast<int64_t>(slot_right.size()), slots)));
    slot_asked.resize(slot_right.size());
    for (int64_t row = 0; row < batch.rows; ++row) {
      Mistake mistake;
      mistake.sample = first + row;
      bool all = true;
      int64_t place = 0;
      for (int64_t slot = 0; slot < slots; ++slot) {
        const int64_t label = batch.labels[static_cast<size_t>(row * slots + slot)];
        if (label == Batch::kIgnored) continue;
        const int64_t said = prediction[row * slots + slot];
        const bool hit = said == label;
        ++asked;
        ++slot_asked[static_cast<size_t>(slot)];
        right += hit ? 1 : 0;
        slot_right[static_cast<size_t>(slot)] += hit ? 1 : 0;
        if (!hit && mistake.wrong.size() < kMostWrongTokens) {
          mistake.wrong.push_back(
              {place, static_cast<int32_t>(label), static_cast<int32_t>(said), {}, -1.0});
        }
        all = all && hit;
        ++place;
      }
      exact += all ? 1 : 0;
      if (!all && result->mistakes.size() < kMostMistakes) {
        result->mistakes.push_back(std::move(mistake));
      }
    }
  }
  result->exact_match = static_cast<double>(exact) / static_cast<double>(result->samples);
  result->token_accuracy = static_cast<double>(right) / static_cast<double>(asked);
  result->loss = loss / static_cast<double>(asked);
  if (static_cast<int64_t>(slot_right.size()) <= kMostSlots) {
    for (size_t slot = 0; slot < slot_right.size(); ++slot) {
      result->slot_accuracy.push_back(static_cast<double>(slot_right[slot]) /
                                      static_cast<double>(std::max<int64_t>(1, slot_asked[slot])));
    }
  }
}

}  // namespace

int64_t SamplesOfLength(const Task& task, const EvaluationConfig& evaluation, int64_t length) {
  if (evaluation.total_tokens == 0) return evaluation.samples;
  const int64_t fewest = std::min(EvaluationConfig::kFewestSamples, evaluation.samples);
  return std::clamp(evaluation.total_tokens / task.MaxTokens(length), fewest, evaluation.samples);
}

LengthResult EvaluateLength(const Task& task, const RunConfig& run, const Model& model,
                            const at::Tensor& parameters, double multiple, bool statistics,
                            int64_t samples) {
  const at::NoGradGuard no_gradient;
  LengthResult result;
  result.multiple = multiple;
  result.length =
      static_cast<int64_t>(multiple * static_cast<double>(run.evaluation.length) + 1e-9);
  result.samples = samples > 0 ? samples : SamplesOfLength(task, run.evaluation, result.length);
  try {
    EvaluateSamples(task, run, model, parameters, statistics && run.evaluation.statistics_rows > 0,
                    &result);
  } catch (const c10::OutOfMemoryError&) {
    result.error = "out of memory";
  } catch (const std::bad_alloc&) {
    result.error = "out of memory";
  }
  return result;
}

std::string ResultsToJson(const RunConfig& run, const std::vector<LengthResult>& results,
                          int64_t step, double final_loss, double seconds,
                          const std::string& machine) {
  Json lengths = Json::array();
  for (const LengthResult& result : results) {
    Json entry = {
        {"multiple", result.multiple}, {"length", result.length}, {"samples", result.samples}};
    if (!result.error.empty()) {
      entry["error"] = result.error;
      lengths.push_back(std::move(entry));
      continue;
    }
    entry["exact_match"] = result.exact_match;
    entry["token_accuracy"] = result.token_accuracy;
    entry["loss"] = result.loss;
    if (!result.slot_accuracy.empty()) entry["slot_accuracy"] = result.slot_accuracy;
    Json mistakes = Json::array();
    for (const Mistake& mistake : result.mistakes) {
      Json wrong = Json::array();
      for (const WrongToken& token : mistake.wrong) {
        wrong.push_back({token.place, token.expected, token.predicted});
      }
      mistakes.push_back({{"sample", mistake.sample}, {"wrong", std::move(wrong)}});
    }
    if (!mistakes.empty()) entry["mistakes"] = std::move(mistakes);
    Json layers = Json::array();
    for (const auto& heads : result.attention) {
      Json support = Json::array(), entropy = Json::array(), largest = Json::array();
      for (const HeadStatistics& head : heads) {
        support.push_back(head.support);
        entropy.push_back(head.entropy);
        largest.push_back(head.largest);
      }
      layers.push_back({{"support", support}, {"entropy", entropy}, {"largest", largest}});
    }
    if (!layers.empty()) entry["attention"] = std::move(layers);
    lengths.push_back(std::move(entry));
  }
  const Json json = {
      {"run", Json::parse(RunToJson(run))}, {"step", step},       {"final_loss", final_loss},
      {"training_seconds", seconds},        {"machine", machine}, {"lengths", std::move(lengths)}};
  return json.dump(1) + "\n";
}

}  // namespace flash_entmax::lab
