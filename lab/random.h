// Random numbers that are the same on every machine and with every compiler: xoshiro256** (Blackman
// & Vigna 2018), started by SplitMix64. A stream is named by a seed and up to two numbers, so that
// sample 17 of seed 3 can be made without making samples 0 to 16 first.

#ifndef FLASH_ENTMAX_LAB_RANDOM_H_
#define FLASH_ENTMAX_LAB_RANDOM_H_

#include <array>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace flash_entmax::lab {

class Random {
 public:
  explicit Random(uint64_t seed, uint64_t stream = 0, uint64_t substream = 0) {
    uint64_t state = seed;
    state = Mix(state) ^ (stream * 0x9E3779B97F4A7C15u);
    state = Mix(state) ^ (substream * 0xD1B54A32D192ED03u);
    for (uint64_t& word : state_) {
      state += 0x9E3779B97F4A7C15u;
      word = Mix(state);
    }
  }

  uint64_t Bits() {
    const uint64_t result = Rotate(state_[1] * 5, 7) * 9;
    const uint64_t shifted = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= shifted;
    state_[3] = Rotate(state_[3], 45);
    return result;
  }

  // In [0, limit). The bias of the multiplication is below limit/2^64.
  int64_t Below(int64_t limit) {
    return static_cast<int64_t>(
        (static_cast<unsigned __int128>(Bits()) * static_cast<unsigned __int128>(limit)) >> 64);
  }
  // In [low, high], both included.
  int64_t Integer(int64_t low, int64_t high) { return low + Below(high - low + 1); }
  // In [0, 1).
  double Uniform() { return static_cast<double>(Bits() >> 11) * 0x1p-53; }
  bool Chance(double probability) { return Uniform() < probability; }
  // Normal with mean 0 and standard deviation 1 (Box & Muller 1958).
  double Gauss() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - Uniform()));
    return radius * std::cos(6.283185307179586 * Uniform());
  }

  // `count` different numbers of [0, limit), in random order; count ≤ limit.
  std::vector<int32_t> Distinct(int64_t count, int64_t limit) {
    std::vector<int32_t> chosen;
    chosen.reserve(static_cast<size_t>(count));
    if (count * count < 4 * limit) {
      // Few: draw again what has been drawn before.
      while (static_cast<int64_t>(chosen.size()) < count) {
        const auto candidate = static_cast<int32_t>(Below(limit));
        bool seen = false;
        for (const int32_t other : chosen) seen |= other == candidate;
        if (!seen) chosen.push_back(candidate);
      }
      return chosen;
    }
    std::vector<int32_t> all(static_cast<size_t>(limit));
    for (int64_t i = 0; i < limit; ++i) all[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    for (int64_t i = 0; i < count; ++i) {
      std::swap(all[static_cast<size_t>(i)], all[static_cast<size_t>(Integer(i, limit - 1))]);
      chosen.push_back(all[static_cast<size_t>(i)]);
    }
    return chosen;
  }

 private:
  static uint64_t Rotate(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }
  static uint64_t Mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }

  std::array<uint64_t, 4> state_{};
};

}  // namespace flash_entmax::lab

#endif  // FLASH_ENTMAX_LAB_RANDOM_H_
