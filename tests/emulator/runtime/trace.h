// Events for the checks of memory and the counters. Builds without SEGATTN_EMULATOR_TRACE compile all of it away.
#pragma once

#include <cstddef>
#include <cstdint>

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

enum class Access : uint8_t { kRead, kWrite, kMatrixRead, kAsyncRead, kAsyncWrite };

// Memory of a launch.
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
// Throws std::runtime_error when races or reads of empty shared memory were found.
void launch_finished(LaunchCounters& counters);

// An access of the running thread by the instruction at `location` (a return address, or a call's Site).
void access(Access kind, const void* address, size_t bytes, const void* location);

// The data of an asynchronous copy arrive: a write for the checks, not counted again.
void landed(const void* address, size_t bytes, const void* location);

// All threads of the block have met.
void block_synchronized();
void warp_synchronized(int warp, unsigned lanes);
// The lanes have met without ordering memory accesses: their next accesses start new warp instructions.
void warp_converged(int warp, unsigned lanes);

}  // namespace segattn::emulator::trace
