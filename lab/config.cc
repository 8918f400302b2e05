#include "config.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <utility>

namespace flash_entmax::lab {
namespace {

using Json = nlohmann::json;

template <typename T>
using Names = std::vector<std::pair<const char*, T>>;

const Names<AttentionKind>& AttentionNames() {
  static const Names<AttentionKind> names = {{"softmax", AttentionKind::kSoftmax},
                                             {"ssmax", AttentionKind::kSsmax},
                                             {"entmax", AttentionKind::kEntmax},
                                             {"entmax_learnable", AttentionKind::kEntmaxLearnable},
                                             {"asentmax", AttentionKind::kAsentmax},
                                             {"linear", AttentionKind::kLinear},
                                             {"selective_linear", AttentionKind::kSelectiveLinear}};
  return names;
}
const Names<Positions>& PositionNames() {
  static const Names<Positions> names = {{"none", Positions::kNone},
                                         {"rope", Positions::kRope},
                                         {"alibi", Positions::kAlibi},
                                         {"nape", Positions::kNape}};
  return names;
}
const Names<Norm>& NormNames() {
  static const Names<Norm> names = {{"pre", Norm::kPre}, {"pre_post", Norm::kPreAndPost}};
  return names;
}
const Names<Optimizer>& OptimizerNames() {
  static const Names<Optimizer> names = {{"adamw", Optimizer::kAdamW}, {"muon", Optimizer::kMuon}};
  return names;
}
const Names<Precision>& PrecisionNames() {
  static const Names<Precision> names = {{"float32", Precision::kFloat32},
                                         {"bfloat16", Precision::kBFloat16},
                                         {"bfloat16_true", Precision::kBFloat16True}};
  return names;
}

template <typename T>
const char* NameIn(const Names<T>& names, T value) {
  for (const auto& [name, candidate] : names) {
    if (candidate == value) return name;
  }
  return "";
}

// Reads the fields of one JSON object or writes them. The first error stays.
class Fields {
 public:
  // Reading.
  Fields(const Json& object, std::string prefix, Status* status)
      : object_(object), prefix_(std::move(prefix)), status_(status) {
    if (!object_.is_object()) {
      Fail(prefix_.substr(0, prefix_.size() - 1), object_.dump(), "a JSON object");
    }
  }

  template <typename Integer>
  void Whole(const char* key, Integer* value, int64_t low, int64_t high) {
    const Json* entry = Find(key);
    if (entry == nullptr) return;
    if (!entry->is_number_integer() || *entry < low || *entry > high) {
      return Fail(prefix_ + key, entry->dump(),
                  "a whole number in [" + std::to_string(low) + ", " + std::to_string(high) + "]");
    }
    *value = entry->get<Integer>();
  }
  void Real(const char* key, double* value, double low, double high) {
    const Json* entry = Find(key);
    if (entry == nullptr) return;
    if (!entry->is_number() || !(*entry >= low && *entry <= high)) {
      std::ostringstream range;
      range << "a number in [" << low << ", " << high << "]";
      return Fail(prefix_ + key, entry->dump(), range.str());
    }
    *value = entry->get<double>();
  }
  void Truth(const char* key, bool* value) {
    const Json* entry = Find(key);
    if (entry == nullptr) return;
    if (!entry->is_boolean()) return Fail(prefix_ + key, entry->dump(), "true or false");
    *value = entry->get<bool>();
  }
  void Text(const char* key, std::string* value) {
    const Json* entry = Find(key);
    if (entry == nullptr) return;
    if (!entry->is_string()) return Fail(prefix_ + key, entry->dump(), "a string");
    *value = entry->get<std::string>();
  }
  template <typename T>
  void Choice(const char* key, T* value, const Names<T>& names) {
    const Json* entry = Find(key);
    if (entry == nullptr) return;
    std::string all;
    for (const auto& [name, candidate] : names) {
      if (entry->is_string() && *entry == name) {
        *value = candidate;
        return;
      }
      all += (all.empty() ? "" : ", ") + std::string(name);
    }
    Fail(prefix_ + key, entry->dump(), "one of " + all);
  }
  void Reals(const char* key, std::vector<double>* values, double low, double high) {
    const Json* entry = Find(key);
    if (entry == nullptr) return;
    bool good = entry->is_array() && !entry->empty();
    if (good) {
      for (const Json& item : *entry) good &= item.is_number() && item >= low && item <= high;
    }
    if (!good) {
      std::ostringstream range;
      range << "a list of numbers in [" << low << ", " << high << "]";
      return Fail(prefix_ + key, entry->dump(), range.str());
    }
    *values = entry->get<std::vector<double>>();
  }
  const Json* Find(const char* key) {
    known_.insert(key);
    if (!status_->ok() || !object_.is_object()) return nullptr;
    const auto found = object_.find(key);
    return found == object_.end() ? nullptr : &*found;
  }
  // After every key has been asked for: the rest is unknown.
  void Finish() {
    if (!status_->ok() || !object_.is_object()) return;
    for (const auto& [key, value] : object_.items()) {
      if (known_.count(key) != 0) continue;
      std::string all;
      for (const std::string& name : known_) all += (all.empty() ? "" : ", ") + name;
      return Fail(prefix_ + key, value.dump(), "left out, since the keys here are " + all);
    }
  }
  void Fail(const std::string& key, const std::string& got, const std::string& allowed) {
    if (!status_->ok()) return;
    *status_ = Status::InvalidArgument((key.empty() ? "recipe" : key) + ": got " +
                                       got.substr(0, 80) + "; must be " + allowed);
  }

 private:
  const Json& object_;
  const std::string prefix_;
  Status* status_;
  std::set<std::string> known_;
};

constexpr int64_t kMany = int64_t{1} << 40;

void ReadTask(const Json& json, TaskOptions* task, Status* status) {
  Fields fields(json, "task.", status);
  fields.Text("name", &task->name);
  fields.Whole("symbols", &task->symbols, 0, 65536);
  fields.Whole("modulus", &task->modulus, 2, 1024);
  fields.Whole("distance", &task->distance, 1, 1024);
  fields.Whole("items", &task->items, 1, 65536);
  fields.Real("write", &task->write, 0, 1);
  fields.Real("read", &task->read, 0, 1);
  fields.Whole("key_symbols", &task->key_symbols, 1, 8);
  fields.Whole("value_symbols", &task->value_symbols, 1, 8);
  fields.Whole("vocabulary", &task->vocabulary, 2, 1 << 20);
  fields.Whole("queries", &task->queries, 1, 64);
  fields.Real("few_pairs", &task->few_pairs, 0, 1);
  fields.Real("collisions", &task->collisions, 0, 1);
  fields.Real("key_collisions", &task->key_collisions, 0, 1);
  fields.Truth("crossed_keys", &task->crossed_keys);
  fields.Whole("easy_steps", &task->easy_steps, 0, kMany);
  fields.Real("few_symbols", &task->few_symbols, 0, 1);
  fields.Whole("fewest_symbols", &task->fewest_symbols, 2, 65536);
  fields.Whole("most_symbols", &task->most_symbols, 0, 65536);
  fields.Real("prefix", &task->prefix, 0, 1);
  fields.Real("shift", &task->shift, 0, 1);
  fields.Real("late", &task->late, 0, 1);
  fields.Truth("end", &task->end);
  fields.Truth("repeat_queries", &task->repeat_queries);
  fields.Truth("own_slots", &task->own_slots);
  fields.Finish();
}

void ReadModel(const Json& json, ModelConfig* model, Status* status) {
  Fields fields(json, "model.", status);
  fields.Whole("layers", &model->layers, 1, 128);
  fields.Whole("width", &model->width, 8, 16384);
  fields.Whole("mlp", &model->mlp, 8, 65536);
  fields.Whole("heads", &model->heads, 1, 256);
  fields.Choice("norm", &model->norm, NormNames());
  fields.Choice("attention", &model->attention, AttentionNames());
  fields.Real("alpha", &model->alpha, 1.0, 2.0);
  fields.Choice("positions", &model->positions, PositionNames());
  fields.Real("rope_base", &model->rope_base, 1.0, 1e9);
  fields.Real("init", &model->init, 1e-6, 10.0);
  fields.Real("scaler_start", &model->scaler_start, 1.0 + 1e-6, 100.0);
  fields.Truth("scaler_random", &model->scaler_random);
  fields.Whole("zero_token", &model->zero_token, -1, 1 << 24);
  fields.Finish();
  if (model->width % model->heads != 0) {
    fields.Fail("model.heads", std::to_string(model->heads),
                "a divisor of model.width, " + std::to_string(model->width));
  }
  if (model->positions == Positions::kRope && model->width / model->heads % 2 != 0) {
    fields.Fail("model.positions", "\"rope\"", "another, since the head size is odd");
  }
  if (model->positions == Positions::kNape && model->heads % 2 != 0) {
    fields.Fail("model.positions", "\"nape\"", "another, since the number of heads is odd");
  }
  const bool entmax = model->attention == AttentionKind::kEntmax ||
                      model->attention == AttentionKind::kEntmaxLearnable ||
                      model->attention == AttentionKind::kAsentmax;
  if (entmax && !(model->alpha > 1.0)) {
    fields.Fail("model.alpha", std::to_string(model->alpha), "above 1 with this attention");
  }
  if (model->attention == AttentionKind::kEntmaxLearnable && !(model->alpha < 2.0)) {
    fields.Fail("model.alpha", std::to_string(model->alpha), "below 2 where it is learnt");
  }
}

void ReadTraining(const Json& json, TrainingConfig* training, Status* status) {
  Fields fields(json, "training.", status);
  fields.Whole("steps", &training->steps, 1, kMany);
  fields.Whole("batch", &training->batch, 1, 1 << 20);
  fields.Whole("min_length", &training->min_length, 1, 1 << 24);
  fields.Whole("max_length", &training->max_length, 1, 1 << 24);
  fields.Choice("optimizer", &training->optimizer, OptimizerNames());
  fields.Real("muon_rate", &training->muon_rate, 0, 10);
  fields.Real("learning_rate", &training->learning_rate, 0, 10);
  fields.Whole("warmup", &training->warmup, 0, kMany);
  fields.Real("final_rate", &training->final_rate, 0, 1);
  fields.Real("beta1", &training->beta1, 0, 0.99999);
  fields.Real("beta2", &training->beta2, 0, 0.9999999);
  fields.Real("weight_decay", &training->weight_decay, 0, 10);
  fields.Real("clip", &training->clip, 1e-6, 1e6);
  fields.Choice("precision", &training->precision, PrecisionNames());
  fields.Whole("log_every", &training->log_every, 1, kMany);
  fields.Whole("evaluate_every", &training->evaluate_every, 0, kMany);
  fields.Whole("checkpoint_seconds", &training->checkpoint_seconds, 1, 86400);
  fields.Finish();
  if (training->min_length > training->max_length) {
    fields.Fail("training.min_length", std::to_string(training->min_length),
                "at most training.max_length, " + std::to_string(training->max_length));
  }
}

void ReadEvaluation(const Json& json, EvaluationConfig* evaluation, Status* status) {
  Fields fields(json, "evaluation.", status);
  fields.Whole("length", &evaluation->length, 1, 1 << 24);
  fields.Reals("multiples", &evaluation->multiples, 1.0 / 64, 65536);
  fields.Whole("samples", &evaluation->samples, 1, 1 << 24);
  fields.Whole("total_tokens", &evaluation->total_tokens, 0, kMany);
  fields.Whole("max_tokens", &evaluation->max_tokens, 1, kMany);
  fields.Whole("statistics_rows", &evaluation->statistics_rows, 0, 1 << 20);
  fields.Finish();
}

Expected<RunConfig> ReadRun(const Json& json) {
  RunConfig run;
  Status status;
  Fields fields(json, "", &status);
  fields.Text("name", &run.recipe);
  fields.Text("variant", &run.variant);
  fields.Whole("seed", &run.seed, 0, kMany);
  fields.Find("seeds");
  fields.Find("about");
  const Json empty = Json::object();
  const auto section = [&](const char* key) -> const Json& {
    const Json* entry = fields.Find(key);
    return entry != nullptr ? *entry : empty;
  };
  ReadTask(section("task"), &run.task, &status);
  ReadModel(section("model"), &run.model, &status);
  ReadTraining(section("training"), &run.training, &status);
  ReadEvaluation(section("evaluation"), &run.evaluation, &status);
  fields.Finish();
  if (!status.ok()) return status;
  const Expected<std::unique_ptr<Task>> task = MakeTask(run.task);
  if (!task.ok()) return task.status();
  const int64_t least = (*task)->min_length();
  for (const auto& [key, length] :
       {std::pair<const char*, int64_t>("training.min_length", run.training.min_length),
        {"evaluation.length", run.evaluation.length}}) {
    if (length < least) {
      fields.Fail(key, std::to_string(length),
                  "at least " + std::to_string(least) + " for this task");
    }
  }
  for (const double multiple : run.evaluation.multiples) {
    if (static_cast<int64_t>(multiple * static_cast<double>(run.evaluation.length)) < least) {
      fields.Fail("evaluation.multiples", std::to_string(multiple),
                  "such that every length is at least " + std::to_string(least));
    }
  }
  if (run.model.zero_token >= (*task)->vocabulary()) {
    fields.Fail("model.zero_token", std::to_string(run.model.zero_token),
                "below the task's vocabulary, " + std::to_string((*task)->vocabulary()));
  }
  if (!status.ok()) return status;
  return run;
}

// Letters, digits, '.', '-', '_': what can be a folder's name.
bool IsName(const std::string& name) {
  return !name.empty() && name.size() <= 100 && name[0] != '.' &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                  c == '.' || c == '-' || c == '_';
         });
}

Status ApplyOverride(const std::string& text, Json* json) {
  const size_t equals = text.find('=');
  if (equals == std::string::npos) {
    return Status::InvalidArgument("override: got \"" + text +
                                   "\"; must be KEY=VALUE, as in training.steps=100");
  }
  Json value = Json::parse(text.substr(equals + 1), nullptr, false);
  if (value.is_discarded()) value = text.substr(equals + 1);  // A string without its quotes.
  Json* at = json;
  std::istringstream keys(text.substr(0, equals));
  for (std::string key; std::getline(keys, key, '.');) {
    if (!at->is_object() && !at->is_null()) {
      return Status::InvalidArgument("override: got \"" + text +
                                     "\"; must name a key of a section");
    }
    at = &(*at)[key];
  }
  *at = std::move(value);
  return Status::Ok();
}

}  // namespace

const char* NameOf(AttentionKind kind) { return NameIn(AttentionNames(), kind); }
const char* NameOf(Positions positions) { return NameIn(PositionNames(), positions); }

uint64_t Checksum(const void* data, size_t bytes, uint64_t start) {
  const auto* at = static_cast<const unsigned char*>(data);
  uint64_t hash = start;
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ at[i]) * 0x100000001B3u;
  return hash;
}

Expected<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf()) || file.bad()) {
    return Status::Io("cannot read \"" + path + "\"");
  }
  return text.str();
}

Expected<Recipe> ReadRecipe(const std::string& path, const std::vector<std::string>& overrides) {
  const Expected<std::string> text = ReadFile(path);
  if (!text.ok()) return text.status();
  return ParseRecipe(*text, path, overrides);
}

Expected<Recipe> ParseRecipe(const std::string& text, const std::string& name_for_messages,
                             const std::vector<std::string>& overrides) {
  Json json = Json::parse(text, nullptr, false, true);
  if (json.is_discarded() || !json.is_object()) {
    return Status::InvalidArgument("recipe: got \"" + name_for_messages +
                                   "\"; must be a well-formed JSON object");
  }
  Recipe recipe;
  const auto name = json.find("name");
  if (name == json.end() || !name->is_string() || !IsName(*name)) {
    return Status::InvalidArgument("name: got " + (name == json.end() ? "nothing" : name->dump()) +
                                   "; must be a word of letters, digits, '-', '_' and '.'");
  }
  recipe.name = *name;
  Json variants = Json::object({{"default", Json::object()}});
  if (json.contains("variants")) {
    variants = json["variants"];
    json.erase("variants");
  }
  if (!variants.is_object() || variants.empty()) {
    return Status::InvalidArgument("variants: got " + variants.dump().substr(0, 80) +
                                   "; must be an object of merge patches");
  }
  for (const auto& [variant, patch] : variants.items()) {
    if (!IsName(variant) || !patch.is_object()) {
      return Status::InvalidArgument("variants: got \"" + variant +
                                     "\"; must be a word with an object");
    }
    Json merged = json;
    merged.merge_patch(patch);
    for (const std::string& text_of_override : overrides) {
      const Status status = ApplyOverride(text_of_override, &merged);
      if (!status.ok()) return status;
    }
    const Json seeds = merged.value("seeds", Json::array({1}));
    merged["name"] = recipe.name;
    merged["variant"] = variant;
    bool good = seeds.is_array() && !seeds.empty();
    if (good) {
      for (const Json& seed : seeds) good &= seed.is_number_integer() && seed >= 0;
    }
    if (!good) {
      return Status::InvalidArgument("seeds: got " + seeds.dump() +
                                     "; must be a list of whole numbers ≥ 0");
    }
    for (const Json& seed : seeds) {
      merged["seed"] = seed;
      Expected<RunConfig> run = ReadRun(merged);
      if (!run.ok()) {
        return Status(run.status().code(), run.status().message() + " (" + name_for_messages +
                                               ", variant \"" + variant + "\")");
      }
      recipe.runs.push_back(*std::move(run));
    }
  }
  return recipe;
}

std::string RunToJson(const RunConfig& run) {
  const TaskOptions& task = run.task;
  const ModelConfig& model = run.model;
  const TrainingConfig& training = run.training;
  const EvaluationConfig& evaluation = run.evaluation;
  Json json = {{"name", run.recipe},
               {"variant", run.variant},
               {"seed", run.seed},
               {"task",
                {{"name", task.name},
                 {"symbols", task.symbols},
                 {"modulus", task.modulus},
                 {"distance", task.distance},
                 {"items", task.items},
                 {"write", task.write},
                 {"read", task.read},
                 {"key_symbols", task.key_symbols},
                 {"value_symbols", task.value_symbols},
                 {"vocabulary", task.vocabulary},
                 {"queries", task.queries},
                 {"few_pairs", task.few_pairs},
                 {"collisions", task.collisions}}},
               {"model",
                {{"layers", model.layers},
                 {"width", model.width},
                 {"mlp", model.mlp},
                 {"heads", model.heads},
                 {"norm", NameIn(NormNames(), model.norm)},
                 {"attention", NameOf(model.attention)},
                 {"alpha", model.alpha},
                 {"positions", NameOf(model.positions)},
                 {"rope_base", model.rope_base},
                 {"init", model.init},
                 {"scaler_start", model.scaler_start},
                 {"scaler_random", model.scaler_random}}},
               {"training",
                {{"steps", training.steps},
                 {"batch", training.batch},
                 {"min_length", training.min_length},
                 {"max_length", training.max_length},
                 {"learning_rate", training.learning_rate},
                 {"warmup", training.warmup},
                 {"final_rate", training.final_rate},
                 {"beta1", training.beta1},
                 {"beta2", training.beta2},
                 {"weight_decay", training.weight_decay},
                 {"clip", training.clip},
                 {"precision", NameIn(PrecisionNames(), training.precision)},
                 {"log_every", training.log_every},
                 {"evaluate_every", training.evaluate_every},
                 {"checkpoint_seconds", training.checkpoint_seconds}}},
               {"evaluation",
                {{"length", evaluation.length},
                 {"multiples", evaluation.multiples},
                 {"samples", evaluation.samples},
                 {"total_tokens", evaluation.total_tokens},
                 {"max_tokens", evaluation.max_tokens},
                 {"statistics_rows", evaluation.statistics_rows}}}};
  // Left out by default, so that checkpoints from before there was a choice still match.
  if (training.optimizer != Optimizer::kAdamW) {
    json["training"]["optimizer"] = NameIn(OptimizerNames(), training.optimizer);
    json["training"]["muon_rate"] = training.muon_rate;
  }
  if (task.key_collisions > 0.0) json["task"]["key_collisions"] = task.key_collisions;
  if (task.crossed_keys) json["task"]["crossed_keys"] = true;
  if (task.easy_steps > 0) json["task"]["easy_steps"] = task.easy_steps;
  if (task.few_symbols > 0.0) json["task"]["few_symbols"] = task.few_symbols;
  if (task.fewest_symbols != 2) json["task"]["fewest_symbols"] = task.fewest_symbols;
  if (task.most_symbols != 0) json["task"]["most_symbols"] = task.most_symbols;
  if (task.prefix > 0.0) json["task"]["prefix"] = task.prefix;
  if (task.shift > 0.0) json["task"]["shift"] = task.shift;
  if (task.late > 0.0) json["task"]["late"] = task.late;
  if (task.end) json["task"]["end"] = true;
  if (task.repeat_queries) json["task"]["repeat_queries"] = true;
  if (task.own_slots) json["task"]["own_slots"] = true;
  if (model.zero_token >= 0) json["model"]["zero_token"] = model.zero_token;
  return json.dump(2) + "\n";
}

Expected<std::unique_ptr<Task>> ParseTask(const std::string& text) {
  const Json json = Json::parse(text, nullptr, false);
  if (json.is_discarded()) {
    return Status::InvalidArgument("task: got text that is no JSON; must be a task's options");
  }
  TaskOptions options;
  Status status;
  ReadTask(json, &options, &status);
  if (!status.ok()) return status;
  return MakeTask(options);
}

Expected<RunConfig> ParseRun(const std::string& text) {
  const Json json = Json::parse(text, nullptr, false);
  if (json.is_discarded()) {
    return Status::InvalidArgument("run: got text that is no JSON; must be a run's configuration");
  }
  return ReadRun(json);
}

}  // namespace flash_entmax::lab
