// Random numbers for tests: the same in every run unless FLASH_ENTMAX_TEST_SEED says otherwise.

#ifndef FLASH_ENTMAX_TESTS_TESTING_RANDOM_H_
#define FLASH_ENTMAX_TESTS_TESTING_RANDOM_H_

#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace flash_entmax::testing {

// The environment variable FLASH_ENTMAX_TEST_SEED, or a fixed number.
inline uint64_t TestSeed() {
  const char* text = std::getenv("FLASH_ENTMAX_TEST_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 20190719;
}

// For SCOPED_TRACE in every test that draws random numbers: how to repeat the run.
inline std::string SeedMessage() { return "FLASH_ENTMAX_TEST_SEED=" + std::to_string(TestSeed()); }

class Random {
 public:
  explicit Random(uint64_t stream = 0) {
    std::seed_seq sequence{TestSeed(), TestSeed() >> 32, stream, stream >> 32};
    engine_.seed(sequence);
  }

  uint64_t Bits() { return engine_(); }
  // Normal with mean 0 and standard deviation 1.
  double Gauss() { return std::normal_distribution<double>()(engine_); }
  // In [low, high).
  double Uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(engine_);
  }
  // In [low, high], both included.
  int64_t Integer(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }
  bool Chance(double probability) { return Uniform(0.0, 1.0) < probability; }
  template <typename T>
  const T& Pick(const std::vector<T>& choices) {
    return choices[Integer(0, static_cast<int64_t>(choices.size()) - 1)];
  }

  std::vector<double> GaussVector(size_t size, double scale = 1.0) {
    std::vector<double> values(size);
    for (double& value : values) value = scale * Gauss();
    return values;
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace flash_entmax::testing

#endif  // FLASH_ENTMAX_TESTS_TESTING_RANDOM_H_
