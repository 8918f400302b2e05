#include "mistakes.h"

#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "batch.h"
#include "config.h"

namespace flash_entmax::lab {
namespace {

using Json = nlohmann::json;

// Of what is read: a text may be anything.
constexpr int kDeepest = 16;
constexpr int64_t kLongest = int64_t{1} << 22;
constexpr size_t kMostLengths = 1000;

Status NoResult(const std::string& why) {
  return Status::InvalidArgument("result: got a text " + why +
                                 "; must be a result.json of `train` or `eval`");
}

// Copying and writing JSON is recursive, reading it is not: what is too deep is refused here.
Expected<Json> Parse(const std::string& text) {
  bool deep = false;
  const auto shallow = [&](int depth, Json::parse_event_t /*event*/, Json& /*parsed*/) {
    deep |= depth > kDeepest;
    return depth <= kDeepest;
  };
  Json json = Json::parse(text, shallow, false);
  if (deep) return NoResult("of lists within lists");
  if (json.is_discarded()) return NoResult("that is no JSON");
  return json;
}

// A member of an object; null if there is none.
const Json* Member(const Json& object, const char* name) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(name);
  return found == object.end() ? nullptr : &*found;
}

bool ReadWhole(const Json* json, int64_t low, int64_t high, int64_t* value) {
  if (json == nullptr || !json->is_number_integer() || *json < low || *json > high) return false;
  *value = json->get<int64_t>();
  return true;
}

bool ReadNumber(const Json* json, double low, double high, double* value) {
  if (json == nullptr || !json->is_number() || !(*json >= low && *json <= high)) return false;
  *value = json->get<double>();
  return true;
}

// A list of at most so many entries.
bool IsList(const Json* json, size_t most) {
  return json != nullptr && json->is_array() && json->size() <= most;
}

// The wrong tokens of one mistake, [place, expected, predicted] each, by place; none if they are no
// such list, or not of this sample.
std::vector<WrongToken> WrongTokens(const Task& task, const Json& list, const Sample& sample) {
  const std::vector<int32_t> target = TargetOf(sample);
  const int64_t last = task.vocabulary() - 1;
  std::vector<WrongToken> wrong;
  for (const Json& entry : list) {
    if (!entry.is_array() || entry.size() != 3) return {};
    const int64_t least = wrong.empty() ? 0 : wrong.back().place + 1;
    int64_t place = 0, expected = 0, predicted = 0;
    if (!ReadWhole(&entry[0], least, std::ssize(target) - 1, &place) ||
        !ReadWhole(&entry[1], 0, last, &expected) || !ReadWhole(&entry[2], 0, last, &predicted) ||
        target[static_cast<size_t>(place)] != expected || predicted == expected) {
      return {};
    }
    wrong.push_back(
        {place, static_cast<int32_t>(expected), static_cast<int32_t>(predicted), {}, -1.0});
  }
  return wrong;
}

Status ExplainSample(const Task& task, const Json& mistake, ExplainedLength* explained) {
  Mistake result;
  const Json* wrong = Member(mistake, "wrong");
  if (!ReadWhole(Member(mistake, "sample"), 0, kLongest, &result.sample) ||
      !IsList(wrong, kMostWrongTokens)) {
    return NoResult("with a mistake that names no sample and its wrong tokens");
  }
  const Sample sample = EvaluationSample(task, explained->length, result.sample);
  result.wrong = WrongTokens(task, *wrong, sample);
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
  return Status::Ok();
}

Status ExplainLength(const Task& task, const Json& entry, ExplainedLength* explained) {
  if (!ReadNumber(Member(entry, "multiple"), 0.0, 1e9, &explained->multiple) ||
      !ReadWhole(Member(entry, "length"), task.min_length(), kLongest, &explained->length)) {
    return NoResult("with a length that has no sample");
  }
  if (const Json* error = Member(entry, "error"); error != nullptr && error->is_string()) {
    explained->error = error->get<std::string>();
    return Status::Ok();
  }
  if (!ReadNumber(Member(entry, "exact_match"), 0.0, 1.0, &explained->exact_match)) {
    return NoResult("without an exact_match for length " + std::to_string(explained->length));
  }
  const Json* mistakes = Member(entry, "mistakes");
  if (mistakes == nullptr) return Status::Ok();
  if (!IsList(mistakes, kMostMistakes)) return NoResult("with mistakes that are no list of them");
  for (const Json& mistake : *mistakes) {
    const Status status = ExplainSample(task, mistake, explained);
    if (!status.ok()) return status;
  }
  return Status::Ok();
}

}  // namespace

Expected<std::vector<ExplainedLength>> ExplainMistakes(const std::string& result) {
  const Expected<Json> json = Parse(result);
  if (!json.ok()) return json.status();
  const Json* run = Member(*json, "run");
  const Json* options = run == nullptr ? nullptr : Member(*run, "task");
  const Json* entries = Member(*json, "lengths");
  if (options == nullptr || !IsList(entries, kMostLengths)) {
    return NoResult("without a run, its task and lengths");
  }
  // The run's other settings may be those of another version.
  const Expected<std::unique_ptr<Task>> task = ParseTask(options->dump());
  if (!task.ok()) return task.status();
  std::vector<ExplainedLength> lengths;
  for (const Json& entry : *entries) {
    ExplainedLength explained;
    const Status status = ExplainLength(**task, entry, &explained);
    if (!status.ok()) return status;
    lengths.push_back(std::move(explained));
  }
  return lengths;
}

}  // namespace flash_entmax::lab
