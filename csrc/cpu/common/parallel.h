// Threads and scratch memory.
//
//   parallel_units(units, scratch_bytes, work)
//       Calls work(unit, scratch) once for every unit in [0, units), on all threads of torch's pool. Each thread takes
//       the next free unit, so slower cores do fewer. Results must be bitwise equal for every thread count: what a unit
//       computes depends neither on the thread nor on their number, and where a sum runs across units, the cut into
//       units depends on the problem's sizes alone. Units start in order, so a unit may wait for an earlier one. work
//       must not throw.
//   Scratch::take<T>(count)
//       The next `count` elements (uninitialized, 64-byte aligned) of the thread's scratch memory, all of which is free
//       again at the start of a unit. Throws beyond scratch_bytes.
//   scratch_bytes<T>(count)
//       What take<T>(count) consumes. A unit's scratch_bytes is the sum over its calls of take.
//   Buffer<T>(count)
//       An aligned, uninitialized array shared by all threads of an op (packed operands, partial sums).
//   thread_count()
//       Threads of torch's pool; 1 for small problems, and after a fork that the pool did not survive.
//   SerialIfSmall
//       While it lives, its thread takes no other threads if the problem is small: a parallel region takes 2.5 us, and
//       two threads are no faster below 10^6 multiply-adds.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <pthread.h>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/ops.h>

#include "cpu/common/math.h"
#include "cpu/common/work_counter.h"

namespace segattn::cpu {

inline constexpr std::int64_t kAlignment = 64;

struct AlignedDelete {
  void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }
};
using AlignedMemory = std::unique_ptr<std::byte[], AlignedDelete>;

// Throws std::runtime_error, with the size, where there is no memory.
inline AlignedMemory allocate_aligned(std::size_t bytes) {
  void* const memory = ::operator new(bytes, std::align_val_t{kAlignment}, std::nothrow);
  if (memory == nullptr) {
    throw std::runtime_error("segattn_ops: cannot allocate " + std::to_string(bytes) + " bytes of working memory");
  }
  return AlignedMemory(static_cast<std::byte*>(memory));
}

template <class T>
constexpr std::size_t scratch_bytes(std::int64_t count) {
  return static_cast<std::size_t>(round_up(count * static_cast<std::int64_t>(sizeof(T)), kAlignment));
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

inline thread_local bool serial = false;

class SerialIfSmall {
 public:
  explicit SerialIfSmall(std::int64_t multiply_adds) : before_(serial) {
    serial = multiply_adds < (std::int64_t{1} << 20);
  }
  ~SerialIfSmall() { serial = before_; }
  SerialIfSmall(const SerialIfSmall&) = delete;
  SerialIfSmall& operator=(const SerialIfSmall&) = delete;

 private:
  bool before_;
};

// A fork copies the calling thread alone. If that thread has used OpenMP's pool, its next parallel region waits for
// threads that do not exist in the child, so there it takes no other threads. Other threads of the child start a pool
// of their own. That torch's own parallel ops have used the pool cannot be seen here; they, too, hang in such a child.
inline thread_local bool used_pool = false;
inline thread_local bool pool_is_lost = false;
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { pool_is_lost = used_pool; });

inline std::int64_t thread_count() {
  return serial || pool_is_lost ? 1 : static_cast<std::int64_t>(torch::stable::get_num_threads());
}

template <class Work>
void parallel_units(std::int64_t units, std::size_t scratch_bytes, const Work& work) {
  if (units <= 0) {
    return;
  }
  const std::int64_t threads = std::min(units, std::max<std::int64_t>(1, thread_count()));
  // The caller allocates for all threads. Memory that a worker allocates comes from its own glibc heap, which returns
  // it to the system after every call (16 x 16 positions, backward: 12% of the time in page faults).
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
  used_pool = true;
  // One iteration per thread. torch may give several to one thread, or run all serially in a nested parallel region.
  torch::stable::parallel_for(0, threads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; ++begin) {
      run(begin);
    }
  });
}

}  // namespace segattn::cpu
