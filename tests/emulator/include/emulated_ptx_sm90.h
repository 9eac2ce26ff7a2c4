// The emulated twin of csrc/cuda/common/ptx_sm90.cuh: memory barriers, bulk tensor copies, barriers of some warps,
// register budgets and clusters; those of matrix products are in emulated_wgmma.h.
#pragma once

#include <cstdint>

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulated_ptx.h"
#include "emulated_wgmma.h"
#include "emulator_sm90.h"

namespace segattn::cuda::ptx {

inline void mbarrier_init(uint64_t* barrier, uint32_t count, Site site = Site::current()) {
  emulator::mbarrier_init(barrier, count, site);
}
inline void fence_barrier_init() {
  emulator::fence_barrier_init();
}
inline void mbarrier_arrive(uint64_t* barrier, Site site = Site::current()) {
  emulator::mbarrier_arrive(barrier, 0, "mbarrier.arrive", site);
}
inline void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank, Site site = Site::current()) {
  emulator::mbarrier_arrive_at(barrier, rank, site);
}
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes, Site site = Site::current()) {
  emulator::mbarrier_arrive(barrier, bytes, "mbarrier.arrive.expect_tx", site);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site = Site::current()) {
  emulator::mbarrier_wait(barrier, parity, site);
}

inline void prefetch_tensor_map(const CUtensorMap* map, Site site = Site::current()) {
  emulator::prefetch_tensor_map(map, site);
}
inline void copy_box(
    void* shared, const CUtensorMap* map, int x, int y, int z, uint64_t* barrier, Site site = Site::current()) {
  emulator::copy_box(shared, map, x, y, z, barrier, 0, "cp.async.bulk.tensor", site);
}
inline void copy_box_multicast(
    void* shared, const CUtensorMap* map, int x, int y, int z, uint64_t* barrier, uint16_t blocks,
    Site site = Site::current()) {
  constexpr const char* kOperation = "cp.async.bulk.tensor.multicast";
  if (blocks == 0)
    emulator::fail("%s: no block of the cluster is addressed", kOperation);
  emulator::copy_box(shared, map, x, y, z, barrier, blocks, kOperation, site);
}

inline void named_barrier_sync(int id, int threads, Site site = Site::current()) {
  emulator::named_barrier(id, threads, true, site);
}
inline void named_barrier_arrive(int id, int threads, Site site = Site::current()) {
  emulator::named_barrier(id, threads, false, site);
}

template <int kRegisters>
inline void increase_registers(Site site = Site::current()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::change_registers(kRegisters, true, site);
}
template <int kRegisters>
inline void decrease_registers(Site site = Site::current()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::change_registers(kRegisters, false, site);
}

inline uint32_t cluster_rank() {
  return emulator::cluster_rank();
}
inline void cluster_sync(Site site = Site::current()) {
  emulator::cluster_sync(site);
}

}  // namespace segattn::cuda::ptx
