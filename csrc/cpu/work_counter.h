// Counts the multiply-adds that tile_gemm really does, padding included, so that a test can hold the work of an op
// against its arithmetic without a clock. A thread counts for itself; parallel_units adds up when the thread is done.
#pragma once

#include <atomic>
#include <cstdint>

namespace segattn::cpu {

inline thread_local std::int64_t thread_multiply_adds = 0;
inline std::atomic<std::int64_t> total_multiply_adds{0};

inline void count_multiply_adds(std::int64_t count) { thread_multiply_adds += count; }

inline void flush_multiply_adds() {
  total_multiply_adds.fetch_add(thread_multiply_adds, std::memory_order_relaxed);
  thread_multiply_adds = 0;
}

}  // namespace segattn::cpu
