// Kernels with one fault each and their corrected twins (tests/tools/test_emulator.py), which show that each check
// finds its fault and nothing else. kBroken chooses the twin. Valid CUDA, like the real kernels.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "selftest.h"

namespace segattn::selftest {

namespace ptx = cuda::ptx;
using cuda::launch_kernel;

namespace {

constexpr int kThreads = 128;

// out[i] = in[size - 1 - i] for one block, through dynamic shared memory. Broken: no barrier between write and read.
template <bool kBroken>
__global__ void reverse(const float* in, float* out, int size) {
  SEGATTN_DYNAMIC_SHARED(float, tile);
  const int i = int(threadIdx.x);
  if (i < size)
    tile[i] = in[i];
  if constexpr (!kBroken)
    __syncthreads();
  if (i < size)
    out[i] = tile[size - 1 - i];
}

// The same through a static array, which is poisoned before every block. Broken: only the first block writes it.
template <bool kBroken>
__global__ void reverse_static(const float* in, float* out, int size) {
  __shared__ float tile[kThreads];
  const int i = int(threadIdx.x);
  const int block_start = int(blockIdx.x) * kThreads;
  if (!kBroken || blockIdx.x == 0)
    tile[i] = in[block_start + i];
  __syncthreads();
  out[block_start + i] = tile[kThreads - 1 - i];
}

// Pairs of 16-bit elements, each element written by its own thread and each pair read as one word. Broken: the second
// element of the last pair is not written, and no result shows it.
template <bool kBroken>
__global__ void half_written_word(const float* in, float* out, int size) {
  SEGATTN_DYNAMIC_SHARED(uint16_t, tile);
  const int i = int(threadIdx.x);
  if (!kBroken || i != size - 1)
    tile[i] = uint16_t(in[i]);
  __syncthreads();
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(tile + i / 2 * 2);
  out[i] = float(pair & 0xffffu);
}

// Rows of four words by ldmatrix. Broken: the last row is not written, and no result shows it.
template <bool kBroken>
__global__ void unwritten_matrix_row(const float* in, float* out, int) {
  SEGATTN_DYNAMIC_SHARED(float, tile);
  const int lane = int(threadIdx.x);
  if (!kBroken || lane < 31) {
    for (int k = 0; k < 4; ++k)
      tile[4 * lane + k] = in[4 * lane + k];
  }
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, tile + 4 * lane);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const int row = 8 * matrix + lane / 4;
    if (row < 31)
      out[4 * row + lane % 4] = __uint_as_float(r[matrix]);
  }
}

// Sums neighbours from shared memory. Broken: the last thread reads one element too far.
template <bool kBroken>
__global__ void shared_bounds(const float* in, float* out, int size) {
  SEGATTN_DYNAMIC_SHARED(float, tile);
  const int i = int(threadIdx.x);
  tile[i] = in[i];
  __syncthreads();
  const int right = kBroken ? i + 1 : (i + 1) % size;
  out[i] = tile[i] + tile[right];
}

// Sums neighbours from global memory. Broken: the last thread reads one element too far.
template <bool kBroken>
__global__ void global_bounds(const float* in, float* out, int size) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= size)
    return;
  const int right = kBroken ? i + 1 : (i + 1) % size;
  out[i] = in[i] + in[right];
}

// An asynchronous copy through shared memory. Broken: reads without waiting for the copy.
template <bool kBroken>
__global__ void async_copy(const float* in, float* out, int) {
  SEGATTN_DYNAMIC_SHARED(float, tile);
  const int i = int(threadIdx.x);
  ptx::cp_async_16(tile + 4 * i, in + 4 * i, 16);
  ptx::cp_async_commit();
  if constexpr (!kBroken)
    ptx::cp_async_wait<0>();
  __syncthreads();
  const int other = int(blockDim.x) - 1 - i;
  for (int k = 0; k < 4; ++k)
    out[4 * i + k] = tile[4 * other + k];
}

// Two tiles in one buffer, one after the other. Broken: the second copy starts while others may still read the first
// tile.
template <bool kBroken>
__global__ void async_refill(const float* in, float* out, int) {
  SEGATTN_DYNAMIC_SHARED(float, tile);
  const int i = int(threadIdx.x), other = int(blockDim.x) - 1 - i, size = 4 * int(blockDim.x);
  for (int turn = 0; turn < 2; ++turn) {
    ptx::cp_async_16(tile + 4 * i, in + turn * size + 4 * i, 16);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    for (int k = 0; k < 4; ++k)
      out[turn * size + 4 * i + k] = tile[4 * other + k];
    if constexpr (!kBroken)
      __syncthreads();
  }
}

// Broken: uses the newest group's data after a wait that leaves that group in flight.
template <bool kBroken>
__global__ void async_groups(const float* in, float* out, int) {
  SEGATTN_DYNAMIC_SHARED(float, tile);
  const int i = int(threadIdx.x), size = 4 * int(blockDim.x);
  for (int stage = 0; stage < 2; ++stage) {
    ptx::cp_async_16(tile + stage * size + 4 * i, in + stage * size + 4 * i, stage == 0 ? 16 : 8);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  for (int k = 0; k < 4; ++k)
    out[4 * i + k] = tile[4 * i + k];
  ptx::cp_async_wait<kBroken ? 1 : 0>();
  for (int k = 0; k < 4; ++k)
    out[size + 4 * i + k] = tile[size + 4 * i + k];
}

// Broken: one lane of each warp waits at __syncwarp, the others at __syncthreads.
template <bool kBroken>
__global__ void deadlock(const float* in, float* out, int) {
  const int i = int(threadIdx.x);
  if (kBroken && i % 32 == 0) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  out[i] = in[i];
}

// Broken: the two halves of the block meet at different __syncthreads.
template <bool kBroken>
__global__ void divergent_barrier(const float* in, float* out, int) {
  const int i = int(threadIdx.x);
  if (kBroken && i % 2 == 0) {
    out[i] = in[i];
    __syncthreads();
  } else {
    __syncthreads();
    out[i] = in[i];
  }
}

// Broken: sixteen lanes have left the kernel before the tensor-core instruction.
template <bool kBroken>
__global__ void partial_warp(const float* in, float* out, int) {
  const int i = int(threadIdx.x);
  out[i] = in[i];
  if (kBroken && i % 32 >= 16)
    return;
  float d[4] = {0, 0, 0, 0};
  const uint32_t a[4] = {0, 0, 0, 0}, b[2] = {0, 0};
  ptx::mma_m16n8k16<__half>(d, a, b);
  out[i] += d[0];
}

// Broken: odd and even lanes execute different tensor-core instructions.
template <bool kBroken>
__global__ void divergent_mma(const float* in, float* out, int) {
  const int i = int(threadIdx.x);
  float d[4] = {in[i], 0, 0, 0};
  const uint32_t a[4] = {0, 0, 0, 0}, b[2] = {0, 0};
  if (kBroken && i % 2 == 0) {
    ptx::mma_m16n8k16<__half>(d, a, b);
  } else {
    ptx::mma_m16n8k16<__half>(d, a, b);
  }
  out[i] = d[0];
}

// Broken: lanes shuffle with a mask that excludes them.
template <bool kBroken>
__global__ void shuffle_mask(const float* in, float* out, int) {
  const int i = int(threadIdx.x);
  const unsigned mask = kBroken ? 0x0000ffffu : 0xffffffffu;
  out[i] = __shfl_xor_sync(mask, in[i], 1);
}

// Broken: lanes read what other lanes of the warp wrote, without __syncwarp.
template <bool kBroken>
__global__ void warp_exchange(const float* in, float* out, int) {
  SEGATTN_DYNAMIC_SHARED(float, tile);
  const int i = int(threadIdx.x);
  tile[i] = in[i];
  if constexpr (!kBroken)
    __syncwarp();
  out[i] = tile[i ^ 5];
}

// Broken: a shuffle instead of __syncwarp. The lanes meet, but their memory accesses are not ordered.
template <bool kBroken>
__global__ void warp_exchange_by_shuffle(const float* in, float* out, int) {
  SEGATTN_DYNAMIC_SHARED(float, tile);
  const int i = int(threadIdx.x);
  tile[i] = in[i];
  if constexpr (kBroken) {
    __shfl_sync(0xffffffffu, 0, 0);
  } else {
    __syncwarp();
  }
  out[i] = tile[i ^ 5];
}

// Broken: every block writes the same elements.
template <bool kBroken>
__global__ void block_overlap(const float* in, float* out, int) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  out[kBroken ? int(threadIdx.x) : i] = in[i];
}

// Broken: a block reads what another block of the same launch wrote.
template <bool kBroken>
__global__ void block_reads_other(const float* in, float* out, int) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x), size = int(gridDim.x * blockDim.x);
  out[i] = in[i];
  out[size + i] = kBroken ? out[(i + int(blockDim.x)) % size] : out[i];
}

// Broken: threads of one block pass values through global memory without a barrier.
template <bool kBroken>
__global__ void global_exchange(const float* in, float* out, int size) {
  const int i = int(threadIdx.x);
  out[i] = in[i];
  if constexpr (!kBroken)
    __syncthreads();
  out[size + i] = out[size - 1 - i];
}

// Broken: a float4 load from an address that is no multiple of 16.
template <bool kBroken>
__global__ void misaligned(const float* in, float* out, int) {
  const int i = int(threadIdx.x);
  const float4 four = *reinterpret_cast<const float4*>(in + 4 * i + (kBroken ? 1 : 0));
  out[i] = four.x + four.y + four.z + four.w;
}

// Broken: the source of a 16-byte asynchronous copy is no multiple of 16.
template <bool kBroken>
__global__ void misaligned_async(const float* in, float* out, int) {
  SEGATTN_DYNAMIC_SHARED(float, tile);
  const int i = int(threadIdx.x);
  ptx::cp_async_16(tile + 4 * i, in + 4 * i + (kBroken ? 1 : 0), 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  out[i] = tile[4 * i];
}

// Broken: matrix rows that do not start on 16 bytes.
template <bool kBroken>
__global__ void misaligned_matrix(const float* in, float* out, int) {
  SEGATTN_DYNAMIC_SHARED(float, tile);
  const int i = int(threadIdx.x);
  for (int k = i; k < 16 * 32; k += 32)
    tile[k] = in[k];
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, tile + 4 * i + (kBroken ? 2 : 0));
  out[i] = __uint_as_float(r[0]);
}

// Broken: the asynchronous copy ends beyond the requested shared memory.
template <bool kBroken>
__global__ void async_bounds(const float* in, float* out, int) {
  SEGATTN_DYNAMIC_SHARED(float, tile);
  const int i = int(threadIdx.x);
  ptx::cp_async_16(tile + 4 * i + (kBroken ? 4 : 0), in + 4 * i, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  out[i] = kBroken ? 0 : tile[4 * i];
}

// Broken: an index beyond a register array.
template <bool kBroken>
__global__ void register_bounds(const float* in, float* out, int size) {
  const int i = int(threadIdx.x);
  float values[4] = {in[i], 1, 2, 3};
  out[i] = values[kBroken ? size / 32 : size % 2];
}

// Broken: only some elements of the output are written.
template <bool kBroken>
__global__ void incomplete_output(const float* in, float* out, int size) {
  const int i = int(threadIdx.x);
  if (i < (kBroken ? size - 1 : size))
    out[i] = in[i];
}

__device__ uint32_t pack(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// out (16 x 8) = a (16 x 16, row-major) b (16 x 8, row-major), a before b in `in`. Broken: two of a's registers
// swapped.
template <bool kBroken>
__global__ void lane_mapping(const float* in, float* out, int) {
  const float *a = in, *b = in + 256;
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) {
    const int row = g + (kBroken ? i / 2 : i % 2) * 8, column = 2 * t + (kBroken ? i % 2 : i / 2) * 8;
    fa[i] = pack(a[row * 16 + column], a[row * 16 + column + 1]);
  }
  for (int i = 0; i < 2; ++i)
    fb[i] = pack(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
  float d[4] = {0, 0, 0, 0};
  ptx::mma_m16n8k16<__half>(d, fa, fb);
  for (int i = 0; i < 4; ++i)
    out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

template <class Kernel>
void launch(Kernel kernel, const char* name, dim3 grid, dim3 block, size_t shared_bytes, const Buffers& b) {
  launch_kernel(kernel, name, grid, block, shared_bytes, nullptr, b.in, b.out, b.size);
}

#define SEGATTN_SELFTEST(kernel, grid, block, shared_floats)                                       \
  Case {                                                                                           \
    #kernel, [](bool broken, const Buffers& b) {                                                   \
      launch(broken ? kernel<true> : kernel<false>, #kernel, grid, block, 4 * (shared_floats), b); \
    }                                                                                              \
  }

}  // namespace

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      SEGATTN_SELFTEST(reverse, 1, kThreads, b.size),
      SEGATTN_SELFTEST(reverse_static, b.size / kThreads, kThreads, 0),
      SEGATTN_SELFTEST(half_written_word, 1, b.size, b.size / 2),
      SEGATTN_SELFTEST(unwritten_matrix_row, 1, 32, 4 * 32),
      SEGATTN_SELFTEST(shared_bounds, 1, b.size, b.size),
      SEGATTN_SELFTEST(global_bounds, (b.size + 31) / 32, 32, 0),
      SEGATTN_SELFTEST(async_copy, 1, b.size / 4, b.size),
      SEGATTN_SELFTEST(async_refill, 1, b.size / 8, b.size / 2),
      SEGATTN_SELFTEST(async_groups, 1, b.size / 8, b.size),
      SEGATTN_SELFTEST(deadlock, 1, kThreads, 0),
      SEGATTN_SELFTEST(divergent_barrier, 1, kThreads, 0),
      SEGATTN_SELFTEST(partial_warp, 1, kThreads, 0),
      SEGATTN_SELFTEST(divergent_mma, 1, kThreads, 0),
      SEGATTN_SELFTEST(shuffle_mask, 1, kThreads, 0),
      SEGATTN_SELFTEST(warp_exchange, 1, kThreads, kThreads),
      SEGATTN_SELFTEST(warp_exchange_by_shuffle, 1, kThreads, kThreads),
      SEGATTN_SELFTEST(block_overlap, b.size / 32, 32, 0),
      SEGATTN_SELFTEST(block_reads_other, b.size / 32, 32, 0),
      SEGATTN_SELFTEST(global_exchange, 1, b.size, 0),
      SEGATTN_SELFTEST(misaligned, 1, 32, 0),
      SEGATTN_SELFTEST(misaligned_async, 1, 32, 128),
      SEGATTN_SELFTEST(misaligned_matrix, 1, 32, 16 * 32),
      SEGATTN_SELFTEST(async_bounds, 1, 32, 128),
      SEGATTN_SELFTEST(lane_mapping, 1, 32, 0),
      SEGATTN_SELFTEST(register_bounds, 1, b.size, 0),
      SEGATTN_SELFTEST(incomplete_output, 1, b.size, 0),
  };
  return all;
}

}  // namespace segattn::selftest
