// Threads and scratch memory.
//
//   parallel_units(units, scratch_bytes, work)
//       calls work(unit, scratch) once for every unit in [0, units), on all threads of torch's pool. Threads take the
//       next free unit, so slow cores do less. What a unit computes must not depend on which thread runs it nor on
//       the number of threads: then results are bitwise equal for every thread count. Choose the cut into units by
//       the sizes of the problem alone wherever a sum runs across units. Units start in order, so a unit may wait for
//       an earlier one; work must not throw.
//   Scratch::take<T>(count)
//       the next `count` elements (uninitialised, 64-byte aligned) of the thread's part of the call's scratch memory. A
//       unit starts with the whole part free again. Asking for more than scratch_bytes in all throws.
//   scratch_bytes<T>(count)
//       what take<T>(count) uses up: sum these to get the scratch_bytes of a unit.
//   Buffer<T>(count)
//       one aligned, uninitialised array shared by all threads of an op (packed operands, partial sums).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>

#include <torch/csrc/stable/ops.h>

#include "cpu/common/work_counter.h"

namespace segattn::cpu {

inline constexpr std::size_t kAlignment = 64;

struct AlignedDelete {
  void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }
};
using AlignedMemory = std::unique_ptr<std::byte[], AlignedDelete>;

inline AlignedMemory allocate_aligned(std::size_t bytes) {
  return AlignedMemory(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kAlignment})));
}

template <class T>
constexpr std::size_t scratch_bytes(std::int64_t count) {
  return (static_cast<std::size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
}

class Scratch {
 public:
  Scratch(std::byte* memory, std::size_t bytes) : memory_(memory), size_(bytes) {}

  template <class T>
  T* take(std::int64_t count) {
    const std::size_t begin = used_;
    used_ += scratch_bytes<T>(count);
    if (used_ > size_) {
      throw std::logic_error("segattn: a work unit asked for more scratch memory than it announced");
    }
    return reinterpret_cast<T*>(memory_ + begin);
  }

  void release_all() { used_ = 0; }

 private:
  std::byte* memory_;
  std::size_t size_;
  std::size_t used_ = 0;
};

template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t count) : memory_(allocate_aligned(scratch_bytes<T>(count))) {}
  T* data() const { return reinterpret_cast<T*>(memory_.get()); }

 private:
  AlignedMemory memory_;
};

template <class Work>
void parallel_units(std::int64_t units, std::size_t scratch_bytes, const Work& work) {
  if (units <= 0) {
    return;
  }
  const std::int64_t threads =
      std::min(units, std::max<std::int64_t>(1, static_cast<std::int64_t>(torch::stable::get_num_threads())));
  // The caller takes the memory of all threads: a worker's own would come from glibc's heap of that thread, which gives
  // it back to the system after every call (16 x 16 positions, backward: 12% of the time on page faults).
  const AlignedMemory memory = allocate_aligned(static_cast<std::size_t>(threads) * scratch_bytes);
  std::atomic<std::int64_t> next{0};
  const auto run = [&](std::int64_t thread) {
    Scratch scratch(memory.get() + static_cast<std::size_t>(thread) * scratch_bytes, scratch_bytes);
    for (std::int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
      scratch.release_all();
      work(unit, scratch);
    }
    flush_work();
  };
  if (threads == 1) {
    run(0);
    return;
  }
  // One iteration a thread; torch may hand several to one thread, or run all serially inside another parallel region.
  torch::stable::parallel_for(0, threads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; ++begin) {
      run(begin);
    }
  });
}

}  // namespace segattn::cpu
