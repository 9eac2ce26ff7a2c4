// Kernels of memory barriers, bulk copies, clusters and register budgets, with one fault each and their corrected twins
// (tests/tools/test_emulator_bulk.py). kBroken chooses the twin. Valid CUDA, like the real kernels.
#include <stdexcept>

#include <cuda.h>
#include <cuda_runtime.h>

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx_sm90.cuh"
#include "selftest.h"

namespace segattn::selftest {

namespace ptx = cuda::ptx;
using cuda::launch_cluster;

namespace {

constexpr int kThreads = 128;
// A tile of the tensor of 16-bit elements: kRows rows of 64, which are 128 bytes.
constexpr int kRows = 16;
constexpr int kTileBytes = kRows * 128;
constexpr int kTileWords = kTileBytes / 4;

// The tensor is 2 planes of 32 rows of 128 elements, or 8 tiles.
constexpr int kTensorRows = 32;
constexpr int kTensorColumns = 128;

constexpr int kTiles = 8;

CUtensorMap map_of(const float* in, int planes = 2) {
  const cuuint64_t sizes[] = {kTensorColumns, kTensorRows, cuuint64_t(planes)};
  const cuuint64_t strides[] = {2 * kTensorColumns, 2 * kTensorColumns * kTensorRows};
  const cuuint32_t box[] = {64, kRows, 1};
  const cuuint32_t element_strides[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result = cuTensorMapEncodeTiled(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<float*>(in), sizes, strides, box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("the tensor map is refused");
  return map;
}

struct Parameters {
  CUtensorMap map;
  CUtensorMap out_map;
  CUtensorMap large_map;  // with a plane that the tensor does not have
  float* out;             // tiles as they lie in shared memory
  int x, y, z;
};

// Dynamic shared memory: tiles, then barriers.
__device__ uint64_t* barriers_after(float* tiles, int count) {
  return reinterpret_cast<uint64_t*>(tiles + count * kTileWords);
}

// Thread 0 initialises `count` barriers for `arrivals` each.
__device__ void make_barriers(uint64_t* barriers, int count, int arrivals) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < count; ++i)
      ptx::mbarrier_init(barriers + i, uint32_t(arrivals));
    ptx::fence_barrier_init();
  }
  __syncthreads();
}

__device__ void copy_tile(float* tile, const CUtensorMap* map, int t, uint64_t* full) {
  ptx::copy_box(tile, map, t % 2 * 64, t / 2 % 2 * kRows, t / 4, full);
}

__device__ void write_out(float* out, const float* tile, int thread, int threads) {
  for (int k = thread; k < kTileWords; k += threads)
    out[k] = tile[k];
}

// ---- one copy
// -------------------------------------------------------------------------------------------------------- Copies the
// box at p.x, p.y, p.z to shared memory and from there to p.out.
enum class CopyFault {
  kNone,
  kNotWaited,     // reads the tile without waiting
  kNeverWaited,   // leaves the kernel without waiting
  kTooManyBytes,  // announces more bytes than come
  kTooFewBytes,   // announces fewer
  kUnannounced,   // announces none: the phase completes without the data
  kNothingComes,  // announces bytes that nobody copies or waits for
  kTwoArrivals,   // arrives twice at a barrier for one
  kNoInit,        // uses memory that is no barrier
  kNoFence,       // no fence_barrier_init
  kNoSync,        // no __syncthreads after the initialisation
  kInitTwice,     // initialises a barrier that is in use
  kMisalignedBarrier,
  kMisalignedTile,
  kTileOutside,    // the destination ends past the block's shared memory
  kOverwritten,    // writes to the barrier's memory
  kNoMap,          // what is given as a tensor map is none
  kTensorEnds,     // the map is larger than the tensor
  kUnfenced,       // writes to the tile before, without a proxy fence
  kSourceWritten,  // writes to the source while the copy is under way
};

template <CopyFault kFault>
__global__ void copy_once(const __grid_constant__ Parameters p) {
  SEGATTN_DYNAMIC_SHARED(float, shared);
  float* tile = kFault == CopyFault::kMisalignedTile ? shared + 32 : shared;
  if (kFault == CopyFault::kTileOutside)
    tile += kTileWords;
  uint64_t* full = barriers_after(shared, 1);
  if (kFault == CopyFault::kMisalignedBarrier)
    full = reinterpret_cast<uint64_t*>(shared + kTileWords + 1);
  const int i = int(threadIdx.x);
  for (int k = i; k < kTileWords; k += kThreads)
    shared[k] = 1;
  if (kFault != CopyFault::kUnfenced)
    ptx::fence_proxy_async();
  if (i == 0 && kFault != CopyFault::kNoInit) {
    ptx::mbarrier_init(full, 1);
    if (kFault == CopyFault::kInitTwice)
      ptx::mbarrier_init(full, 1);
    if (kFault != CopyFault::kNoFence)
      ptx::fence_barrier_init();
  }
  if (kFault != CopyFault::kNoSync)
    __syncthreads();
  if (kFault == CopyFault::kOverwritten && i == 0)
    shared[kTileWords] = 1;
  if (i == 0) {
    constexpr int kWrong = kFault == CopyFault::kTooManyBytes ? 16 : kFault == CopyFault::kTooFewBytes ? -16 : 0;
    if (kFault == CopyFault::kUnannounced) {
      ptx::mbarrier_arrive(full);
    } else {
      ptx::mbarrier_arrive_expect(full, uint32_t(kTileBytes + kWrong));
    }
    if (kFault == CopyFault::kTwoArrivals)
      ptx::mbarrier_arrive(full);
    const auto* map = kFault == CopyFault::kNoMap ? reinterpret_cast<const CUtensorMap*>(p.map.opaque + 8)
        : kFault == CopyFault::kSourceWritten     ? &p.out_map
                                                  : &p.map;
    if (kFault == CopyFault::kTensorEnds) {
      ptx::copy_box(tile, &p.large_map, 0, 0, 2, full);
    } else if (kFault != CopyFault::kNothingComes) {
      ptx::copy_box(tile, map, p.x, p.y, p.z, full);
    }
  }
  if (kFault == CopyFault::kSourceWritten && i == 0)
    p.out[8 * kTileWords - 1] = 1;
  if (kFault == CopyFault::kNeverWaited || kFault == CopyFault::kNothingComes)
    return;
  if (kFault != CopyFault::kNotWaited)
    ptx::mbarrier_wait(full, 0);
  write_out(p.out, shared, i, kThreads);
  ptx::mbarrier_wait(full, 0);
}

// ---- a ring of stages
// ------------------------------------------------------------------------------------------------ Thread 0 copies all
// tiles through two stages, the threads of the other warps write them to p.out.
enum class RingFault {
  kNone,
  kNoEmptyWait,    // refills a stage before its tile has been read
  kEarlyArrival,   // a consumer arrives before it has read
  kWrongParity,    // consumers wait for the parity of the phase before
  kOneArrival,     // one consumer's arrival releases the stage for all
  kMissingArrival  // one consumer never releases
};

template <RingFault kFault>
__global__ void ring(const __grid_constant__ Parameters p) {
  constexpr int kStages = 2, kConsumers = kThreads - 32;
  SEGATTN_DYNAMIC_SHARED(float, tiles);
  uint64_t* full = barriers_after(tiles, kStages);
  uint64_t* empty = full + kStages;
  const int i = int(threadIdx.x);
  if (i == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + s, 1);
      ptx::mbarrier_init(empty + s, kFault == RingFault::kOneArrival ? 1 : kConsumers);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  for (int t = 0; t < kTiles; ++t) {
    const int s = t % kStages;
    const uint32_t parity = uint32_t(t / kStages % 2);
    if (i == 0) {
      if (kFault != RingFault::kNoEmptyWait)
        ptx::mbarrier_wait(empty + s, parity ^ 1);
      ptx::mbarrier_arrive_expect(full + s, kTileBytes);
      copy_tile(tiles + s * kTileWords, &p.map, t, full + s);
    } else if (i >= 32) {
      ptx::mbarrier_wait(full + s, kFault == RingFault::kWrongParity ? parity ^ 1 : parity);
      if (kFault == RingFault::kEarlyArrival)
        ptx::mbarrier_arrive(empty + s);
      write_out(p.out + t * kTileWords, tiles + s * kTileWords, i - 32, kConsumers);
      const bool arrives = kFault == RingFault::kOneArrival ? i == 32
          : kFault == RingFault::kMissingArrival            ? i != 40
                                                            : kFault != RingFault::kEarlyArrival;
      if (arrives)
        ptx::mbarrier_arrive(empty + s);
    }
  }
}

// Broken: thread 32 waits for phase 1 when phases 1 to 3 have completed.
template <bool kBroken>
__global__ void missed_phases(const __grid_constant__ Parameters p) {
  SEGATTN_DYNAMIC_SHARED(float, tiles);
  uint64_t* barrier = barriers_after(tiles, 1);
  const int i = int(threadIdx.x);
  make_barriers(barrier, 1, 1);
  for (int phase = 0; phase < 4; ++phase) {
    if (i == 0)
      ptx::mbarrier_arrive(barrier);
    if (i == 0 || (i == 32 && (phase == 0 || !kBroken)))
      ptx::mbarrier_wait(barrier, uint32_t(phase % 2));
    __syncthreads();
  }
  if (i == 32)
    ptx::mbarrier_wait(barrier, 1);
  p.out[i] = 1;
}

// ---- clusters
// -------------------------------------------------------------------------------------------------------- A cluster of
// two. Block t % 2 copies tile t to both, each of which writes it to its half of p.out.
enum class ClusterFault {
  kNone,
  kOwnConsumersOnly,  // refills a stage before the other block has read it
  kNoFinalSync,       // leaves the kernel while the other block may still arrive at its barriers
  kNoFence,           // no fence_barrier_init
  kNoFirstSync,       // no cluster_sync after the initialisation
  kThirdBlock         // addresses a block that the cluster does not have
};

template <ClusterFault kFault>
__global__ void cluster_ring(const __grid_constant__ Parameters p) {
  constexpr int kStages = 2, kConsumers = kThreads - 32;
  SEGATTN_DYNAMIC_SHARED(float, tiles);
  uint64_t* full = barriers_after(tiles, kStages);
  uint64_t* empty = full + kStages;
  const int i = int(threadIdx.x);
  const uint32_t rank = ptx::cluster_rank();
  if (i == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + s, 1);
      ptx::mbarrier_init(empty + s, kFault == ClusterFault::kOwnConsumersOnly ? kConsumers : 2 * kConsumers);
    }
    if (kFault != ClusterFault::kNoFence)
      ptx::fence_barrier_init();
  }
  if (kFault != ClusterFault::kNoFirstSync) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }
  for (int t = 0; t < kTiles; ++t) {
    const int s = t % kStages;
    const uint32_t parity = uint32_t(t / kStages % 2);
    if (i == 0) {
      ptx::mbarrier_wait(empty + s, parity ^ 1);
      ptx::mbarrier_arrive_expect(full + s, kTileBytes);
      if (t % 2 == int(rank)) {
        ptx::copy_box_multicast(
            tiles + s * kTileWords, &p.map, t % 2 * 64, t / 2 % 2 * kRows, t / 4, full + s,
            kFault == ClusterFault::kThirdBlock ? 5 : 3);
      }
    } else if (i >= 32) {
      ptx::mbarrier_wait(full + s, parity);
      write_out(p.out + (int(rank) * kTiles + t) * kTileWords, tiles + s * kTileWords, i - 32, kConsumers);
      if (kFault != ClusterFault::kOwnConsumersOnly) {
        ptx::mbarrier_arrive_at(empty + s, 0);
        ptx::mbarrier_arrive_at(empty + s, 1);
      } else {
        ptx::mbarrier_arrive(empty + s);
      }
    }
  }
  if (kFault != ClusterFault::kNoFinalSync)
    ptx::cluster_sync();
}

// Broken: block 1 leaves the kernel before block 0 copies a tile to it.
template <bool kBroken>
__global__ void left_cluster(const __grid_constant__ Parameters p) {
  SEGATTN_DYNAMIC_SHARED(float, tile);
  uint64_t* full = barriers_after(tile, 1);
  const int i = int(threadIdx.x);
  const uint32_t rank = ptx::cluster_rank();
  make_barriers(full, 1, 1);
  ptx::cluster_sync();
  if (rank == 1 && kBroken)
    return;
  if (i == 0)
    ptx::mbarrier_arrive_expect(full, kTileBytes);
  for (int k = 0; k < 100; ++k)
    __syncthreads();
  if (i == 0 && rank == 0)
    ptx::copy_box_multicast(tile, &p.map, p.x, p.y, p.z, full, 3);
  ptx::mbarrier_wait(full, 0);
  write_out(p.out + int(rank) * kTileWords, tile, i, kThreads);
}

// Broken: a static shared array, which the blocks of a cluster have in common in the emulator.
template <bool kBroken>
__global__ void static_in_cluster(const __grid_constant__ Parameters p) {
  SEGATTN_DYNAMIC_SHARED(float, dynamic);
  __shared__ float fixed[kThreads];
  float* values = kBroken ? fixed : dynamic;
  const int i = int(threadIdx.x);
  values[i] = float(i);
  __syncthreads();
  p.out[int(blockIdx.x) * kThreads + i] = values[kThreads - 1 - i];
}

// ---- order
// -----------------------------------------------------------------------------------------------------------

// Warp 0 passes values to the others through a memory barrier. Broken: its lane 5 arrives before it has written.
template <bool kBroken>
__global__ void mbarrier_exchange(const __grid_constant__ Parameters p) {
  SEGATTN_DYNAMIC_SHARED(float, values);
  uint64_t* written = barriers_after(values, 1);
  const int i = int(threadIdx.x);
  make_barriers(written, 1, 32);
  if (i < 32) {
    if (kBroken && i == 5)
      ptx::mbarrier_arrive(written);
    values[i] = float(i);
    if (!kBroken || i != 5)
      ptx::mbarrier_arrive(written);
  } else {
    ptx::mbarrier_wait(written, 0);
    p.out[i - 32] = values[i % 32];
  }
}

// Block 0 passes values to block 1 through global memory. Broken: a barrier of each block only.
template <bool kBroken>
__global__ void cluster_exchange(const __grid_constant__ Parameters p) {
  const int i = int(threadIdx.x);
  if (ptx::cluster_rank() == 0)
    p.out[i] = float(i);
  if (kBroken) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }
  if (ptx::cluster_rank() == 1)
    p.out[kThreads + i] = p.out[kThreads - 1 - i];
}

// The rank of each block.
__global__ void ranks(const __grid_constant__ Parameters p) {
  if (threadIdx.x == 0)
    p.out[blockIdx.x] = float(ptx::cluster_rank());
}

// ---- barriers of some warps
// ------------------------------------------------------------------------------------------ Warp 0 writes values that
// warps 1 and 2 read, and writes them again; warp 3 does not take part.
enum class NamedFault {
  kNone,
  kMissing,   // warp 2 never says that it has read
  kCounts,    // a warp gives another number of threads
  kTwice,     // warp 1 arrives for warp 2
  kNumber,    // barrier 16
  kPartial,   // not whole warps
  kUnordered  // the readers do not wait for the first values
};

template <NamedFault kFault>
__global__ void named(const __grid_constant__ Parameters p) {
  constexpr int kWritten = kFault == NamedFault::kNumber ? 16 : 1, kRead = 2, kAll = 96;
  constexpr int kFirst = kFault == NamedFault::kPartial ? 80 : kAll;
  SEGATTN_DYNAMIC_SHARED(float, values);
  const int i = int(threadIdx.x), warp = i / 32;
  for (int turn = 0; turn < 2; ++turn) {
    if (warp == 0) {
      if (turn > 0)
        ptx::named_barrier_sync(kRead, kAll);
      values[i] = float(100 * turn + i);
      ptx::named_barrier_arrive(kWritten, kFirst);
    } else if (warp < 3) {
      if (kFault == NamedFault::kUnordered && turn == 0) {
        ptx::named_barrier_arrive(kWritten, kFirst);
      } else {
        ptx::named_barrier_sync(kWritten, kFault == NamedFault::kCounts && warp == 2 ? 64 : kFirst);
      }
      p.out[64 * turn + i - 32] = values[i % 32];
      const bool arrives = kFault == NamedFault::kMissing || kFault == NamedFault::kTwice ? warp == 1 : true;
      if (turn == 0 && arrives)
        ptx::named_barrier_arrive(kRead, kAll);
      if (turn == 0 && warp == 1 && kFault == NamedFault::kTwice)
        ptx::named_barrier_arrive(kRead, kAll);
    }
  }
}

// ---- register budgets
// ------------------------------------------------------------------------------------------------ Three warpgroups,
// 168 registers a thread at first.
enum class RegistersFault {
  kNone,
  kNoRelease,   // the first warpgroup keeps its registers
  kTooMany,     // the others want more than it releases
  kThreeWarps,  // one of its warps does not release
  kTwoLines,    // its warps release at different source lines
  kDecreaseToMore,
  kIncreaseToFewer
};

template <RegistersFault kFault>
__global__ void __launch_bounds__(384, 1) registers(const __grid_constant__ Parameters p) {
  const int i = int(threadIdx.x), warp = i / 32;
  if (warp < 4) {
    if (kFault == RegistersFault::kDecreaseToMore) {
      ptx::decrease_registers<176>();
    } else if (kFault == RegistersFault::kTwoLines && warp == 3) {
      ptx::decrease_registers<24>();
    } else if (kFault != RegistersFault::kNoRelease && (kFault != RegistersFault::kThreeWarps || warp != 3)) {
      ptx::decrease_registers<24>();
    }
  } else if (kFault == RegistersFault::kIncreaseToFewer) {
    ptx::increase_registers<160>();
  } else {
    // With one warp's registers kept, 144 of its 32 threads, 232 still fit.
    constexpr int kMore = kFault == RegistersFault::kTooMany ? 248 : kFault == RegistersFault::kThreeWarps ? 216 : 240;
    ptx::increase_registers<kMore>();
  }
  p.out[i] = float(i);
}

// ---- launches
// --------------------------------------------------------------------------------------------------------

using Kernel = void (*)(Parameters);

void launch(
    Kernel kernel, const char* name, int cluster, int grid, int threads, size_t shared_bytes, const Buffers& b) {
  const int x = b.size % 1000 - 500, y = b.size / 1000 % 1000 - 500, z = b.size / 1000000;
  launch_cluster(
      kernel, name, unsigned(cluster), dim3(unsigned(grid)), dim3(unsigned(threads)), shared_bytes, nullptr,
      Parameters{map_of(b.in), map_of(b.out), map_of(b.in, 3), b.out, x, y, z});
}

struct Shape {
  int cluster, threads;
  size_t shared_bytes;
};

Case make_case(const char* name, Kernel broken_kernel, Kernel right_kernel, Shape shape) {
  return {name, [=](bool broken, const Buffers& b) {
            launch(
                broken ? broken_kernel : right_kernel, name, shape.cluster, shape.cluster, shape.threads,
                shape.shared_bytes, b);
          }};
}

constexpr size_t kBarrierBytes = 64;
constexpr Shape kOneTile = {1, kThreads, kTileBytes + kBarrierBytes};
constexpr Shape kTwoStages = {1, kThreads, 2 * kTileBytes + kBarrierBytes};
constexpr Shape kClusterOfTwo = {2, kThreads, 2 * kTileBytes + kBarrierBytes};
constexpr Shape kThreeWarpgroups = {1, 384, 0};

template <CopyFault kFault>
Case copy_case(const char* name) {
  return make_case(name, copy_once<kFault>, copy_once<CopyFault::kNone>, kOneTile);
}
template <RingFault kFault>
Case ring_case(const char* name) {
  return make_case(name, ring<kFault>, ring<RingFault::kNone>, kTwoStages);
}
template <ClusterFault kFault>
Case cluster_case(const char* name) {
  return make_case(name, cluster_ring<kFault>, cluster_ring<ClusterFault::kNone>, kClusterOfTwo);
}
template <NamedFault kFault>
Case named_case(const char* name) {
  return make_case(name, named<kFault>, named<NamedFault::kNone>, kOneTile);
}
template <RegistersFault kFault>
Case registers_case(const char* name) {
  return make_case(name, registers<kFault>, registers<RegistersFault::kNone>, kThreeWarpgroups);
}

}  // namespace

const std::vector<Case>& bulk_cases() {
  static const std::vector<Case> all = {
      copy_case<CopyFault::kNotWaited>("copy_not_waited"),
      copy_case<CopyFault::kNeverWaited>("copy_never_waited"),
      copy_case<CopyFault::kTooManyBytes>("copy_too_many_bytes"),
      copy_case<CopyFault::kTooFewBytes>("copy_too_few_bytes"),
      copy_case<CopyFault::kUnannounced>("copy_unannounced"),
      copy_case<CopyFault::kNothingComes>("copy_nothing_comes"),
      copy_case<CopyFault::kTwoArrivals>("copy_two_arrivals"),
      copy_case<CopyFault::kNoInit>("copy_no_init"),
      copy_case<CopyFault::kNoFence>("copy_no_fence"),
      copy_case<CopyFault::kNoSync>("copy_no_sync"),
      copy_case<CopyFault::kInitTwice>("copy_init_twice"),
      copy_case<CopyFault::kMisalignedBarrier>("copy_misaligned_barrier"),
      copy_case<CopyFault::kMisalignedTile>("copy_misaligned_tile"),
      copy_case<CopyFault::kTileOutside>("copy_tile_outside"),
      copy_case<CopyFault::kOverwritten>("copy_overwritten"),
      copy_case<CopyFault::kNoMap>("copy_no_map"),
      copy_case<CopyFault::kTensorEnds>("copy_tensor_ends"),
      copy_case<CopyFault::kUnfenced>("copy_unfenced"),
      copy_case<CopyFault::kSourceWritten>("copy_source_written"),
      ring_case<RingFault::kNoEmptyWait>("ring_no_empty_wait"),
      ring_case<RingFault::kEarlyArrival>("ring_early_arrival"),
      ring_case<RingFault::kWrongParity>("ring_wrong_parity"),
      ring_case<RingFault::kOneArrival>("ring_one_arrival"),
      ring_case<RingFault::kMissingArrival>("ring_missing_arrival"),
      make_case("missed_phases", missed_phases<true>, missed_phases<false>, kOneTile),
      cluster_case<ClusterFault::kOwnConsumersOnly>("cluster_own_consumers_only"),
      cluster_case<ClusterFault::kNoFinalSync>("cluster_no_final_sync"),
      cluster_case<ClusterFault::kNoFence>("cluster_no_fence"),
      cluster_case<ClusterFault::kNoFirstSync>("cluster_no_first_sync"),
      cluster_case<ClusterFault::kThirdBlock>("cluster_third_block"),
      make_case("mbarrier_exchange", mbarrier_exchange<true>, mbarrier_exchange<false>, kOneTile),
      make_case("cluster_exchange", cluster_exchange<true>, cluster_exchange<false>, kClusterOfTwo),
      make_case("left_cluster", left_cluster<true>, left_cluster<false>, kClusterOfTwo),
      make_case("static_in_cluster", static_in_cluster<true>, static_in_cluster<false>, kClusterOfTwo),
      named_case<NamedFault::kMissing>("named_missing"),
      named_case<NamedFault::kCounts>("named_counts"),
      named_case<NamedFault::kTwice>("named_twice"),
      named_case<NamedFault::kNumber>("named_number"),
      named_case<NamedFault::kPartial>("named_partial"),
      named_case<NamedFault::kUnordered>("named_unordered"),
      registers_case<RegistersFault::kNoRelease>("registers_no_release"),
      registers_case<RegistersFault::kTooMany>("registers_too_many"),
      registers_case<RegistersFault::kThreeWarps>("registers_three_warps"),
      registers_case<RegistersFault::kTwoLines>("registers_two_lines"),
      registers_case<RegistersFault::kDecreaseToMore>("registers_decrease_to_more"),
      registers_case<RegistersFault::kIncreaseToFewer>("registers_increase_to_fewer"),
  };
  return all;
}

const std::vector<Case>& bulk_instructions() {
  static const std::vector<Case> all = {{"cluster_ranks", [](bool, const Buffers& b) {
                                           const Buffers place = {b.in, b.out, 0};
                                           launch(ranks, "ranks", b.size / 100, b.size % 100, kThreads, 0, place);
                                         }}};
  return all;
}

}  // namespace segattn::selftest
