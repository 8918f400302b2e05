// The fields of a section of a recipe, read from JSON and written to it. A section lists its fields
// once, in a template that takes either of the two classes: key, value, and what is allowed.

#ifndef FLASH_ENTMAX_LAB_FIELDS_H_
#define FLASH_ENTMAX_LAB_FIELDS_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "flash_entmax/status.h"

namespace flash_entmax::lab {

using Json = nlohmann::json;

template <typename T>
using Names = std::vector<std::pair<const char*, T>>;

template <typename T>
const char* NameIn(const Names<T>& names, T value) {
  for (const auto& [name, candidate] : names) {
    if (candidate == value) return name;
  }
  return "";
}

// Reads the fields of one JSON object. The first error stays.
class FieldReader {
 public:
  FieldReader(const Json& object, std::string prefix, Status* status)
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
  // The fields after this are left out by the writer where they are as they are by default.
  void Rare() {}

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

// Writes the same fields to a JSON object.
class FieldWriter {
 public:
  template <typename Integer>
  void Whole(const char* key, Integer* value, int64_t /*low*/, int64_t /*high*/) {
    Write(key, *value);
  }
  void Real(const char* key, double* value, double /*low*/, double /*high*/) { Write(key, *value); }
  void Truth(const char* key, bool* value) { Write(key, *value); }
  void Text(const char* key, std::string* value) { Write(key, *value); }
  template <typename T>
  void Choice(const char* key, T* value, const Names<T>& names) {
    Write(key, NameIn(names, *value));
  }
  void Reals(const char* key, std::vector<double>* values, double /*low*/, double /*high*/) {
    Write(key, *values);
  }
  void Rare() { rare_ = true; }

  const Json& object() const { return object_; }
  const std::set<std::string>& rare_keys() const { return rare_keys_; }

 private:
  template <typename T>
  void Write(const char* key, const T& value) {
    object_[key] = value;
    if (rare_) rare_keys_.insert(key);
  }

  Json object_ = Json::object();
  bool rare_ = false;
  std::set<std::string> rare_keys_;
};

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_FIELDS_H_
