// Key padding: moves the keys that take part to the front of each sample, so that the kernels leave out the others by
// their loop bound (Keys::kKept). Padded keys and values are never read, so NaN and inf stay there. The order of the
// kept keys is unchanged.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/math.h"
#include "cuda/position/params.h"

namespace segattn::cuda {

constexpr int kSlotThreads = 1024;

struct KeySlotsParams {
  const bool* padding;  // (B, M)
  int* slots;           // (B, M): the key's place among the kept ones, -1 for padding
  int* counts;          // (B): kept keys
  int keys;             // M
};

// A block numbers the keys of one sample, a key a thread at a time.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) key_slots_kernel(const KeySlotsParams p) {
  constexpr int kWarps = kThreads / 32;
  __shared__ int kept_before[2][kWarps + 1];  // in the warps before; the last: in all warps
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.keys;
  int count = 0;  // in the chunks before
  for (int chunk = 0; chunk < ceil_div(p.keys, kThreads); ++chunk) {
    const int64_t key = static_cast<int64_t>(chunk) * kThreads + threadIdx.x;
    const bool kept = key < p.keys && !p.padding[first + key];
    const unsigned lanes = __ballot_sync(0xffffffffu, kept);
    int* before = kept_before[chunk % 2];  // two, so that the next chunk need not wait for the reads of this one
    if (lane == 0) {
      before[warp] = __popc(lanes);
    }
    __syncthreads();
    if (warp == 0) {
      const int own = lane < kWarps ? before[lane] : 0;
      int sum = own;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, distance);
        sum += lane >= distance ? other : 0;
      }
      if (lane < kWarps) {
        before[lane] = sum - own;
      }
      if (lane == kWarps - 1) {
        before[kWarps] = sum;
      }
    }
    __syncthreads();
    if (key < p.keys) {
      p.slots[first + key] = kept ? count + before[warp] + __popc(lanes & ((1u << lane) - 1)) : -1;
    }
    count += before[kWarps];
  }
  if (threadIdx.x == 0) {
    p.counts[blockIdx.x] = count;
  }
}

// Rows of keys (B, rows, M) and of kept keys (B, rows, pitch), of which sample b uses the first counts[b].
struct KeptRowsParams {
  void* all;
  void* kept;
  const int* slots;   // (B, M)
  const int* counts;  // (B)
  int64_t all_batch_stride;
  int64_t all_row_stride;
  int64_t kept_batch_stride;
  int64_t kept_row_stride;
  int rows;
  int keys;           // M
  int pitch;          // at least M
  int column_blocks;  // of kKeptThreads
  int row_blocks;     // of kKeptRows
};

constexpr int kKeptThreads = 256;
constexpr int kKeptRows = 16;  // of a thread, which reads its slot once

// visit(sample, column, first row, end row) for this thread
template <class Visit>
__device__ __forceinline__ void for_kept_rows(const KeptRowsParams& p, const Visit& visit) {
  int64_t block = blockIdx.x;
  const int64_t column = block % p.column_blocks * kKeptThreads + threadIdx.x;
  block /= p.column_blocks;
  const int first_row = static_cast<int>(block % p.row_blocks) * kKeptRows;
  visit(block / p.row_blocks, column, first_row, min(first_row + kKeptRows, p.rows));
}

// kept[b, r, slots[b, j]] = all[b, r, j]; zeros from counts[b] on
template <class T>
__global__ void __launch_bounds__(kKeptThreads) gather_kept_kernel(const KeptRowsParams p) {
  for_kept_rows(p, [&](int64_t sample, int64_t column, int first_row, int end_row) {
    const T* all = static_cast<const T*>(p.all) + sample * p.all_batch_stride + column;
    T* kept = static_cast<T*>(p.kept) + sample * p.kept_batch_stride;
    const int slot = column < p.keys ? p.slots[sample * p.keys + column] : -1;
    const bool unused = column < p.pitch && column >= p.counts[sample];
    for (int row = first_row; row < end_row; ++row) {
      if (slot >= 0) {
        kept[row * p.kept_row_stride + slot] = all[row * p.all_row_stride];
      }
      if (unused) {
        kept[row * p.kept_row_stride + column] = from_accumulator<T>(0);
      }
    }
  });
}

// all[b, r, j] = kept[b, r, slots[b, j]], 0 for padding
template <class T>
__global__ void __launch_bounds__(kKeptThreads) scatter_kept_kernel(const KeptRowsParams p) {
  for_kept_rows(p, [&](int64_t sample, int64_t column, int first_row, int end_row) {
    if (column >= p.keys) {
      return;
    }
    T* all = static_cast<T*>(p.all) + sample * p.all_batch_stride + column;
    const int slot = p.slots[sample * p.keys + column];
    const T* kept = static_cast<const T*>(p.kept) + sample * p.kept_batch_stride + slot;
    for (int row = first_row; row < end_row; ++row) {
      all[row * p.all_row_stride] = slot >= 0 ? kept[row * p.kept_row_stride] : from_accumulator<T>(0);
    }
  });
}

}  // namespace segattn::cuda
