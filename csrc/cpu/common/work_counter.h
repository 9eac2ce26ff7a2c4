// Counts the multiply-adds that tile_gemm and lane_product execute, padding included, and the elements that pack.h
// packs from tensors. Tests compare the counts with an op's arithmetic, which needs no clock. Each thread counts for
// itself; parallel_units adds its counts to the totals when the thread is done.
#pragma once

#include <atomic>
#include <cstdint>

namespace segattn::cpu {

struct Work {
  std::int64_t multiply_adds = 0;
  std::int64_t packed = 0;
};

inline thread_local Work thread_work;
inline std::atomic<std::int64_t> total_multiply_adds{0};
inline std::atomic<std::int64_t> total_packed{0};

inline void count_multiply_adds(std::int64_t count) {
  thread_work.multiply_adds += count;
}
inline void count_packed(std::int64_t count) {
  thread_work.packed += count;
}

inline void flush_work() {
  total_multiply_adds.fetch_add(thread_work.multiply_adds, std::memory_order_relaxed);
  total_packed.fetch_add(thread_work.packed, std::memory_order_relaxed);
  thread_work = {};
}

}  // namespace segattn::cpu
