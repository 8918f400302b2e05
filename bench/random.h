// Random numbers that are the same on every machine and with every standard library.

#ifndef FLASH_ENTMAX_BENCH_RANDOM_H_
#define FLASH_ENTMAX_BENCH_RANDOM_H_

#include <cmath>
#include <cstdint>
#include <numbers>

namespace flash_entmax::bench {

// SplitMix64 (Steele, Lea & Flood 2014): any seed is a good one, and streams are cheap.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t Bits() {
    uint64_t x = state_ += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }

  // In [0, 1), all multiples of 2^-53.
  double Uniform() { return static_cast<double>(Bits() >> 11) * 0x1p-53; }

  double Uniform(double low, double high) { return low + (high - low) * Uniform(); }

  // In [low, high], both included; the bias of the remainder is below 2^-40 for small ranges.
  int64_t Integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(Bits() % static_cast<uint64_t>(high - low + 1));
  }

  bool Chance(double probability) { return Uniform() < probability; }

  // N(0, 1), by the method of Box and Muller.
  double Gauss() {
    if (has_spare_) {
      has_spare_ = false;
      return spare_;
    }
    const double radius = std::sqrt(-2.0 * std::log(1.0 - Uniform()));
    const double angle = 2.0 * std::numbers::pi * Uniform();
    spare_ = radius * std::sin(angle);
    has_spare_ = true;
    return radius * std::cos(angle);
  }

 private:
  uint64_t state_;
  double spare_ = 0.0;
  bool has_spare_ = false;
};

}  // namespace flash_entmax::bench

#endif  // FLASH_ENTMAX_BENCH_RANDOM_H_
