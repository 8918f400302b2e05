#include "demo/passages.h"

#include <algorithm>
#include <cctype>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <span>
#include <utility>

namespace flash_entmax::cli {
namespace {

constexpr int64_t kBytesBefore = 40;
constexpr int64_t kBytesAfter = 16;

Excerpt ExcerptAt(const Retrieval& retrieval, int64_t position) {
  const auto at = static_cast<size_t>(position);
  const auto first = static_cast<size_t>(std::max<int64_t>(0, position - kBytesBefore));
  Excerpt excerpt;
  excerpt.position = position;
  excerpt.before = retrieval.text().substr(first, at - first);
  excerpt.byte = retrieval.ByteAt(position);
  excerpt.after = retrieval.text().substr(at + 1, static_cast<size_t>(kBytesAfter));
  return excerpt;
}

// What decides whether a position is worth showing.
struct Candidate {
  int64_t position = 0;
  int64_t kept = 0;
  double distance = 0.0;     // Of the kept keys, weighted by their weights.
  double probability = 0.0;  // Of the byte that came.
  double likeliest = 0.0;    // Of the byte that was given the most.
  bool right = false;
};

Candidate CandidateAt(const Retrieval& retrieval, const Prediction& prediction, int64_t position) {
  const std::span<const float> distribution = prediction.DistributionAt(position);
  const std::span<const KeptKey> kept = prediction.KeptAt(position);
  const auto top = std::max_element(distribution.begin(), distribution.end());
  const unsigned char byte = retrieval.ByteAt(position);
  Candidate candidate;
  candidate.position = position;
  candidate.kept = static_cast<int64_t>(kept.size());
  for (const KeptKey& key : kept) {
    candidate.distance +=
        static_cast<double>(key.weight) * static_cast<double>(position - key.position);
  }
  candidate.probability = static_cast<double>(distribution[byte]);
  candidate.likeliest = static_cast<double>(*top);
  candidate.right = top - distribution.begin() == byte;
  return candidate;
}

bool IsWordByte(unsigned char byte) { return std::isalnum(byte) != 0 || byte == '_'; }

// A kind of position to show: `worth` is 0 where it does not fit, and larger is better.
struct Kind {
  std::string reason;
  int count = 1;
  std::function<double(const Candidate&)> worth;
};

std::vector<Kind> Kinds() {
  return {
      {"right, from far back", 2,
       [](const Candidate& c) {
         const bool fits = c.right && c.probability >= 0.9 && c.kept >= 2 && c.kept <= 12;
         return fits ? c.distance : 0.0;
       }},
      {"right, between several continuations", 1,
       [](const Candidate& c) {
         const bool fits =
             c.right && c.probability > 0.35 && c.probability < 0.75 && c.kept >= 3 && c.kept <= 12;
         return fits ? c.distance : 0.0;
       }},
      {"wrong, and sure of it", 1,
       [](const Candidate& c) {
         const bool fits = !c.right && c.likeliest >= 0.9 && c.kept >= 2 && c.kept <= 12;
         return fits ? c.distance : 0.0;
       }},
  };
}

// The positions of the largest worth, apart from each other and from those taken already.
std::vector<int64_t> Best(const std::vector<Candidate>& candidates, const Kind& kind, int64_t apart,
                          const std::vector<int64_t>& taken) {
  std::vector<std::pair<double, int64_t>> ranked;
  for (const Candidate& candidate : candidates) {
    const double worth = kind.worth(candidate);
    if (worth > 0.0) ranked.emplace_back(-worth, candidate.position);
  }
  std::sort(ranked.begin(), ranked.end());
  std::vector<int64_t> best;
  for (const auto& entry : ranked) {
    const int64_t position = entry.second;
    const auto is_near = [&](int64_t other) { return std::abs(other - position) < apart; };
    if (std::any_of(taken.begin(), taken.end(), is_near) ||
        std::any_of(best.begin(), best.end(), is_near)) {
      continue;
    }
    best.push_back(position);
    if (static_cast<int>(best.size()) == kind.count) break;
  }
  return best;
}

void AddPassages(const Retrieval& retrieval, std::span<const KeptKey> kept,
                 ChosenPosition* chosen) {
  std::vector<KeptKey> order(kept.begin(), kept.end());
  std::stable_sort(order.begin(), order.end(),
                   [](const KeptKey& a, const KeptKey& b) { return a.weight > b.weight; });
  for (size_t n = 0; n < order.size(); ++n) {
    const auto weight = static_cast<double>(order[n].weight);
    if (n >= kShownPassages) {
      chosen->rest_weight += weight;
      continue;
    }
    chosen->passages.push_back({weight, chosen->excerpt.position - order[n].position,
                                ExcerptAt(retrieval, order[n].position)});
  }
}

Expected<ChosenPosition> Describe(const Retrieval& retrieval,
                                  const std::vector<Evaluation>& evaluations, size_t shown,
                                  int64_t position, const std::string& reason) {
  ChosenPosition chosen;
  chosen.reason = reason;
  chosen.excerpt = ExcerptAt(retrieval, position);
  chosen.visible = position;
  for (size_t a = 0; a < evaluations.size(); ++a) {
    const Expected<Prediction> prediction = retrieval.Predict(
        {position, position + 1}, evaluations[a].setting(), /*want_support=*/true);
    if (!prediction.ok()) return prediction.status();
    const std::span<const KeptKey> kept = prediction->KeptAt(position);
    const float probability = prediction->DistributionAt(position)[chosen.excerpt.byte];
    chosen.views.push_back({evaluations[a].alpha, static_cast<int64_t>(kept.size()),
                            KeysForShare(kept, 0.99), static_cast<double>(probability)});
    if (a == shown) AddPassages(retrieval, kept, &chosen);
  }
  return chosen;
}

}  // namespace

int64_t ShownEvaluation(const std::vector<Evaluation>& evaluations) {
  int64_t shown = -1;
  for (size_t a = 0; a < evaluations.size(); ++a) {
    if (evaluations[a].alpha < kDenseAlpha) continue;
    if (shown < 0 || evaluations[a].alpha < evaluations[static_cast<size_t>(shown)].alpha) {
      shown = static_cast<int64_t>(a);
    }
  }
  return shown;
}

Expected<std::vector<ChosenPosition>> ChoosePassages(const Retrieval& retrieval,
                                                     const std::vector<Evaluation>& evaluations,
                                                     const std::vector<Prediction>& predictions) {
  std::vector<ChosenPosition> result;
  const int64_t shown = ShownEvaluation(evaluations);
  if (shown < 0) return result;
  const auto index = static_cast<size_t>(shown);
  const Stretch& scored = predictions[index].positions;
  std::vector<Candidate> candidates;
  for (int64_t i = scored.first; i < scored.end; ++i) {
    // Letters and digits: runs of blanks and rules are easy and dull.
    if (!IsWordByte(retrieval.ByteAt(i))) continue;
    candidates.push_back(CandidateAt(retrieval, predictions[index], i));
  }
  std::vector<int64_t> taken;
  for (const Kind& kind : Kinds()) {
    for (const int64_t position : Best(candidates, kind, scored.size() / 16, taken)) {
      taken.push_back(position);
      Expected<ChosenPosition> chosen =
          Describe(retrieval, evaluations, index, position, kind.reason);
      if (!chosen.ok()) return chosen.status();
      result.push_back(std::move(chosen).value());
    }
  }
  return result;
}

}  // namespace flash_entmax::cli
