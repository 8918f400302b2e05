// Tasks whose target is a sequence made from the source: copy, reverse, sort, local_count, back,
// selective_copy, induction. Tokens are the symbols 0 … S−1, then `begin`, `separator`, `blank`,
// and for local_count the counts 0 … 47.
//
// For training only, `few_symbols` of the samples of copy, reverse, sort and back are made of
// `fewest_symbols` to `most_symbols` different ones. Among n places, with S symbols, about
// (n² / 2) / Sᵏ pairs of places have the same k symbols before them. What is told apart by the last
// two or three symbols in a short random sequence is not in a long one; in a short sequence of few
// symbols it is not either.
//
// For training only, in `prefix` of the samples of these tasks up to half of the symbols stand
// before `begin` and are no part of the source. A model that finds a symbol by its place, counted
// from the start, which ends where it was trained, is wrong in them.
//
// For training only, in `shift` of the samples the source is shorter, by up to three quarters, and
// twice as many symbols as it lost stand before `begin`, so that the sample has as many tokens as
// without. Otherwise places beyond the longest source are the target's in every sample.
//
// For training only, in `late` of the samples of copy and reverse the target begins later: up to
// half of it is left out, the four symbols after that are given, for the model to find the place
// by, and one more is left at least. (With few symbols the four may stand elsewhere too: in 0.1 %
// of such samples with 12 to 24, in 16 % with 2 to 8.) A model that finds a symbol by its number in
// the target is wrong in these samples. Without them it is right in training, but beyond the
// training length it meets numbers that it has never seen.

#include <algorithm>

#include "tasks/task.h"

namespace flash_entmax::lab {
namespace {

class SequenceTask : public Task {
 public:
  explicit SequenceTask(const TaskOptions& options) : options_(options) {}

  int64_t vocabulary() const override { return options_.symbols + 3; }
  int64_t MaxTokens(int64_t length) const override { return length + 2 + MaxTargets(length); }
  int64_t MaxTargets(int64_t length) const override { return length; }

  Sample Generate(int64_t length, Random& random) const override {
    return Make(Source(length, random));
  }

  void Solve(Sample& sample) const override {
    const auto begin_at = std::find(sample.tokens.begin(), sample.tokens.end(), begin());
    const auto separator_at = std::find(begin_at, sample.tokens.end(), separator());
    const std::vector<int32_t> target = Rule({begin_at + 1, separator_at});
    // All of it, or its end where the beginning is left out.
    const auto wanted = sample.tokens.end() - separator_at - 1;
    sample.tokens.erase(separator_at + 1, sample.tokens.end());
    sample.tokens.insert(sample.tokens.end(), target.end() - wanted, target.end());
  }

 protected:
  virtual std::vector<int32_t> Source(int64_t length, Random& random) const {
    std::vector<int32_t> source(static_cast<size_t>(length));
    for (int32_t& symbol : source) symbol = static_cast<int32_t>(random.Below(options_.symbols));
    return source;
  }
  virtual std::vector<int32_t> Rule(const std::vector<int32_t>& source) const = 0;

  Sample Make(const std::vector<int32_t>& source, const std::vector<int32_t>& before = {}) const {
    const std::vector<int32_t> target = Rule(source);
    Sample sample;
    sample.tokens.reserve(before.size() + source.size() + target.size() + 2);
    sample.tokens = before;
    sample.tokens.push_back(begin());
    sample.tokens.insert(sample.tokens.end(), source.begin(), source.end());
    sample.tokens.push_back(separator());
    sample.target.assign(sample.tokens.size(), 0);
    sample.tokens.insert(sample.tokens.end(), target.begin(), target.end());
    sample.target.resize(sample.tokens.size(), 1);
    return sample;
  }

  int32_t begin() const { return static_cast<int32_t>(options_.symbols); }
  int32_t separator() const { return begin() + 1; }
  int32_t blank() const { return begin() + 2; }
  const TaskOptions options_;
};

// Random symbols without further structure.
class RandomSymbolsTask : public SequenceTask {
 public:
  using SequenceTask::SequenceTask;

  Sample GenerateForTraining(int64_t length, int64_t /*step*/, Random& random) const override {
    // No number is drawn where there is no choice: samples stay what they were.
    const bool few = options_.few_symbols > 0.0 && random.Chance(options_.few_symbols);
    int64_t source = length, before = 0;
    if (options_.shift > 0.0 && random.Chance(options_.shift)) {
      source = random.Integer((length + 3) / 4, length);
      before = 2 * (length - source);
    }
    const int64_t all = before + source;
    const std::vector<int32_t> symbols = few ? SourceOfFew(all, random) : Source(all, random);
    if (before == 0 && options_.prefix > 0.0 && random.Chance(options_.prefix)) {
      before = random.Integer(0, length / 2);
    }
    const auto begin_at = symbols.begin() + before;
    return Make({begin_at, symbols.end()}, {symbols.begin(), begin_at});
  }

 private:
  std::vector<int32_t> SourceOfFew(int64_t length, Random& random) const {
    const int64_t few = random.Integer(options_.fewest_symbols, options_.most_symbols);
    const std::vector<int32_t> symbols = random.Distinct(few, options_.symbols);
    std::vector<int32_t> source(static_cast<size_t>(length));
    for (int32_t& symbol : source) symbol = symbols[static_cast<size_t>(random.Below(few))];
    return source;
  }
};

// Every symbol of the source, in an order that depends on their places only.
class ReorderingTask : public RandomSymbolsTask {
 public:
  using RandomSymbolsTask::RandomSymbolsTask;

  Sample GenerateForTraining(int64_t length, int64_t step, Random& random) const override {
    Sample sample = RandomSymbolsTask::GenerateForTraining(length, step, random);
    if (options_.late > 0.0 && random.Chance(options_.late)) BeginLate(&sample, random);
    return sample;
  }

  // What was said may be what follows elsewhere after the same symbols.
  void Explain(const Sample& sample, std::vector<WrongToken>* wrong) const override {
    const std::vector<int32_t> target = TargetOf(sample);
    for (WrongToken& token : *wrong) {
      int64_t longest = 0, where = -1;
      for (int64_t at = 0; at < std::ssize(target); ++at) {
        if (at == token.place || target[static_cast<size_t>(at)] != token.predicted) continue;
        int64_t same = 0;
        while (same < std::min(at, token.place) &&
               target[static_cast<size_t>(at - 1 - same)] ==
                   target[static_cast<size_t>(token.place - 1 - same)]) {
          ++same;
        }
        if (same > longest) {
          longest = same;
          where = at;
        }
      }
      if (where < 0) continue;
      token.source = "as at place " + std::to_string(where) + ", where the " +
                     std::to_string(longest) + " before are the same";
    }
  }

 private:
  static void BeginLate(Sample* sample, Random& random) {
    constexpr int64_t kGiven = 4;
    const int64_t targets = std::count(sample->target.begin(), sample->target.end(), 1);
    const int64_t most = std::min(targets / 2, targets - kGiven - 1);
    const int64_t left_out = most > 0 ? random.Integer(0, most) : 0;
    if (left_out == 0) return;
    const auto first = sample->tokens.end() - targets;
    sample->tokens.erase(first, first + left_out);
    sample->target.resize(sample->tokens.size());
    std::fill_n(sample->target.end() - (targets - left_out), kGiven, 0);
  }
};

class CopyTask final : public ReorderingTask {
  using ReorderingTask::ReorderingTask;
  std::vector<int32_t> Rule(const std::vector<int32_t>& source) const override { return source; }
};

class ReverseTask final : public ReorderingTask {
  using ReorderingTask::ReorderingTask;
  std::vector<int32_t> Rule(const std::vector<int32_t>& source) const override {
    return {source.rbegin(), source.rend()};
  }
};

class SortTask final : public RandomSymbolsTask {
  using RandomSymbolsTask::RandomSymbolsTask;
  std::vector<int32_t> Rule(const std::vector<int32_t>& source) const override {
    std::vector<int32_t> sorted = source;
    std::sort(sorted.begin(), sorted.end());
    return sorted;
  }
};

// For each token, how many times it has just been repeated, from 0. Runs last 2 to 48 tokens.
class LocalCountTask final : public SequenceTask {
 public:
  using SequenceTask::SequenceTask;
  static constexpr int64_t kLongestRun = 48;
  int64_t vocabulary() const override { return SequenceTask::vocabulary() + kLongestRun; }

 private:
  std::vector<int32_t> Source(int64_t length, Random& random) const override {
    std::vector<int32_t> source;
    int32_t symbol = -1;
    while (static_cast<int64_t>(source.size()) < length) {
      // Another symbol than that of the run before.
      const int64_t others = symbol < 0 ? options_.symbols : options_.symbols - 1;
      auto next = static_cast<int32_t>(random.Below(others));
      if (symbol >= 0 && next >= symbol) ++next;
      symbol = next;
      const int64_t run = std::min<int64_t>(random.Integer(2, kLongestRun),
                                            length - static_cast<int64_t>(source.size()));
      source.insert(source.end(), static_cast<size_t>(run), symbol);
    }
    return source;
  }
  std::vector<int32_t> Rule(const std::vector<int32_t>& source) const override {
    std::vector<int32_t> counts(source.size());
    int32_t count = 0;
    for (size_t i = 0; i < source.size(); ++i) {
      count = i > 0 && source[i] == source[i - 1] ? count + 1 : 0;
      counts[i] = blank() + 1 + count;
    }
    return counts;
  }
};

// The token `distance` places before; blanks where there is none.
class BackTask final : public RandomSymbolsTask {
  using RandomSymbolsTask::RandomSymbolsTask;
  std::vector<int32_t> Rule(const std::vector<int32_t>& source) const override {
    std::vector<int32_t> target(source.size(), blank());
    const auto distance = static_cast<size_t>(options_.distance);
    for (size_t i = distance; i < source.size(); ++i) target[i] = source[i - distance];
    return target;
  }
};

// `items` symbols at random places among blanks (as many as fit); the target is the symbols alone.
class SelectiveCopyTask final : public SequenceTask {
 public:
  using SequenceTask::SequenceTask;
  int64_t MaxTargets(int64_t length) const override { return std::min(options_.items, length); }

 private:
  std::vector<int32_t> Source(int64_t length, Random& random) const override {
    std::vector<int32_t> source(static_cast<size_t>(length), blank());
    for (const int32_t place : random.Distinct(MaxTargets(length), length)) {
      source[static_cast<size_t>(place)] = static_cast<int32_t>(random.Below(options_.symbols));
    }
    return source;
  }
  std::vector<int32_t> Rule(const std::vector<int32_t>& source) const override {
    std::vector<int32_t> target;
    for (const int32_t token : source) {
      if (token != blank()) target.push_back(token);
    }
    return target;
  }
};

// Random symbols and one `blank`; the target is the symbol after the blank. The separator plays the
// part of the second occurrence in the task of induction heads.
class InductionTask final : public SequenceTask {
 public:
  using SequenceTask::SequenceTask;
  int64_t min_length() const override { return 2; }
  int64_t MaxTargets(int64_t /*length*/) const override { return 1; }

 private:
  std::vector<int32_t> Source(int64_t length, Random& random) const override {
    std::vector<int32_t> source = SequenceTask::Source(length, random);
    source[static_cast<size_t>(random.Below(length - 1))] = blank();
    return source;
  }
  std::vector<int32_t> Rule(const std::vector<int32_t>& source) const override {
    return {*(std::find(source.begin(), source.end(), blank()) + 1)};
  }
};

}  // namespace

std::unique_ptr<Task> MakeSequenceTask(const TaskOptions& options) {
  if (options.name == "copy") return std::make_unique<CopyTask>(options);
  if (options.name == "reverse") return std::make_unique<ReverseTask>(options);
  if (options.name == "sort") return std::make_unique<SortTask>(options);
  if (options.name == "local_count") return std::make_unique<LocalCountTask>(options);
  if (options.name == "back") return std::make_unique<BackTask>(options);
  if (options.name == "selective_copy") return std::make_unique<SelectiveCopyTask>(options);
  if (options.name == "induction") return std::make_unique<InductionTask>(options);
  return nullptr;
}

}  // namespace flash_entmax::lab
