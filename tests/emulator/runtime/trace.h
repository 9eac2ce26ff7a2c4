// What the race detector and the counters are told. Builds without SEGATTN_EMULATOR_TRACE compile all of it away.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace segattn::emulator {

struct LaunchRequest;
struct LaunchCounters;

#if defined(SEGATTN_EMULATOR_TRACE)
constexpr bool kTrace = true;
#else
constexpr bool kTrace = false;
#endif

}  // namespace segattn::emulator

namespace segattn::emulator::trace {

enum class Access : uint8_t { kRead, kWrite, kMatrixRead, kMatrixWrite, kAsyncRead, kAsyncWrite };

// The launch's memory.
struct Memory {
  const char* dynamic_shared = nullptr;
  size_t dynamic_bytes = 0;
  const char* static_shared = nullptr;
  size_t static_bytes = 0;
  const char* arguments = nullptr;
  size_t argument_bytes = 0;
  const void* kernel = nullptr;
};

void launch_started(const Memory& memory);
void block_started(int threads);
void block_finished();
// Throws std::runtime_error when races were found.
void launch_finished(LaunchCounters& counters);

// An access of the running thread, from the instruction at `place` (a return address, or a call's Site).
void access(Access kind, const void* address, size_t bytes, const void* place);

// The data of an asynchronous copy arrive: a write that is not counted again.
void landed(const void* address, size_t bytes, const void* place);

// Off: only counters, which need no shadow of all global memory.
void set_race_checks(bool on);

// All threads of the block have met.
void block_synchronized();
// Named barriers: a thread has come; all have, and those that wait go on.
void barrier_arrived(int barrier, int thread);
void barrier_released(int barrier, const std::vector<uint16_t>& waiting);
void warp_synchronized(int warp, unsigned lanes);
// The lanes have met, which orders no memory accesses but lines up their instruction streams.
void warp_converged(int warp, unsigned lanes);

}  // namespace segattn::emulator::trace
