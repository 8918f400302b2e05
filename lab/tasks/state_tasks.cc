// Tasks that keep a state over the sequence: flip_flop, parity, counting.

#include <algorithm>

#include "tasks/task.h"

namespace flash_entmax::lab {
namespace {

// Pairs of an instruction (write, ignore, read) and a bit; a read's bit is the last written one,
// and every such bit is a target (Liu, Ash, Goel, Krishnamurthy & Zhang 2023, flip-flop language).
// The first instruction writes, the last reads. Tokens: symbols 0 … S−1, write, ignore, read; there
// is no begin and no separator. `length` counts tokens.
class FlipFlopTask final : public Task {
 public:
  explicit FlipFlopTask(const TaskOptions& options) : options_(options) {}
  int64_t vocabulary() const override { return options_.symbols + 3; }
  int64_t min_length() const override { return 4; }
  int64_t MaxTokens(int64_t length) const override { return length / 2 * 2; }
  int64_t MaxTargets(int64_t length) const override { return length / 2 - 1; }

  Sample Generate(int64_t length, Random& random) const override {
    Sample sample;
    const int64_t pairs = length / 2;
    int32_t written = 0;
    for (int64_t i = 0; i < pairs; ++i) {
      const double draw = random.Uniform();
      int32_t instruction = ignore();
      if (i == 0 || (i + 1 < pairs && draw < options_.write)) {
        instruction = write();
      } else if (i + 1 == pairs || draw < options_.write + options_.read) {
        instruction = read();
      }
      auto bit = static_cast<int32_t>(random.Below(options_.symbols));
      if (instruction == write()) written = bit;
      if (instruction == read()) bit = written;
      sample.tokens.push_back(instruction);
      sample.tokens.push_back(bit);
      sample.target.push_back(0);
      sample.target.push_back(instruction == read() ? 1 : 0);
    }
    return sample;
  }

  void Solve(Sample& sample) const override {
    int32_t written = 0;
    for (size_t i = 0; i + 1 < sample.tokens.size(); i += 2) {
      if (sample.tokens[i] == write()) written = sample.tokens[i + 1];
      if (sample.tokens[i] == read()) sample.tokens[i + 1] = written;
    }
  }

 private:
  int32_t write() const { return static_cast<int32_t>(options_.symbols); }
  int32_t ignore() const { return write() + 1; }
  int32_t read() const { return write() + 2; }
  const TaskOptions options_;
};

// Bits, a separator, and how many ones there were modulo `modulus`; parity asks instead whether the
// number is even (1) or odd (0). Tokens: 0, 1, begin, separator, then the residues of counting.
class CountingTask final : public Task {
 public:
  CountingTask(int64_t modulus, bool parity) : modulus_(modulus), parity_(parity) {}
  int64_t vocabulary() const override { return parity_ ? 4 : 4 + modulus_; }
  int64_t MaxTokens(int64_t length) const override { return length + 3; }
  int64_t MaxTargets(int64_t /*length*/) const override { return 1; }

  Sample Generate(int64_t length, Random& random) const override {
    Sample sample;
    sample.tokens.push_back(2);
    for (int64_t i = 0; i < length; ++i) {
      sample.tokens.push_back(static_cast<int32_t>(random.Below(2)));
    }
    sample.tokens.push_back(3);
    sample.tokens.push_back(0);
    sample.target.assign(sample.tokens.size(), 0);
    sample.target.back() = 1;
    Solve(sample);
    return sample;
  }

  void Solve(Sample& sample) const override {
    const int64_t ones = std::count(sample.tokens.begin(), sample.tokens.end() - 1, 1);
    sample.tokens.back() =
        static_cast<int32_t>(parity_ ? (ones % 2 == 0 ? 1 : 0) : 4 + ones % modulus_);
  }

 private:
  const int64_t modulus_;
  const bool parity_;
};

}  // namespace

std::unique_ptr<Task> MakeStateTask(const TaskOptions& options) {
  if (options.name == "flip_flop") return std::make_unique<FlipFlopTask>(options);
  if (options.name == "parity") return std::make_unique<CountingTask>(2, true);
  if (options.name == "counting") return std::make_unique<CountingTask>(options.modulus, false);
  return nullptr;
}

}  // namespace flash_entmax::lab
