// The runtime's memory barriers, bulk copies, barriers of some warps, register budgets and clusters, behind
// "emulated_ptx_sm90.h".
#pragma once

#include <cstdint>

#include "cuda.h"
#include "emulator.h"

namespace segattn::emulator {

// runtime/mbarrier.cpp
void mbarrier_init(void* barrier, uint32_t count, Site site);
void fence_barrier_init();
void mbarrier_arrive(void* barrier, uint32_t expected_bytes, const char* operation, Site site);
void mbarrier_arrive_at(void* barrier, uint32_t rank, Site site);
void mbarrier_wait(void* barrier, uint32_t parity, Site site);

// runtime/bulk_copy.cpp
void prefetch_tensor_map(const CUtensorMap* map, Site site);
// `blocks`: a bit for each block of the cluster; 0: the block of the calling thread.
void copy_box(
    void* shared, const CUtensorMap* map, int x, int y, int z, void* barrier, unsigned blocks, const char* operation,
    Site site);

// runtime/group_barriers.cpp
void named_barrier(int id, int threads, bool waits, Site site);
uint32_t cluster_rank();
void cluster_sync(Site site);

// runtime/register_budget.cpp
void change_registers(int registers, bool increases, Site site);

}  // namespace segattn::emulator
