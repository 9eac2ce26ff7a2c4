// Functions with one fault each and their corrected twins, compiled like the CPU library: each tool must report the
// first and not the second (tests/tools/test_sanitizers.py). They are called through ctypes.
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/common/parallel.h"

#define SEGATTN_FAULT extern "C" __attribute__((visibility("default")))

namespace {

using namespace segattn::cpu;

// Keeps the compiler from seeing a value, so that neither it nor the fault is optimized away.
template <class T>
T hidden(T value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Lets the other threads take units.
void wait_a_moment() {
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

constexpr std::int64_t kCount = 21;  // of 4 bytes: no multiple of the alignment

}  // namespace

// A read of the element after a shared buffer. The product rounds buffers up to 64 bytes, hence 32 elements.
SEGATTN_FAULT float segattn_fault_buffer_end(bool broken) {
  const Buffer<float> buffer(32);
  float* const data = hidden(buffer.data());
  for (int i = 0; i < 32; ++i) {
    data[i] = 1;
  }
  return data[hidden<std::int64_t>(broken ? 32 : 31)];
}

// A write of the element after a unit's scratch memory, into that of the next take.
SEGATTN_FAULT float segattn_fault_scratch_end(bool broken) {
  float result = 0;
  parallel_units(1, 2 * scratch_bytes<float>(kCount), [&](std::int64_t, Scratch& scratch) {
    float* const first = hidden(scratch.take<float>(kCount));
    float* const second = hidden(scratch.take<float>(kCount));
    second[0] = 0;
    first[hidden(broken ? kCount : kCount - 1)] = 1;
    result = second[0];
  });
  return result;
}

// A result that depends on scratch memory that nothing has written.
SEGATTN_FAULT float segattn_fault_unwritten(bool broken) {
  float result = 0;
  parallel_units(1, scratch_bytes<float>(kCount), [&](std::int64_t, Scratch& scratch) {
    float* const values = hidden(scratch.take<float>(kCount));
    for (std::int64_t i = 0; i < hidden(broken ? kCount - 1 : kCount); ++i) {
      values[i] = 1;
    }
    result = 3;
    if (hidden(values)[kCount - 1] > 0.5f) {
      asm volatile("");  // a branch, which Valgrind watches, and no select
      result = 2;
    }
  });
  return result;
}

SEGATTN_FAULT float segattn_fault_signed_overflow(bool broken) {
  const std::int32_t large = hidden<std::int32_t>(broken ? 50'000 : 40'000);
  return static_cast<float>(large * large);
}

SEGATTN_FAULT float segattn_fault_float_cast(bool broken) {
  return static_cast<float>(static_cast<std::int32_t>(hidden<std::int64_t>(broken ? 1 : 0) != 0 ? 3e9f : 2e9f));
}

SEGATTN_FAULT float segattn_fault_misaligned(bool broken) {
  const Buffer<float> buffer(32);
  auto* const data = reinterpret_cast<char*>(buffer.data());
  return *reinterpret_cast<float*>(data + hidden<std::int64_t>(broken ? 2 : 4)) * 0;
}

// All units write one element.
SEGATTN_FAULT float segattn_fault_race(bool broken) {
  std::vector<float> results(64);
  float* const data = results.data();
  parallel_units(64, 64, [&](std::int64_t unit, Scratch&) {
    wait_a_moment();
    data[broken ? 0 : unit] = 1;
  });
  return results[0];
}

// A unit reads what an earlier one writes and does not wait for it.
SEGATTN_FAULT float segattn_fault_unordered_units(bool broken) {
  std::vector<float> results(64);
  float* const data = results.data();
  std::atomic<std::int64_t> done{0};
  parallel_units(64, 64, [&](std::int64_t unit, Scratch&) {
    wait_a_moment();
    if (unit > 0) {
      while (!broken && done.load(std::memory_order_acquire) < unit) {
      }
      data[unit] = data[unit - 1] + 1;
    }
    done.fetch_add(1, std::memory_order_release);
  });
  return results[0];
}
