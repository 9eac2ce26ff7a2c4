// Events for the checks of memory and the counters. Builds without SEGATTN_EMULATOR_TRACE compile all of it away.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace segattn::emulator {

struct Block;
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

// Memory of a launch. The dynamic shared memory of a cluster's blocks is dynamic_stride bytes apart.
struct Memory {
  const char* dynamic_shared = nullptr;
  size_t dynamic_bytes = 0;  // of a block
  size_t dynamic_stride = 0;
  int blocks = 1;  // of a cluster
  const char* static_shared = nullptr;
  size_t static_bytes = 0;
  const char* arguments = nullptr;
  size_t argument_bytes = 0;
  const void* kernel = nullptr;
};

void launch_started(const Memory& memory);
// `threads`: their numbers are below.
void block_started(int threads);
void block_finished();
// Races and reads of empty shared memory that were found so far, a line each.
std::string reports();
// Throws std::runtime_error when there are any.
void launch_finished(LaunchCounters& counters);

// An access of the running thread by the instruction at `location` (a return address, or a call's Site).
void access(Access kind, const void* address, size_t bytes, const void* location);

// The data of an asynchronous copy arrive: a write for the checks, not counted again.
void landed(const void* address, size_t bytes, const void* location);

// Synchronization objects of the running cluster, in addition to barriers of a block and of a warp: what threads did
// before they released one is ordered before what a thread does after acquiring it, if it has completed in between.
// Threads are given by their numbers. `unit` names the asynchronous unit that accesses memory on behalf of the object.
int add_object(const char* unit = nullptr);
void made(int object, const void* location);
void used(int object, const void* location);
void release(int object, int thread);
void complete(int object);
void acquire(int object, int thread);

// A bulk copy, which completes `object`, fills shared memory between the two. The running thread issues it.
void bulk_issued(const void* shared, size_t bytes, int object, const void* location);
void bulk_landed(const void* shared, size_t bytes);
// It reads global memory.
void bulk_read(const void* global, size_t bytes, int object, const void* location);

// The running thread's warp starts a product of a warpgroup that reads this shared memory, 16-byte granularity, until
// it has finished. `object`: one of each warp. Both this and bulk_issued fail if the access conflicts with another one
// (async_accesses.h).
void product_started(const void* shared, size_t bytes, int object, const void* location);
void product_finished(const void* shared, size_t bytes);
// A group of the products ends, and its number is returned; then a thread of the warp has waited for it.
uint16_t group_ended(int object);
void group_waited(int object, int thread, uint16_t group);

// The running thread executes fence.proxy.async.
void fenced_proxy();

// Registers of a product of a warpgroup (register_accesses.h), by thread number. registers_started fails if the product
// may not use them.
void registers_started(bool written, const void* registers, size_t bytes, int thread, const void* location, bool again);
void registers_finished(const void* registers, size_t bytes);
void registers_fenced(int thread);

// All threads of the block have met.
void block_synchronized(const Block& block);
void warp_synchronized(int warp, unsigned lanes);
// The lanes have met without ordering memory accesses: their next accesses start new warp instructions.
void warp_converged(int warp, unsigned lanes);

}  // namespace segattn::emulator::trace
