// What the race detector and the counters are told. Builds without SEGATTN_EMULATOR_TRACE compile all of it away.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../include/vector_types.h"

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

// Memory of the launch: who asks is the scheduler, at the start of each launch and block.
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

// "position.cuh:120 (function)" for the place of an access of that kind.
std::string describe_place(const std::string& kind, const void* place);

// All threads of the block have met.
void block_synchronized();
// `waiting` threads know from now on all that `arrived` threads did before (waiting is part of arrived).
void threads_synchronized(const uint16_t* arrived, size_t arrived_count, const uint16_t* waiting, size_t waiting_count);
void warp_synchronized(int warp, unsigned lanes);
// The lanes have met, which orders no memory accesses but lines up their instruction streams.
void warp_converged(int warp, unsigned lanes);

}  // namespace segattn::emulator::trace
