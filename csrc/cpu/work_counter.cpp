#include "work_counter.h"

// Multiply-adds since the last call. For tests, which reach it through ctypes.
extern "C" __attribute__((visibility("default"))) std::int64_t segattn_cpu_take_multiply_adds() {
  return segattn::cpu::total_multiply_adds.exchange(0, std::memory_order_relaxed);
}
