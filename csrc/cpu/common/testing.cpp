// Plain C functions that tests/cpu call through ctypes.
#include "cpu/common/exp.h"
#include "cpu/common/work_counter.h"

#define SEGATTN_TEST_FUNCTION extern "C" __attribute__((visibility("default")))

namespace segattn::cpu {

namespace {

template <class T>
void exp_of_array(const T* source, T* target, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes<T>) {
    const std::int64_t present = count - i < kLanes<T> ? count - i : kLanes<T>;
    store_partial(target + i, exp(load_partial<Vec<T>>(source + i, present)), present);
  }
}

}  // namespace

}  // namespace segattn::cpu

// Multiply-adds of tile_gemm and lane_product since the last call.
SEGATTN_TEST_FUNCTION std::int64_t segattn_cpu_take_multiply_adds() {
  return segattn::cpu::total_multiply_adds.exchange(0, std::memory_order_relaxed);
}

// Elements packed from tensors since the last call.
SEGATTN_TEST_FUNCTION std::int64_t segattn_cpu_take_packed() {
  return segattn::cpu::total_packed.exchange(0, std::memory_order_relaxed);
}

SEGATTN_TEST_FUNCTION void segattn_cpu_exp_float(const float* source, float* target, std::int64_t count) {
  segattn::cpu::exp_of_array(source, target, count);
}

SEGATTN_TEST_FUNCTION void segattn_cpu_exp_double(const double* source, double* target, std::int64_t count) {
  segattn::cpu::exp_of_array(source, target, count);
}
