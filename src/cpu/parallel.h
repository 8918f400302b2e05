// The one place that knows how loops are spread over threads.

#ifndef FLASH_ENTMAX_SRC_CPU_PARALLEL_H_
#define FLASH_ENTMAX_SRC_CPU_PARALLEL_H_

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace flash_entmax::cpu {

// Threads for a request where 0 means the default.
inline int ThreadCount(int requested) { return requested > 0 ? requested : omp_get_max_threads(); }

// Calls body(first, last, thread) for pieces of [0, count) of at most `grain` items, each on some
// thread numbered from 0, handed out in ascending order as threads become free. `body` must not
// throw, and what it computes for an item must not depend on the thread or on the piece.
template <typename Body>
void ParallelFor(int64_t count, int64_t grain, int num_threads, const Body& body) {
  const int64_t pieces = (count + grain - 1) / grain;
  const int threads = static_cast<int>(std::min<int64_t>(ThreadCount(num_threads), pieces));
  if (threads <= 1) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      body(piece * grain, std::min(count, (piece + 1) * grain), 0);
    }
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    body(piece * grain, std::min(count, (piece + 1) * grain), omp_get_thread_num());
  }
}

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_PARALLEL_H_
