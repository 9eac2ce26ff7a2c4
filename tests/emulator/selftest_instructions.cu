// Single instructions on the test's data: tensor-core fragments, matrix loads, shuffles, memory access patterns.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "selftest.h"

namespace segattn::selftest {

namespace ptx = cuda::ptx;
using cuda::launch_kernel;

namespace {

struct Fragments {
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
};

__device__ Fragments load_fragments(const float* in, int lane) {
  Fragments f;
  for (int i = 0; i < 4; ++i)
    f.a[i] = __float_as_uint(in[4 * lane + i]);
  for (int i = 0; i < 2; ++i)
    f.b[i] = __float_as_uint(in[128 + 2 * lane + i]);
  for (int i = 0; i < 4; ++i)
    f.d[i] = in[192 + 4 * lane + i];
  return f;
}

// in: registers a [32][4], b [32][2], c [32][4]; out: d [32][4]
template <class T>
__global__ void mma_16bit(const float* in, float* out, int) {
  const int lane = int(threadIdx.x);
  Fragments f = load_fragments(in, lane);
  ptx::mma_m16n8k16<T>(f.d, f.a, f.b);
  for (int i = 0; i < 4; ++i)
    out[4 * lane + i] = f.d[i];
}

__global__ void mma_tf32(const float* in, float* out, int) {
  const int lane = int(threadIdx.x);
  Fragments f = load_fragments(in, lane);
  ptx::mma_m16n8k8_tf32(f.d, f.a, f.b);
  for (int i = 0; i < 4; ++i)
    out[4 * lane + i] = f.d[i];
}

// in: four matrices, 32 rows of 8 16-bit elements; out: registers [32][4]
template <bool kTransposed>
__global__ void load_matrix(const float* in, float* out, int) {
  SEGATTN_DYNAMIC_SHARED(float, rows);
  const int lane = int(threadIdx.x);
  for (int i = 0; i < 4; ++i)
    rows[4 * lane + i] = in[4 * lane + i];
  __syncwarp();
  uint32_t r[4];
  if constexpr (kTransposed) {
    ptx::ldmatrix_x4_trans(r, rows + 4 * lane);
  } else {
    ptx::ldmatrix_x4(r, rows + 4 * lane);
  }
  for (int i = 0; i < 4; ++i)
    out[4 * lane + i] = __uint_as_float(r[i]);
}

// out: for each lane the results of 4 shuffles (index, up, down, xor) by 3 within segments of `size` lanes, then
// ballot, any and all of "in > 0"
__global__ void warp_functions(const float* in, float* out, int size) {
  const unsigned all = 0xffffffffu;
  const int lane = int(threadIdx.x);
  const float x = in[lane];
  float* row = out + 7 * lane;
  row[0] = __shfl_sync(all, x, 3, size);
  row[1] = __shfl_up_sync(all, x, 3, size);
  row[2] = __shfl_down_sync(all, x, 3, size);
  row[3] = __shfl_xor_sync(all, x, 3, size);
  row[4] = __uint_as_float(__ballot_sync(all, x > 0));
  row[5] = float(__any_sync(all, x > 0));
  row[6] = float(__all_sync(all, x > 0));
}

// The two halves of each warp shuffle separately; then the block counts at barriers.
__global__ void masks_and_counts(const float* in, float* out, int size) {
  const int i = int(threadIdx.x), lane = i % 32;
  float x = in[i];
  if (lane < 16) {
    x += __shfl_xor_sync(0x0000ffffu, x, 8);
  } else {
    x += __shfl_xor_sync(0xffff0000u, x, 1);
    __syncwarp(0xffff0000u);
  }
  out[i] = x;
  const int positive = __syncthreads_count(in[i] > 0);
  const int some = __syncthreads_or(in[i] > 0), every = __syncthreads_and(in[i] > 0);
  out[size + i] = float(positive * 4 + (some != 0) * 2 + (every != 0));
}

// The flat number of each thread of a three-dimensional grid of three-dimensional blocks
__global__ void coordinates(const float*, float* out, int) {
  const int block = int((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x);
  const int thread = int((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
  const int i = block * int(blockDim.x * blockDim.y * blockDim.z) + thread;
  out[i] = float(i);
}

// One block of one warp: reads in[size * lane], writes out[lane]
__global__ void global_stride(const float* in, float* out, int size) {
  out[threadIdx.x] = in[size * int(threadIdx.x)];
}

// Reads in[lane + size]
__global__ void global_offset(const float* in, float* out, int size) {
  out[threadIdx.x] = in[int(threadIdx.x) + size];
}

__global__ void global_vector(const float* in, float* out, int) {
  reinterpret_cast<float4*>(out)[threadIdx.x] = reinterpret_cast<const float4*>(in)[threadIdx.x];
}

__global__ void global_half(const float* in, float* out, int) {
  reinterpret_cast<__half*>(out)[threadIdx.x] = reinterpret_cast<const __half*>(in)[threadIdx.x];
}

// Only the first `size` lanes take part
__global__ void global_partial(const float* in, float* out, int size) {
  if (int(threadIdx.x) < size)
    out[threadIdx.x] = in[threadIdx.x];
}

// Each lane reads `size` elements, a warp's width apart, without synchronization between the warp instructions
__global__ void global_loop(const float* in, float* out, int size) {
  float sum = 0;
  for (int i = int(threadIdx.x); i < 32 * size; i += 32)
    sum += in[i];
  out[threadIdx.x] = sum;
}

// Writes tile[size * lane], reads tile[size * lane]
__global__ void shared_stride(const float* in, float* out, int size) {
  SEGATTN_DYNAMIC_SHARED(float, tile);
  const int i = size * int(threadIdx.x);
  tile[i] = in[0];
  __syncwarp();
  out[threadIdx.x] = tile[i];
}

// Every `size` neighbouring lanes read the same element
__global__ void shared_broadcast(const float* in, float* out, int size) {
  SEGATTN_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = tile[int(threadIdx.x) / size];
}

// Reads float4 number size * lane
__global__ void shared_vector(const float*, float* out, int size) {
  SEGATTN_DYNAMIC_SHARED(float4, tile);
  tile[size * int(threadIdx.x)] = make_float4(1, 2, 3, 4);
  const float4 four = tile[size * int(threadIdx.x)];
  reinterpret_cast<float4*>(out)[threadIdx.x] = four;
}

// Matrix rows of 16 bytes, `size` times 16 bytes apart
__global__ void matrix_stride(const float*, float* out, int size) {
  SEGATTN_DYNAMIC_SHARED(float4, tile);
  tile[size * int(threadIdx.x)] = make_float4(1, 2, 3, 4);
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, tile + size * int(threadIdx.x));
  out[threadIdx.x] = __uint_as_float(r[0]);
}

// Copies `size` of 16 bytes per lane, source and destination contiguous
__global__ void async_partial(const float* in, float* out, int size) {
  SEGATTN_DYNAMIC_SHARED(float, tile);
  const int i = 4 * int(threadIdx.x);
  ptx::cp_async_16(tile + i, in + i, size);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int k = 0; k < 4; ++k)
    out[i + k] = tile[i + k];
}

// Two warps: `size` of each operation, for the counters
__global__ void operations(const float* in, float* out, int size) {
  float x = in[threadIdx.x];
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  for (int i = 0; i < size; ++i) {
    ptx::mma_m16n8k16<__half>(d, a, b);
    ptx::mma_m16n8k16<__nv_bfloat16>(d, a, b);
    ptx::mma_m16n8k8_tf32(d, a, b);
    x = __fmaf_rn(x, 2.0f, d[0]);
    __syncthreads();
    __syncwarp();
    x = __shfl_sync(0xffffffffu, x, 0);
  }
  out[threadIdx.x] = x;
}

// Requests `size` bytes of dynamic shared memory and uses the last one
__global__ void shared_limit(const float*, float* out, int size) {
  SEGATTN_DYNAMIC_SHARED(unsigned char, bytes);
  bytes[size - 1] = 7;
  out[0] = float(bytes[size - 1]);
}

using Kernel = void (*)(const float*, float*, int);

std::function<void(bool, const Buffers&)> on_one_warp(Kernel kernel, const char* name, size_t shared_bytes = 0) {
  return
      [=](bool, const Buffers& b) { launch_kernel(kernel, name, 1, 32, shared_bytes, nullptr, b.in, b.out, b.size); };
}

}  // namespace

const std::vector<Case>& instructions() {
  constexpr size_t kRows = 32 * 16, kTile = 32 * 1024;
  static const std::vector<Case> all = {
      {"mma_float16", on_one_warp(mma_16bit<__half>, "mma_16bit")},
      {"mma_bfloat16", on_one_warp(mma_16bit<__nv_bfloat16>, "mma_16bit")},
      {"mma_tf32", on_one_warp(mma_tf32, "mma_tf32")},
      {"ldmatrix_x4", on_one_warp(load_matrix<false>, "load_matrix", kRows)},
      {"ldmatrix_x4_trans", on_one_warp(load_matrix<true>, "load_matrix", kRows)},
      {"warp_functions", on_one_warp(warp_functions, "warp_functions")},
      {"masks_and_counts",
       [](bool, const Buffers& b) {
         launch_kernel(masks_and_counts, "masks_and_counts", 1, unsigned(b.size), 0, nullptr, b.in, b.out, b.size);
       }},
      {"coordinates",
       [](bool, const Buffers& b) {
         launch_kernel(coordinates, "coordinates", dim3(2, 3, 4), dim3(5, 2, 3), 0, nullptr, b.in, b.out, b.size);
       }},
      {"global_stride", on_one_warp(global_stride, "global_stride")},
      {"global_offset", on_one_warp(global_offset, "global_offset")},
      {"global_vector", on_one_warp(global_vector, "global_vector")},
      {"global_half", on_one_warp(global_half, "global_half")},
      {"global_partial", on_one_warp(global_partial, "global_partial")},
      {"global_loop", on_one_warp(global_loop, "global_loop")},
      {"shared_stride", on_one_warp(shared_stride, "shared_stride", kTile)},
      {"shared_broadcast", on_one_warp(shared_broadcast, "shared_broadcast", kTile)},
      {"shared_vector", on_one_warp(shared_vector, "shared_vector", kTile)},
      {"matrix_stride", on_one_warp(matrix_stride, "matrix_stride", kTile)},
      {"async_partial", on_one_warp(async_partial, "async_partial", kRows)},
      {"operations",
       [](bool, const Buffers& b) { launch_kernel(operations, "operations", 1, 64, 0, nullptr, b.in, b.out, b.size); }},
      {"shared_limit",
       [](bool, const Buffers& b) {
         launch_kernel(shared_limit, "shared_limit", 1, 1, size_t(b.size), nullptr, b.in, b.out, b.size);
       }},
      // Launches that a GPU rejects when `size` exceeds a limit.
      {"block_threads",
       [](bool, const Buffers& b) {
         launch_kernel(coordinates, "coordinates", 1, unsigned(b.size), 0, nullptr, b.in, b.out, b.size);
       }},
      {"grid_y",
       [](bool, const Buffers& b) {
         launch_kernel(global_partial, "global_partial", dim3(1, unsigned(b.size)), 1, 0, nullptr, b.in, b.out, 0);
       }},
      {"grid_z",
       [](bool, const Buffers& b) {
         launch_kernel(global_partial, "global_partial", dim3(1, 1, unsigned(b.size)), 1, 0, nullptr, b.in, b.out, 0);
       }},
  };
  return all;
}

}  // namespace segattn::selftest
