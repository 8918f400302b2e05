#include "config.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <utility>

#include "fields.h"

namespace flash_entmax::lab {
namespace {

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

constexpr int64_t kMany = int64_t{1} << 40;

template <typename Fields>
void ListTask(Fields& fields, TaskOptions* task) {
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
  fields.Rare();
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
}

void ReadTask(const Json& json, TaskOptions* task, Status* status) {
  FieldReader fields(json, "task.", status);
  ListTask(fields, task);
  fields.Finish();
}

template <typename Fields>
void ListModel(Fields& fields, ModelConfig* model) {
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
  fields.Rare();
  fields.Whole("zero_token", &model->zero_token, -1, 1 << 24);
}

void ReadModel(const Json& json, ModelConfig* model, Status* status) {
  FieldReader fields(json, "model.", status);
  ListModel(fields, model);
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

template <typename Fields>
void ListTraining(Fields& fields, TrainingConfig* training) {
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
}

void ReadTraining(const Json& json, TrainingConfig* training, Status* status) {
  FieldReader fields(json, "training.", status);
  ListTraining(fields, training);
  fields.Finish();
  if (training->min_length > training->max_length) {
    fields.Fail("training.min_length", std::to_string(training->min_length),
                "at most training.max_length, " + std::to_string(training->max_length));
  }
}

template <typename Fields>
void ListEvaluation(Fields& fields, EvaluationConfig* evaluation) {
  fields.Whole("length", &evaluation->length, 1, 1 << 24);
  fields.Reals("multiples", &evaluation->multiples, 1.0 / 64, 65536);
  fields.Whole("samples", &evaluation->samples, 1, 1 << 24);
  fields.Whole("total_tokens", &evaluation->total_tokens, 0, kMany);
  fields.Whole("max_tokens", &evaluation->max_tokens, 1, kMany);
  fields.Whole("statistics_rows", &evaluation->statistics_rows, 0, 1 << 20);
}

void ReadEvaluation(const Json& json, EvaluationConfig* evaluation, Status* status) {
  FieldReader fields(json, "evaluation.", status);
  ListEvaluation(fields, evaluation);
  fields.Finish();
}

// The options as JSON. Rare fields are left out where they are as they are by default, so that
// checkpoints from before there was a choice still match.
template <typename Options>
Json Written(Options options, void (*list)(FieldWriter&, Options*)) {
  FieldWriter written, by_default;
  list(written, &options);
  Options defaults;
  list(by_default, &defaults);
  Json json = written.object();
  for (const std::string& key : written.rare_keys()) {
    if (json[key] == by_default.object()[key]) json.erase(key);
  }
  return json;
}

Expected<RunConfig> ReadRun(const Json& json) {
  RunConfig run;
  Status status;
  FieldReader fields(json, "", &status);
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
  Json training = Written(run.training, ListTraining<FieldWriter>);
  if (run.training.optimizer == Optimizer::kAdamW) {  // the only one there was at first
    training.erase("optimizer");
    training.erase("muon_rate");
  }
  const Json json = {{"name", run.recipe},
                     {"variant", run.variant},
                     {"seed", run.seed},
                     {"task", Written(run.task, ListTask<FieldWriter>)},
                     {"model", Written(run.model, ListModel<FieldWriter>)},
                     {"training", std::move(training)},
                     {"evaluation", Written(run.evaluation, ListEvaluation<FieldWriter>)}};
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
