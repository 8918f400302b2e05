// Multi-query multi-token associative recall (MQMTAR; Vasylenko, Pitorro, Martins & Treviso 2026).
//
// The context of `length` tokens holds ⌊0.8·length/(K+V+2)⌋ pairs (at least one): a key of K
// symbols, `pair`, a value of V symbols and at least one `space`, at random offsets in a background
// of spaces. Keys are distinct, values are distinct, both drawn from fixed vocabularies. Then come
// the queries, each `query` and a key of the context (different ones while there are enough pairs).
// The published generator differs: with `own_slots` each pair lies anywhere within ⌊length/pairs⌋
// tokens of its own (what is left of the context is missing), and with `repeat_queries` any query
// may ask for any pair.
// The target holds, for each query, `query` and the value:
//     begin, context, (query key)×queries, separator, (query value)×queries
// Tokens: symbols 0 … S−1, space, pair, query, begin, separator.
//
// For training only, `few_pairs` of the samples hold 1 to 3 pairs; in `collisions` of them the
// values come from a part of the vocabulary whose first symbols are few, so that copying what
// follows the same first symbol elsewhere is wrong more often than right; in `key_collisions` of
// them all keys share their first or their last symbol with one of them. With `crossed_keys` they
// may share it at the other place too, and if that one backwards is a key it is there in half of
// those samples. In long contexts many keys are alike, in short ones by chance hardly any. Within
// the first `easy_steps` steps the share of `few_pairs` falls to none and that of `key_collisions`
// rises from none.

#include <algorithm>
#include <array>
#include <map>
#include <set>

#include "tasks/task.h"

namespace flash_entmax::lab {
namespace {

// The vocabularies belong to the task, not to a run: every seed and every evaluation shares them.
constexpr uint64_t kVocabularySeed = 20260101;
constexpr int64_t kFewFirstSymbols = 4;
constexpr int64_t kSimplePairs = 3;
constexpr int64_t kNamedKeys = 3;

class RecallTask final : public Task {
 public:
  explicit RecallTask(const TaskOptions& options)
      : options_(options),
        keys_(MakeWords(1, options.key_symbols)),
        values_(MakeWords(2, options.value_symbols)) {
    // Words in order, so that words with the same first symbol are neighbours.
    std::sort(values_.begin(), values_.end());
    by_first_.resize(static_cast<size_t>(options.symbols));
    by_last_.resize(static_cast<size_t>(options.symbols));
    for (size_t i = 0; i < keys_.size(); ++i) {
      by_first_[FirstSymbol(keys_[i])].push_back(static_cast<int32_t>(i));
      by_last_[LastSymbol(keys_[i])].push_back(static_cast<int32_t>(i));
      number_.emplace(keys_[i], static_cast<int32_t>(i));
    }
  }

  int64_t vocabulary() const override { return options_.symbols + 5; }
  int64_t min_length() const override { return PairTokens(); }
  int64_t MaxTokens(int64_t length) const override {
    return length + 2 + options_.queries * (2 + options_.key_symbols + options_.value_symbols);
  }
  int64_t MaxTargets(int64_t /*length*/) const override {
    return options_.queries * (1 + options_.value_symbols);
  }

  Sample Generate(int64_t length, Random& random) const override {
    return Make(length, Pairs(length), false, false, random);
  }

  Sample GenerateForTraining(int64_t length, int64_t step, Random& random) const override {
    int64_t pairs = Pairs(length);
    double few = options_.few_pairs, alike = options_.key_collisions;
    if (options_.easy_steps > 0) {
      const double done =
          std::min(1.0, static_cast<double>(step) / static_cast<double>(options_.easy_steps));
      few *= 1.0 - done;
      alike *= done;
    }
    if (random.Chance(few)) {
      pairs = std::min(pairs, random.Integer(1, kSimplePairs));
    }
    const bool collide = random.Chance(options_.collisions);
    // No number is drawn where there was no choice: samples stay what they were.
    const bool keys_collide = options_.key_collisions > 0.0 && random.Chance(alike);
    return Make(length, pairs, collide, keys_collide, random);
  }

  void Solve(Sample& sample) const override {
    std::vector<int32_t>& tokens = sample.tokens;
    const auto first_target =
        std::find(sample.target.begin(), sample.target.end(), 1) - sample.target.begin();
    const auto answer = tokens.begin() + first_target;
    const auto first_query = std::find(tokens.begin(), answer, query());
    auto write = answer;
    for (auto at = first_query; at + 1 < answer; at += 1 + options_.key_symbols) {
      *write++ = query();
      // A key is what stands before `pair`.
      for (auto mark = tokens.begin(); mark < first_query; ++mark) {
        if (*mark == pair() && std::equal(mark - options_.key_symbols, mark, at + 1)) {
          write = std::copy(mark + 1, mark + 1 + options_.value_symbols, write);
          break;
        }
      }
    }
  }

  // A wrong symbol of a value may be that of other keys, at the same place in their values.
  void Explain(const Sample& sample, std::vector<WrongToken>* wrong) const override {
    const std::vector<int32_t>& tokens = sample.tokens;
    const auto end = std::find(tokens.begin(), tokens.end(), query());
    for (WrongToken& token : *wrong) {
      const int64_t symbol = token.place % (1 + options_.value_symbols);  // 0: the mark before it
      if (symbol == 0 || token.place >= options_.queries * (1 + options_.value_symbols)) continue;
      std::set<int32_t> there;
      int64_t keys = 0;
      for (auto mark = tokens.begin(); mark < end; ++mark) {
        if (*mark != pair()) continue;
        there.insert(mark[symbol]);
        if (mark[symbol] != token.predicted || ++keys > kNamedKeys) continue;
        token.source += token.source.empty() ? "of key" : ", of key";
        for (auto at = mark - options_.key_symbols; at < mark; ++at) {
          token.source += " " + std::to_string(*at);
        }
      }
      if (keys > kNamedKeys) {
        token.source += " and of " + std::to_string(keys - kNamedKeys) + " others";
      }
      // The right one is among them.
      token.chance =
          static_cast<double>(there.size() - 1) / static_cast<double>(options_.symbols - 1);
    }
  }

 private:
  using Word = std::array<int32_t, 8>;

  std::vector<Word> MakeWords(uint64_t stream, int64_t word_symbols) const {
    Random random(kVocabularySeed, stream);
    std::set<Word> seen;
    std::vector<Word> words;
    while (static_cast<int64_t>(words.size()) < options_.vocabulary) {
      Word word{};
      for (int64_t i = 0; i < word_symbols; ++i) {
        word[static_cast<size_t>(i)] = static_cast<int32_t>(random.Below(options_.symbols));
      }
      if (seen.insert(word).second) words.push_back(word);
    }
    return words;
  }

  int64_t PairTokens() const { return options_.key_symbols + options_.value_symbols + 2; }
  int64_t Pairs(int64_t length) const {
    const int64_t pairs = length * 4 / (5 * PairTokens());
    return std::clamp<int64_t>(pairs, 1, options_.vocabulary);
  }

  // Ascending. Sorted random offsets among all the free spaces, or, with own_slots, one in each
  // slot.
  std::vector<int64_t> Offsets(int64_t length, int64_t pairs, Random& random) const {
    std::vector<int64_t> offsets(static_cast<size_t>(pairs));
    const int64_t free = length - pairs * PairTokens(), each = free / pairs;
    for (int64_t i = 0; i < pairs; ++i) {
      offsets[static_cast<size_t>(i)] =
          options_.own_slots ? i * each + random.Below(each + 1) : random.Below(free + 1);
    }
    std::sort(offsets.begin(), offsets.end());
    return offsets;
  }

  static size_t FirstSymbol(const Word& key) { return static_cast<size_t>(key[0]); }
  size_t LastSymbol(const Word& key) const {
    return static_cast<size_t>(key[static_cast<size_t>(options_.key_symbols - 1)]);
  }

  // A key and others that begin or end as it does, or with crossed_keys as it ends or begins; empty
  // if there are too few. The order is random, but for the key backwards: it is often the second.
  std::vector<int32_t> KeysAlike(int64_t pairs, Random& random) const {
    const auto chosen = static_cast<int32_t>(random.Below(options_.vocabulary));
    const Word& word = keys_[static_cast<size_t>(chosen)];
    std::vector<int32_t> pool = {chosen};
    const size_t first = FirstSymbol(word), last = LastSymbol(word);
    // Those that none of the lists before holds.
    const auto add = [&](const std::vector<int32_t>& others, const auto& is_there) {
      for (const int32_t other : others) {
        if (other != chosen && !is_there(keys_[static_cast<size_t>(other)])) pool.push_back(other);
      }
    };
    const auto begins = [&](const Word& key) { return FirstSymbol(key) == first; };
    const auto alike = [&](const Word& key) { return begins(key) || LastSymbol(key) == last; };
    add(by_first_[first], [](const Word&) { return false; });
    add(by_last_[last], begins);
    if (options_.crossed_keys) {
      add(by_first_[last], alike);
      add(by_last_[first], [&](const Word& key) { return alike(key) || FirstSymbol(key) == last; });
    }
    if (static_cast<int64_t>(pool.size()) < pairs) return {};
    // The chosen one among them: it is the one that all others are like.
    std::vector<int32_t> keys = {chosen};
    for (const int32_t i : random.Distinct(pairs - 1, static_cast<int64_t>(pool.size()) - 1)) {
      keys.push_back(pool[static_cast<size_t>(i + 1)]);
    }
    if (options_.crossed_keys && pairs > 1 && random.Chance(0.5)) {
      Word backwards = word;
      std::reverse(backwards.begin(), backwards.begin() + options_.key_symbols);
      const auto found = number_.find(backwards);
      if (found != number_.end() &&
          std::find(keys.begin(), keys.end(), found->second) == keys.end()) {
        keys[1] = found->second;
      }
    }
    std::swap(keys[0], keys[static_cast<size_t>(random.Below(pairs))]);
    return keys;
  }

  Sample Make(int64_t length, int64_t pairs, bool collide, bool keys_collide,
              Random& random) const {
    std::vector<int32_t> keys;
    if (keys_collide) keys = KeysAlike(pairs, random);
    if (keys.empty()) keys = random.Distinct(pairs, options_.vocabulary);
    std::vector<int32_t> values;
    // Words that begin with one of a few neighbouring symbols; never fewer than are needed.
    const int64_t alike = std::max(
        2 * pairs, options_.vocabulary * kFewFirstSymbols / std::max(options_.symbols, int64_t{1}));
    if (collide && alike < options_.vocabulary) {
      const int64_t first = random.Below(options_.vocabulary - alike + 1);
      values = random.Distinct(pairs, alike);
      for (int32_t& value : values) value += static_cast<int32_t>(first);
    } else {
      values = random.Distinct(pairs, options_.vocabulary);
    }

    if (options_.own_slots) length = length / pairs * pairs;
    Sample sample;
    std::vector<int32_t>& tokens = sample.tokens;
    tokens.reserve(static_cast<size_t>(MaxTokens(length)));
    tokens.push_back(begin());
    // Free spaces before each pair, with those of the pairs before it.
    const std::vector<int64_t> offsets = Offsets(length, pairs, random);
    for (int64_t i = 0; i < pairs; ++i) {
      const auto place =
          static_cast<size_t>(1 + offsets[static_cast<size_t>(i)] + i * PairTokens());
      tokens.resize(place, space());
      const Word& key = keys_[static_cast<size_t>(keys[static_cast<size_t>(i)])];
      const Word& value = values_[static_cast<size_t>(values[static_cast<size_t>(i)])];
      tokens.insert(tokens.end(), key.begin(), key.begin() + options_.key_symbols);
      tokens.push_back(pair());
      tokens.insert(tokens.end(), value.begin(), value.begin() + options_.value_symbols);
      tokens.push_back(space());
    }
    tokens.resize(static_cast<size_t>(1 + length), space());

    const std::vector<int32_t> order = random.Distinct(std::min(options_.queries, pairs), pairs);
    std::vector<int32_t> answer;
    for (int64_t i = 0; i < options_.queries; ++i) {
      const bool ordered = i < pairs && !options_.repeat_queries;
      const auto which =
          static_cast<size_t>(ordered ? order[static_cast<size_t>(i)] : random.Below(pairs));
      const Word& key = keys_[static_cast<size_t>(keys[which])];
      const Word& value = values_[static_cast<size_t>(values[which])];
      tokens.push_back(query());
      tokens.insert(tokens.end(), key.begin(), key.begin() + options_.key_symbols);
      answer.push_back(query());
      answer.insert(answer.end(), value.begin(), value.begin() + options_.value_symbols);
    }
    tokens.push_back(separator());
    sample.target.assign(tokens.size(), 0);
    tokens.insert(tokens.end(), answer.begin(), answer.end());
    sample.target.resize(tokens.size(), 1);
    return sample;
  }

  int32_t space() const { return static_cast<int32_t>(options_.symbols); }
  int32_t pair() const { return space() + 1; }
  int32_t query() const { return space() + 2; }
  int32_t begin() const { return space() + 3; }
  int32_t separator() const { return space() + 4; }

  const TaskOptions options_;
  std::vector<Word> keys_;
  std::vector<Word> values_;
  // Numbers of the keys with a certain first or last symbol.
  std::vector<std::vector<int32_t>> by_first_, by_last_;
  std::map<Word, int32_t> number_;  // of a key
};

}  // namespace

std::unique_ptr<Task> MakeRecallTask(const TaskOptions& options) {
  if (options.name != "recall") return nullptr;
  return std::make_unique<RecallTask>(options);
}

}  // namespace flash_entmax::lab
