// Memory barriers (mbarrier) of the running cluster. Internal to the runtime.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "execution.h"

namespace segattn::emulator {

// Phases are numbered from 0. A phase completes when `pending` arrivals and all announced bytes have come in.
struct MemoryBarrier {
  void* address;
  const Block* block;
  uint32_t count;                 // arrivals of a phase
  uint32_t pending;               // arrivals missing in this phase
  int64_t bytes;                  // announced but not arrived; negative where copies come before the announcement
  int64_t phase;                  // the incomplete one
  bool fenced;                    // fence_barrier_init has followed the initialisation
  int initialiser;                // number of the thread
  int object;                     // in traced builds, the synchronization object (trace.h)
  Site site;                      // of the initialisation
  std::vector<uint16_t> waiting;  // numbers of threads
  std::vector<int64_t> observed;  // by number of the thread, the last phase that it waited for
  int64_t latest_observed = -1;   // by any thread
  int64_t latest_copied = -1;     // for which a bulk copy has been issued
};

// Forgets the barriers of the previous cluster.
void start_memory_barriers();
// Called when the last thread of a block leaves the kernel: fails if one of its barriers still expects bytes, or if no
// thread waited for bulk copies.
void check_memory_barriers(const Block& block);

// The barrier at this address of the block's shared memory. Fails if there is none, naming the operation.
MemoryBarrier& memory_barrier(const Block& block, const void* address, const char* operation, const Site& site);
// Its place at the same offset of another block's shared memory.
void* in_block(const void* shared, const Block& own, const Block& other);

// Bytes of a bulk copy arrive that was issued for this phase.
void complete_bytes(MemoryBarrier& barrier, int64_t phase, int64_t bytes, const Site& site);

// "the barrier at byte 64 (initialised at file.cuh:12)"
std::string describe(const MemoryBarrier& barrier);

}  // namespace segattn::emulator
