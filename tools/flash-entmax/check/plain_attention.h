// Attention as one would write it without a second thought, in the precision of the inputs: the
// yardstick for the library's promise that its error is at most twice that of such a computation.

#ifndef FLASH_ENTMAX_TOOLS_CHECK_PLAIN_ATTENTION_H_
#define FLASH_ENTMAX_TOOLS_CHECK_PLAIN_ATTENTION_H_

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace flash_entmax::cli {

// One query row and the keys it sees.
template <typename T>
struct PlainRow {
  std::vector<T> query;               // (head_size)
  std::vector<std::vector<T>> key;    // (keys, head_size)
  std::vector<std::vector<T>> value;  // (keys, value_size)
  std::vector<T> bias;                // (keys), ALiBi included
  T scale = 1;                        // Query scaling included.
  T softcap = 0;
  T alpha = T(1.5);
};

// scores (n) → probabilities: softmax in the textbook way, other α by bisection until the interval
// holds no further number, then division by the sum.
template <typename T>
std::vector<T> PlainMapping(std::vector<T> scores, T alpha) {
  T largest = -std::numeric_limits<T>::infinity();
  for (const T s : scores) largest = std::max(largest, s);
  std::vector<T>& p = scores;  // In place.
  if (alpha == T(1)) {
    for (T& x : p) x = std::exp(x - largest);
  } else {
    const T m = alpha - T(1);
    const auto power = [m](T x) { return x > T(0) ? std::pow(x, T(1) / m) : T(0); };
    // The threshold minus m times the largest score; below α = 1 the sum rises with it.
    T low = m > T(0) ? -T(1) : -std::pow(static_cast<T>(scores.size()), -m);
    T high = m > T(0) ? T(0) : -T(1);
    while (true) {
      const T middle = (low + high) / T(2);
      if (!(low < middle && middle < high)) break;
      T sum = 0;
      for (const T s : scores) sum += power(m * (s - largest) - middle);
      ((sum >= T(1)) == (m > T(0)) ? low : high) = middle;
    }
    for (T& x : p) x = power(m * (x - largest) - low);
  }
  T sum = 0;
  for (const T x : p) sum += x;
  for (T& x : p) x /= sum;
  return p;
}

// Returns the output row (value_size), zeros if there is no key.
template <typename T>
std::vector<T> PlainAttention(const PlainRow<T>& row, size_t value_size) {
  std::vector<T> scores;
  for (size_t j = 0; j < row.key.size(); ++j) {
    T dot = 0;
    for (size_t c = 0; c < row.query.size(); ++c) dot += row.query[c] * row.key[j][c];
    T score = row.scale * dot;
    if (row.softcap > T(0)) score = row.softcap * std::tanh(score / row.softcap);
    scores.push_back(score + row.bias[j]);
  }
  std::vector<T> output(value_size, T(0));
  if (scores.empty()) return output;
  const std::vector<T> p = PlainMapping(scores, row.alpha);
  for (size_t j = 0; j < p.size(); ++j) {
    for (size_t c = 0; c < value_size; ++c) output[c] += p[j] * row.value[j][c];
  }
  return output;
}

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_CHECK_PLAIN_ATTENTION_H_
