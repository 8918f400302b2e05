#include "mistakes.h"

#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "batch.h"
#include "config.h"

namespace flash_entmax::lab {
namespace {

using Json = nlohmann::json;

constexpr int64_t kLongest = int64_t{1} << 26;

Status NoResult(const std::string& why) {
  return Status::InvalidArgument("result: got a text " + why +
                                 "; must be a result.json of `train` or `eval`");
}

// The run's task; its other settings may be those of another version.
Expected<std::unique_ptr<Task>> TaskOf(const Json& result) {
  if (!result.is_object() || !result.contains("run") || !result["run"].is_object() ||
      !result["run"].contains("task") || !result.contains("lengths") ||
      !result["lengths"].is_array()) {
    return NoResult("without a run, its task and lengths");
  }
  const Expected<RunConfig> run = ParseRun(Json{{"task", result["run"]["task"]}}.dump());
  if (!run.ok()) return run.status();
  return MakeTask(run->task);
}

// The wrong tokens of one mistake, [place, expected, predicted] each; none if they are no such
// list, or not of this sample.
std::vector<WrongToken> WrongTokens(const Json& mistake, const Sample& sample) {
  const std::vector<int32_t> target = TargetOf(sample);
  std::vector<WrongToken> wrong;
  for (const Json& entry : mistake.value("wrong", Json::array())) {
    if (!entry.is_array() || entry.size() != 3) return {};
    WrongToken token;
    token.place = entry[0].get<int64_t>();
    token.expected = entry[1].get<int32_t>();
    token.predicted = entry[2].get<int32_t>();
    if (token.place < 0 || token.place >= std::ssize(target) ||
        target[static_cast<size_t>(token.place)] != token.expected) {
      return {};
    }
    wrong.push_back(token);
  }
  return wrong;
}

Status ExplainLength(const Task& task, const Json& entry, ExplainedLength* explained) {
  explained->multiple = entry.value("multiple", 1.0);
  explained->length = entry.value("length", int64_t{0});
  explained->exact_match = entry.value("exact_match", 0.0);
  if (explained->length < task.min_length() || explained->length > kLongest) {
    return NoResult("with a length that has no sample");
  }
  for (const Json& mistake : entry.value("mistakes", Json::array())) {
    ExplainedSample result;
    result.sample = mistake.value("sample", int64_t{-1});
    if (result.sample < 0) return NoResult("with a mistake that names no sample");
    const Sample sample = EvaluationSample(task, explained->length, result.sample);
    result.wrong = WrongTokens(mistake, sample);
    if (result.wrong.empty()) {
      return NoResult("with a sample " + std::to_string(result.sample) + " of length " +
                      std::to_string(explained->length) + " that its task does not make");
    }
    task.Explain(sample, &result.wrong);
    for (const WrongToken& token : result.wrong) {
      if (token.chance < 0.0) continue;
      ++explained->tokens;
      explained->with_source += token.source.empty() ? 0 : 1;
      explained->by_chance += token.chance;
    }
    explained->samples.push_back(std::move(result));
  }
  return Status::Ok();
}

}  // namespace

Expected<std::vector<ExplainedLength>> ExplainMistakes(const std::string& result) {
  const Json json = Json::parse(result, nullptr, false);
  if (json.is_discarded()) return NoResult("that is no JSON");
  const Expected<std::unique_ptr<Task>> task = TaskOf(json);
  if (!task.ok()) return task.status();
  std::vector<ExplainedLength> lengths;
  try {
    for (const Json& entry : json["lengths"]) {
      ExplainedLength explained;
      const Status status = ExplainLength(**task, entry, &explained);
      if (!status.ok()) return status;
      lengths.push_back(std::move(explained));
    }
  } catch (const Json::exception&) {
    return NoResult("with a member of another type");
  }
  return lengths;
}

}  // namespace flash_entmax::lab
