// The shared table of attention workloads that every benchmark uses.
//
//   gauss(σ)  k ~ N(0, 1), q ~ σ·N(0, 1): scores of standard deviation σ
//   topic(C)  segments of 256 positions; each has one of C topics, a random unit vector per head
//             times √(6·√d); q and k are that vector plus 0.7·N(0, 1) each
//   local     b_t = ρ·b_{t−1} + √(1−ρ²)·N(0, 1) per channel, ρ = 0.98; q and k are b plus
//             0.3·N(0, 1) each
//   nape      gauss(1) with ALiBi slopes 1, 1/2, …, 1/(H/2) on the first half of the heads
//
// d is the head size and the scale is 1/√d. Values are N(0, 1).

#ifndef FLASH_ENTMAX_BENCH_WORKLOADS_H_
#define FLASH_ENTMAX_BENCH_WORKLOADS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "flash_entmax/status.h"

namespace flash_entmax::bench {

enum class WorkloadKind { kGauss, kTopic, kLocal, kNape };

struct WorkloadSpec {
  WorkloadKind kind = WorkloadKind::kGauss;
  double sigma = 1.0;   // kGauss and kNape.
  int64_t topics = 16;  // kTopic.
};

struct WorkloadShape {
  int64_t batch = 1;
  int64_t heads = 1;
  int64_t kv_heads = 1;  // A divisor of heads.
  int64_t query_length = 0;
  int64_t key_length = 0;  // The queries belong to the last positions of the keys.
  int64_t head_size = 64;
  int64_t value_size = 64;
};

// Row-major tensors.
struct Workload {
  std::vector<float> query;         // [batch, heads, query_length, head_size]
  std::vector<float> key;           // [batch, kv_heads, key_length, head_size]
  std::vector<float> value;         // [batch, kv_heads, key_length, value_size]
  std::vector<float> alibi_slopes;  // [heads], or empty.
};

// "gauss(0.5)", "topic(16)", "local", "nape"; "gauss" and "topic" alone mean gauss(1), topic(16).
Expected<WorkloadSpec> ParseWorkload(const std::string& text);
std::string NameOf(const WorkloadSpec& spec);

// The same numbers for the same arguments, always. The heads of a group share what their key head
// has, so that topics and local patterns meet.
Workload MakeWorkload(const WorkloadSpec& spec, const WorkloadShape& shape, uint64_t seed);

}  // namespace flash_entmax::bench

#endif  // FLASH_ENTMAX_BENCH_WORKLOADS_H_
