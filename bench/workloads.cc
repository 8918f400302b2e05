#include "workloads.h"

#include <charconv>
#include <cmath>
#include <string_view>

#include "random.h"

namespace flash_entmax::bench {
namespace {

constexpr int64_t kSegment = 256;       // Positions of one topic.
constexpr double kTopicNoise = 0.7;     // Standard deviation around the topic's vector.
constexpr double kTopicStrength = 6.0;  // Score of two positions of one topic, without the noise.
constexpr double kLocalMemory = 0.98;   // ρ.
constexpr double kLocalNoise = 0.3;

// The largest topic count that is not a typing error.
constexpr int64_t kMaxTopics = 1'000'000;

// One generator per tensor and head, so that no tensor depends on the size of another.
Random Stream(uint64_t seed, uint64_t tensor, uint64_t index) {
  Random mixer(seed + tensor * 0xD1B54A32D192ED03u);
  return Random(mixer.Bits() + index * 0x8CB92BA72F3D8DD7u);
}

enum Tensor : uint64_t { kQuery, kKey, kValue, kPattern, kTopics };

void FillGauss(float* data, int64_t count, double sigma, Random random) {
  for (int64_t i = 0; i < count; ++i) data[i] = static_cast<float>(sigma * random.Gauss());
}

// What the positions of one head have in common, [key_length, head_size]; empty for kGauss.
std::vector<float> MakePattern(const WorkloadSpec& spec, const WorkloadShape& shape, uint64_t seed,
                               uint64_t head) {
  const int64_t size = shape.head_size;
  if (spec.kind != WorkloadKind::kTopic && spec.kind != WorkloadKind::kLocal) return {};
  std::vector<float> pattern(static_cast<size_t>(shape.key_length * size));
  Random random = Stream(seed, kPattern, head);
  if (spec.kind == WorkloadKind::kLocal) {
    const double fresh = std::sqrt(1.0 - kLocalMemory * kLocalMemory);
    std::vector<double> state(static_cast<size_t>(size));
    for (double& x : state) x = random.Gauss();
    for (int64_t t = 0; t < shape.key_length; ++t) {
      for (int64_t c = 0; c < size; ++c) {
        double& x = state[static_cast<size_t>(c)];
        if (t > 0) x = kLocalMemory * x + fresh * random.Gauss();
        pattern[static_cast<size_t>(t * size + c)] = static_cast<float>(x);
      }
    }
    return pattern;
  }
  std::vector<double> topics(static_cast<size_t>(spec.topics * size));
  Random topic_random = Stream(seed, kTopics, head);
  const double length = std::sqrt(kTopicStrength * std::sqrt(static_cast<double>(size)));
  for (int64_t topic = 0; topic < spec.topics; ++topic) {
    double* vector = &topics[static_cast<size_t>(topic * size)];
    double square = 0.0;
    for (int64_t c = 0; c < size; ++c) {
      vector[c] = topic_random.Gauss();
      square += vector[c] * vector[c];
    }
    for (int64_t c = 0; c < size; ++c) vector[c] *= length / std::sqrt(square);
  }
  int64_t topic = 0;
  for (int64_t t = 0; t < shape.key_length; ++t) {
    if (t % kSegment == 0) topic = random.Integer(0, spec.topics - 1);
    for (int64_t c = 0; c < size; ++c) {
      pattern[static_cast<size_t>(t * size + c)] =
          static_cast<float>(topics[static_cast<size_t>(topic * size + c)]);
    }
  }
  return pattern;
}

void AddRows(const std::vector<float>& pattern, int64_t first_row, int64_t size, float* data,
             int64_t rows) {
  if (pattern.empty()) return;
  for (int64_t i = 0; i < rows * size; ++i) {
    data[i] += pattern[static_cast<size_t>(first_row * size + i)];
  }
}

}  // namespace

Expected<WorkloadSpec> ParseWorkload(const std::string& text) {
  const Status error = Status::InvalidArgument(
      "workload: got '" + text +
      "'; must be gauss(SIGMA) with SIGMA > 0, topic(COUNT) with COUNT ≥ 1, local or nape");
  WorkloadSpec spec;
  const size_t open = text.find('(');
  const std::string_view name = std::string_view(text).substr(0, open);
  if (name == "gauss") {
    spec.kind = WorkloadKind::kGauss;
  } else if (name == "topic") {
    spec.kind = WorkloadKind::kTopic;
  } else if (name == "local") {
    spec.kind = WorkloadKind::kLocal;
  } else if (name == "nape") {
    spec.kind = WorkloadKind::kNape;
  } else {
    return error;
  }
  if (open == std::string::npos) return spec;
  if (text.back() != ')') return error;
  const char* begin = text.data() + open + 1;
  const char* end = text.data() + text.size() - 1;
  std::from_chars_result parsed{};
  if (spec.kind == WorkloadKind::kGauss) {
    parsed = std::from_chars(begin, end, spec.sigma);
    if (!(spec.sigma > 0.0) || !std::isfinite(spec.sigma)) return error;
  } else if (spec.kind == WorkloadKind::kTopic) {
    parsed = std::from_chars(begin, end, spec.topics);
    if (spec.topics < 1 || spec.topics > kMaxTopics) return error;
  } else {
    return error;
  }
  if (parsed.ec != std::errc() || parsed.ptr != end) return error;
  return spec;
}

std::string NameOf(const WorkloadSpec& spec) {
  switch (spec.kind) {
    case WorkloadKind::kGauss: {
      char number[32];
      const auto end = std::to_chars(number, number + sizeof(number), spec.sigma).ptr;
      return "gauss(" + std::string(number, end) + ")";
    }
    case WorkloadKind::kTopic:
      return "topic(" + std::to_string(spec.topics) + ")";
    case WorkloadKind::kLocal:
      return "local";
    case WorkloadKind::kNape:
      return "nape";
  }
  return "";
}

Workload MakeWorkload(const WorkloadSpec& spec, const WorkloadShape& shape, uint64_t seed) {
  const int64_t query_count = shape.query_length * shape.head_size;
  const int64_t key_count = shape.key_length * shape.head_size;
  const int64_t value_count = shape.key_length * shape.value_size;
  Workload workload;
  workload.query.resize(static_cast<size_t>(shape.batch * shape.heads * query_count));
  workload.key.resize(static_cast<size_t>(shape.batch * shape.kv_heads * key_count));
  workload.value.resize(static_cast<size_t>(shape.batch * shape.kv_heads * value_count));

  double query_noise = spec.sigma;
  double key_noise = 1.0;
  if (spec.kind == WorkloadKind::kTopic) query_noise = key_noise = kTopicNoise;
  if (spec.kind == WorkloadKind::kLocal) query_noise = key_noise = kLocalNoise;

  const int64_t group = shape.heads / shape.kv_heads;
  for (int64_t kv = 0; kv < shape.batch * shape.kv_heads; ++kv) {
    const auto index = static_cast<uint64_t>(kv);
    const std::vector<float> pattern = MakePattern(spec, shape, seed, index);
    float* key = &workload.key[static_cast<size_t>(kv * key_count)];
    FillGauss(key, key_count, key_noise, Stream(seed, kKey, index));
    AddRows(pattern, 0, shape.head_size, key, shape.key_length);
    FillGauss(&workload.value[static_cast<size_t>(kv * value_count)], value_count, 1.0,
              Stream(seed, kValue, index));
    for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {
      float* query = &workload.query[static_cast<size_t>(head * query_count)];
      FillGauss(query, query_count, query_noise, Stream(seed, kQuery, static_cast<uint64_t>(head)));
      AddRows(pattern, shape.key_length - shape.query_length, shape.head_size, query,
              shape.query_length);
    }
  }
  if (spec.kind == WorkloadKind::kNape) {
    workload.alibi_slopes.resize(static_cast<size_t>(shape.heads), 0.0f);
    for (int64_t head = 0; head < shape.heads / 2; ++head) {
      workload.alibi_slopes[static_cast<size_t>(head)] = 1.0f / static_cast<float>(head + 1);
    }
  }
  return workload;
}

}  // namespace flash_entmax::bench
