// Attention as retrieval: the next byte of a text predicted from all earlier places like this one.
//
// Position i of the text has three rows: its query and its key are both the embedding of the bytes
// before it, text[0 … i−1], and its value is the byte at it, text[i], as a one-hot row of 256.
// The query of position i may use the keys of positions j < i only: key j says "after this past …"
// and value j says "… came this byte", so key i would give the answer away. Outputs are therefore
// distributions over the next byte made of bytes that are already known.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_RETRIEVAL_H_
#define FLASH_ENTMAX_TOOLS_DEMO_RETRIEVAL_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "demo/embedding.h"
#include "flash_entmax/attention.h"
#include "flash_entmax/status.h"

namespace flash_entmax::cli {

inline constexpr int64_t kByteValues = 256;

// Below this α nearly every key is kept: lists of all of them would not fit into memory, so what
// needs the support looks at a few rows only.
inline constexpr double kDenseAlpha = 1.25;

// Positions [first, end) of the text.
struct Stretch {
  int64_t first = 0;
  int64_t end = 0;

  int64_t size() const { return end - first; }
};

// How many of the last positions of a text of `size` bytes to look at, so that they see about
// `pairs` keys in all; but not fewer than `fewest` or more than `most`.
int64_t PositionsFor(int64_t pairs, int64_t size, int64_t fewest, int64_t most);

struct RetrievalSetting {
  double alpha = 1.5;
  double scale = 1.0;              // Factor of the dot products.
  std::optional<int64_t> context;  // The last so many keys; all earlier ones if not given.
};

// One kept key of a query.
struct KeptKey {
  int64_t position = 0;
  float weight = 0.0F;
};

struct Prediction {
  Stretch positions;
  std::vector<float> distribution;  // [positions, 256]
  std::vector<double> threshold;    // [positions]
  double seconds = 0.0;             // Of the attention alone.
  // If wanted: kept keys of the n-th position are [row_offsets[n], row_offsets[n + 1]), ascending.
  std::vector<int64_t> row_offsets;
  std::vector<KeptKey> kept;

  std::span<const float> DistributionAt(int64_t position) const;
  std::span<const KeptKey> KeptAt(int64_t position) const;
};

class Retrieval {
 public:
  // `threads` as in AttentionOptions.
  Retrieval(std::string text, const EmbeddingOptions& options, int threads);

  std::string_view text() const { return text_; }
  int64_t size() const { return static_cast<int64_t>(text_.size()); }
  unsigned char ByteAt(int64_t position) const {
    return static_cast<unsigned char>(text_[static_cast<size_t>(position)]);
  }
  int64_t head_size() const { return head_size_; }
  int threads() const { return threads_; }

  // Calls `report` with the number of query-key pairs of every piece of work that is done.
  void ReportTo(std::function<void(int64_t)> report) { report_ = std::move(report); }

  // The attention that predicts text[first … end−1]; needs 0 < first < end ≤ size(). It points into
  // this object.
  AttentionProblem ProblemOf(const Stretch& positions, const RetrievalSetting& setting) const;

  // The position of that problem's first key in the text.
  static int64_t FirstKey(const Stretch& positions, const RetrievalSetting& setting);

  // How many keys the positions see, all together.
  static int64_t VisiblePairs(const Stretch& positions, const RetrievalSetting& setting);

  Expected<Prediction> Predict(const Stretch& positions, const RetrievalSetting& setting,
                               bool want_support) const;

 private:
  Status PredictPiece(const Stretch& piece, const RetrievalSetting& setting, bool want_support,
                      Prediction* prediction) const;

  std::string text_;
  int64_t head_size_ = 0;
  int threads_ = 0;
  std::vector<float> embeddings_;  // [size, head_size]: queries and keys.
  std::vector<float> values_;      // [size, 256]
  std::function<void(int64_t)> report_;
};

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_RETRIEVAL_H_
