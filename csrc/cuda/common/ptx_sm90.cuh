// The PTX instructions of Hopper (sm_90a) that the kernels use, a function for each: asynchronous matrix products of a
// warpgroup (wgmma), memory barriers (mbarrier), bulk tensor copies, proxy fences, the register budget of a warpgroup,
// and clusters of blocks. Files that include this are compiled for sm_90a (setup.py).
//
// A warpgroup is 128 threads, four warps, the first of which is a multiple of four. "Generic" accesses are those of
// ordinary instructions, "asynchronous" ones those of wgmma and bulk copies: a generic write is visible to the latter
// only after fence_proxy_async, which the writing thread executes before the barrier that its readers wait at.
//
// Under SEGATTN_EMULATED, the emulator (tests/emulator) implements the same functions on the CPU.
#pragma once

#ifdef SEGATTN_EMULATED
#include "emulated_ptx_sm90.h"
#else

#include <cstdint>
#include <type_traits>

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/common/ptx.cuh"

namespace segattn::cuda::ptx {

// ---- memory barriers ------------------------------------------------------------------------------------------------
// A barrier is 8 bytes of shared memory. Its phase completes when `count` arrivals and all announced bytes have come
// in; phases are numbered from 0, and waiting takes the parity of the phase to complete.

// One thread initialises; then fence_barrier_init, then a barrier of all threads that use it (of the cluster).
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Makes the initialisation visible to bulk copies and to the other blocks of the cluster.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the same barrier of block `rank` of the cluster. It tells that block that earlier reads are done, not what
// was written: a release to the cluster would wait for all of the thread's accesses to memory.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Arrives, and announces bytes that bulk copies bring in the current phase.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity has completed. It sees what bulk copies and this block's threads wrote before:
// an acquire of what the cluster's other blocks wrote would invalidate L1.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- bulk tensor copies ---------------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the map's box that starts at element x (innermost), row y and plane z to shared memory; elements outside the
// tensor become zeros. One thread calls it. The bytes of the whole box count towards `barrier` as they arrive. The
// destination is aligned to 1024 bytes for a 128-byte swizzle (tensor_map.h).
__device__ __forceinline__ void copy_box(void* shared, const CUtensorMap* map, int x, int y, int z, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The same to all blocks of the cluster whose bit is set in `blocks`: to the same address in each, counting towards the
// same barrier of each.
__device__ __forceinline__ void copy_box_multicast(
    void* shared, const CUtensorMap* map, int x, int y, int z, uint64_t* barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "h"(blocks)
      : "memory");
}

// Orders this thread's generic accesses to shared memory before asynchronous ones that follow a barrier.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- barriers of some warps, register budgets, clusters -------------------------------------------------------------

// Waits at barrier `id` (1 to 15; 0 is __syncthreads) until `threads` threads have arrived, counted by whole warps.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives without waiting.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The registers of each thread of this warpgroup from here on, a multiple of 8. All its warps execute it. Increasing
// waits until other warpgroups have released enough.
template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier of all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- matrix products of a warpgroup ---------------------------------------------------------------------------------

// d (64 x N, float32) = a (64 x 16) b (16 x N), or d += with `accumulates`. Thread t of the warpgroup, in warp w, with
// g = lane / 4, has
//   d[j][0], d[j][1] = (16 w + g, 8 j + 2 (lane % 4) + 0, 1);  d[j][2], d[j][3] = row 16 w + g + 8
//   a from registers: as mma_m16n8k16's a, of rows 16 w to 16 w + 15
// The product runs at any time between its issue and the wgmma_wait for its group: until then the thread neither reads
// nor writes d or the registers of a, and nobody writes the shared operands. Products into the same d follow each other
// without a wait if they have the same N. wgmma_fence precedes the kernel's first product, and the first one after the
// thread accessed d or a.

// The direction along which an operand in shared memory is contiguous: the contraction (K), or the rows of a or the
// columns of b (MN).
enum class MatrixMajor { kK = 0, kMn = 1 };

// An operand in shared memory with 128-byte swizzle: rows of 128 bytes, 64 elements, in groups of 8 rows, 1024 bytes,
// that start at multiples of 1024; the 16-byte chunk c of row r is stored at chunk c ^ (r % 8).
//   K-major:   a row has 64 elements of the contraction. `start` is 32 bytes further for every 16 of the contraction.
//              Groups are stride_bytes apart. chunk_bytes is not used.
//   MN-major:  a row is one element of the contraction, its elements 64 rows of a or columns of b; for every 16 of the
//              contraction `start` is 2048 bytes further. Groups (8 of the contraction) are stride_bytes apart, chunks
//              of 64 rows or columns chunk_bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* start, uint32_t chunk_bytes, uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return (shared_address(start) & 0x3ffff) >> 4 | uint64_t(chunk_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 |
      kSwizzle128;
}

// Orders earlier accesses of the thread to accumulators and a's registers before the products that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Commits the products since the last commit as a group.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most N of the committed groups run.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving accesses to accumulators across this point: it does not know that a product in flight
// uses them.
template <int kTiles>
__device__ __forceinline__ void hold(float (&d)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      asm volatile("" : "+f"(d[j][c])::"memory");
    }
  }
}

#define SEGATTN_REGISTERS_32                                                                                        \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31"
#define SEGATTN_REGISTERS_64                                                                                      \
  SEGATTN_REGISTERS_32                                                                                            \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"
#define SEGATTN_REGISTERS_128                                                                                       \
  SEGATTN_REGISTERS_64                                                                                              \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,"   \
  "%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114," \
  "%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define SEGATTN_TILE(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define SEGATTN_TILES_4(j) SEGATTN_TILE(j), SEGATTN_TILE(j + 1), SEGATTN_TILE(j + 2), SEGATTN_TILE(j + 3)
#define SEGATTN_TILES_8 SEGATTN_TILES_4(0), SEGATTN_TILES_4(4)
#define SEGATTN_TILES_16 SEGATTN_TILES_8, SEGATTN_TILES_4(8), SEGATTN_TILES_4(12)
#define SEGATTN_TILES_32 \
  SEGATTN_TILES_16, SEGATTN_TILES_4(16), SEGATTN_TILES_4(20), SEGATTN_TILES_4(24), SEGATTN_TILES_4(28)

// first, second, ...: the numbers of the operands after the accumulators.
#define SEGATTN_WGMMA_SHARED(n, type, registers, tiles, first, second, third, fourth, fifth)                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #third ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n               \
               "k16.f32." type "." type " " registers "}, %" #first ", %" #second ", p, 1, 1, %" #fourth ", %" #fifth \
               ";\n}"                                                                                                 \
               : tiles                                                                                                \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulates)), "n"(static_cast<int>(kMajorA)),                  \
                 "n"(static_cast<int>(kMajorB)))
#define SEGATTN_WGMMA_REGISTERS(n, type, registers, tiles, first, second, third, fourth, fifth, sixth, seventh) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #sixth ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n         \
               "k16.f32." type "." type " " registers "}, {%" #first ",%" #second ",%" #third ",%" #fourth      \
               "}, %" #fifth ", p, 1, 1, %" #seventh ";\n}"                                                     \
               : tiles                                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulates)),        \
                 "n"(static_cast<int>(kMajorB)))

// a and b from shared memory, by descriptor. T = __half or __nv_bfloat16; kTiles = N / 8: 8, 16 or 32.
template <class T, MatrixMajor kMajorA, MatrixMajor kMajorB, int kTiles>
__device__ __forceinline__ void wgmma(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool accumulates) {
  static_assert(kTiles == 8 || kTiles == 16 || kTiles == 32);
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kTiles == 8) {
      SEGATTN_WGMMA_SHARED(64, "f16", SEGATTN_REGISTERS_32, SEGATTN_TILES_8, 32, 33, 34, 35, 36);
    } else if constexpr (kTiles == 16) {
      SEGATTN_WGMMA_SHARED(128, "f16", SEGATTN_REGISTERS_64, SEGATTN_TILES_16, 64, 65, 66, 67, 68);
    } else {
      SEGATTN_WGMMA_SHARED(256, "f16", SEGATTN_REGISTERS_128, SEGATTN_TILES_32, 128, 129, 130, 131, 132);
    }
  } else {
    if constexpr (kTiles == 8) {
      SEGATTN_WGMMA_SHARED(64, "bf16", SEGATTN_REGISTERS_32, SEGATTN_TILES_8, 32, 33, 34, 35, 36);
    } else if constexpr (kTiles == 16) {
      SEGATTN_WGMMA_SHARED(128, "bf16", SEGATTN_REGISTERS_64, SEGATTN_TILES_16, 64, 65, 66, 67, 68);
    } else {
      SEGATTN_WGMMA_SHARED(256, "bf16", SEGATTN_REGISTERS_128, SEGATTN_TILES_32, 128, 129, 130, 131, 132);
    }
  }
}

// a from registers.
template <class T, MatrixMajor kMajorB, int kTiles>
__device__ __forceinline__ void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool accumulates) {
  static_assert(kTiles == 8 || kTiles == 16 || kTiles == 32);
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kTiles == 8) {
      SEGATTN_WGMMA_REGISTERS(64, "f16", SEGATTN_REGISTERS_32, SEGATTN_TILES_8, 32, 33, 34, 35, 36, 37, 38);
    } else if constexpr (kTiles == 16) {
      SEGATTN_WGMMA_REGISTERS(128, "f16", SEGATTN_REGISTERS_64, SEGATTN_TILES_16, 64, 65, 66, 67, 68, 69, 70);
    } else {
      SEGATTN_WGMMA_REGISTERS(256, "f16", SEGATTN_REGISTERS_128, SEGATTN_TILES_32, 128, 129, 130, 131, 132, 133, 134);
    }
  } else {
    if constexpr (kTiles == 8) {
      SEGATTN_WGMMA_REGISTERS(64, "bf16", SEGATTN_REGISTERS_32, SEGATTN_TILES_8, 32, 33, 34, 35, 36, 37, 38);
    } else if constexpr (kTiles == 16) {
      SEGATTN_WGMMA_REGISTERS(128, "bf16", SEGATTN_REGISTERS_64, SEGATTN_TILES_16, 64, 65, 66, 67, 68, 69, 70);
    } else {
      SEGATTN_WGMMA_REGISTERS(256, "bf16", SEGATTN_REGISTERS_128, SEGATTN_TILES_32, 128, 129, 130, 131, 132, 133, 134);
    }
  }
}

#undef SEGATTN_WGMMA_REGISTERS
#undef SEGATTN_WGMMA_SHARED
#undef SEGATTN_TILES_32
#undef SEGATTN_TILES_16
#undef SEGATTN_TILES_8
#undef SEGATTN_TILES_4
#undef SEGATTN_TILE
#undef SEGATTN_REGISTERS_128
#undef SEGATTN_REGISTERS_64
#undef SEGATTN_REGISTERS_32

// Stores four 8 x 8 matrices of 16-bit elements, each transposed. Lane l gives the address of row l % 8 of matrix l / 8
// (16 bytes, 16-byte aligned); r[i] has the elements (2t, g) and (2t+1, g) of matrix i.
__device__ __forceinline__ void stmatrix_x4_trans(void* shared_row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(shared_row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace segattn::cuda::ptx

#endif  // SEGATTN_EMULATED
