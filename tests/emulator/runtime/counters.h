// Counters of a launch. Traced builds alone fill in those of memory.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "../include/vector_types.h"

namespace segattn::emulator {

// Warp instructions of one kind at one source location.
struct InstructionCounters {
  int64_t instructions = 0;
  int64_t bytes = 0;             // requested by all lanes together
  int64_t sectors = 0;           // global: 32-byte sectors touched
  int64_t wavefronts = 0;        // shared: passes needed
  int64_t ideal_wavefronts = 0;  // shared: passes without bank conflicts

  void add(const InstructionCounters& other) {
    instructions += other.instructions;
    bytes += other.bytes;
    sectors += other.sectors;
    wavefronts += other.wavefronts;
    ideal_wavefronts += other.ideal_wavefronts;
  }
};

struct LaunchCounters {
  std::string kernel;
  dim3 grid_size;
  dim3 block_size;
  int cluster_size = 1;
  std::string arguments;  // the bytes of the kernel's parameter; only those of the first are where a GPU has them
  size_t dynamic_shared_bytes = 0;
  size_t static_shared_bytes = 0;  // of all kernels of the library together
  int architecture = 0;
  int64_t stream = 0;  // 0: the default stream
  double seconds = 0;
  int64_t block_barriers = 0;
  int64_t warp_barriers = 0;
  int64_t shuffles = 0;
  int64_t fma_operations = 0;        // through __fmaf_rn and __fma_rn only
  int64_t mma_instructions[3] = {};  // by MmaType
  int64_t wgmma_operations[2] = {};  // multiply-adds, by MmaType
  int64_t wgmma_a_bytes = 0;         // of shared memory; b's bytes count once for the four warps
  int64_t wgmma_b_bytes = 0;
  int64_t async_copies = 0;
  int64_t bulk_copy_bytes = 0;       // read from global memory, once for all blocks that a copy addresses
  int64_t bulk_delivered_bytes = 0;  // written to shared memory, zeros included
  int64_t mbarrier_waits = 0;        // by threads
  std::map<std::string, InstructionCounters> memory;  // "global_read", "shared_write", "shared_matrix_read", ...
  // By kind and source location: "global_read" and the return address or Site of the access.
  std::map<std::pair<std::string, const void*>, InstructionCounters> locations;
};

// Of the running launch.
extern LaunchCounters counters;

void remember(LaunchCounters finished);
std::vector<LaunchCounters> finished_launches();
void forget_launches();

}  // namespace segattn::emulator
