// Queries and keys without training: every position of a text is embedded by the bytes before it.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_EMBEDDING_H_
#define FLASH_ENTMAX_TOOLS_DEMO_EMBEDDING_H_

#include <cstdint>
#include <string_view>
#include <vector>

namespace flash_entmax::cli {

// One kind of n-gram: the `length` bytes before a position. Two positions that agree in them gain
// about `weight` (as a share of the sum of all weights) in the dot product of their embeddings.
struct NgramKind {
  int length = 1;
  double weight = 1.0;
};

struct EmbeddingOptions {
  int head_size = 128;           // A multiple of 64.
  std::vector<NgramKind> kinds;  // Ascending lengths.
  uint64_t seed = 1;             // Of the hashes.
};

// The measured choice; embedding.cc says what was compared.
EmbeddingOptions DefaultEmbedding(uint64_t seed);

// Embeddings of all positions, [text.size(), head_size], row-major. Row i is
//     Σ_n √weight_n · sign_n(text[i−n … i−1]) / √head_size, divided by its length,
// with sign_n(…) a vector of ±1 that a hash of the n bytes chooses, different for each n. It
// depends on text[0 … i−1] and on nothing else. An n-gram that would begin before the text is left
// out; row 0 has none and is zero.
std::vector<float> EmbedText(std::string_view text, const EmbeddingOptions& options, int threads);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_EMBEDDING_H_
