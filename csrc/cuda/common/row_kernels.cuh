// Elementwise and reduction passes over feature maps: copies to aligned rows, delta, and the sum of partial results.
// Several op families share them.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/operand.h"

namespace segattn::cuda {

constexpr int kRowThreads = 256;

// Copies (rows, columns) with any row stride to rows of `padded` elements, which start on 32 bytes. Writes zeros to the
// padding. Unpacked rows of 97 x 97 16-bit positions have 18,818 bytes, so they are aligned to 2 bytes only, too few
// for cp.async.
struct PackParams {
  const void* source;  // (batch, rows, columns), row r of sample b at b * batch_stride + r * row_stride
  void* target;        // (batch, rows, padded), contiguous
  int64_t batch_stride;
  int64_t row_stride;
  int64_t rows_total;  // batch * rows
  int rows;
  int columns;
  int padded;  // a multiple of 32 bytes
  int row_blocks;
};

// A thread copies one 16-byte chunk of a row: element-wise loads, adjacent within a warp, and a single store.
template <class T>
__global__ void __launch_bounds__(kRowThreads) pack_rows_kernel(const PackParams p) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  const int64_t row = blockIdx.x / p.row_blocks;
  const int first =
      (static_cast<int>(blockIdx.x % p.row_blocks) * kRowThreads + static_cast<int>(threadIdx.x)) * kChunk;
  if (first >= p.padded) {
    return;
  }
  const T* from = static_cast<const T*>(p.source) + row / p.rows * p.batch_stride + row % p.rows * p.row_stride;
  alignas(16) T chunk[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    chunk[i] = first + i < p.columns ? from[first + i] : from_accumulator<T>(0);
  }
  *reinterpret_cast<uint4*>(static_cast<T*>(p.target) + row * p.padded + first) =
      *reinterpret_cast<const uint4*>(chunk);
}

// delta[b, i] = sum_c grad_output[b, c, i] output[b, c, i], of the output before rounding where output_low is given.
// With grad_logsumexp, delta - grad_logsumexp: the gradients of the energies are P (dP - delta + grad_logsumexp), so
// the kernels that compute them need no other term.
struct DeltaParams {
  Operand grad_output;  // (B, C, N)
  Operand output;       // (B, C, N)
  Operand output_low;   // (B, C, N), rounding error of the output; data null: not given
  void* delta;          // (B, N), accumulator type
  int channels;
  int positions;
  int position_blocks;
  const void* grad_logsumexp;  // (B, N), accumulator type; or null
  bool rounds_to_tf32;         // grad_output, as the products of dP do
};

// A block has 32 positions and each of its warps every eighth channel, so that a warp's loads are adjacent.
template <class T>
__global__ void __launch_bounds__(kRowThreads) delta_kernel(const DeltaParams p) {
  using Real = Accumulator<T>;
  constexpr int kWarps = kRowThreads / 32;
  __shared__ Real partials[kWarps][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t sample = blockIdx.x / p.position_blocks;
  const int position = static_cast<int>(blockIdx.x % p.position_blocks) * 32 + lane;
  Real sum = 0;
  if (position < p.positions) {
    const T* grad = static_cast<const T*>(p.grad_output.data) + sample * p.grad_output.batch_stride + position;
    const T* out = static_cast<const T*>(p.output.data) + sample * p.output.batch_stride + position;
#pragma unroll 4
    for (int c = warp; c < p.channels; c += kWarps) {
      Real factor = to_accumulator(grad[c * p.grad_output.row_stride]);
      if constexpr (std::is_same_v<T, float>) {
        factor = p.rounds_to_tf32 ? round_to_tf32(factor) : factor;
      }
      sum += factor * to_accumulator(out[c * p.output.row_stride]);
    }
    if (p.output_low.data != nullptr) {
      const T* low = static_cast<const T*>(p.output_low.data) + sample * p.output_low.batch_stride + position;
#pragma unroll 4
      for (int c = warp; c < p.channels; c += kWarps) {
        sum += to_accumulator(grad[c * p.grad_output.row_stride]) * to_accumulator(low[c * p.output_low.row_stride]);
      }
    }
  }
  partials[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && position < p.positions) {
    sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum += partials[w][lane];
    }
    const int64_t query = sample * p.positions + position;
    if (p.grad_logsumexp != nullptr) {
      sum -= static_cast<const Real*>(p.grad_logsumexp)[query];
    }
    static_cast<Real*>(p.delta)[query] = sum;
  }
}

// shift = logsumexp, but inf where that is -inf: the weights exp(energy - shift) of a query whose energies are all -inf
// are 0, not NaN. Real: the accumulator type
template <class Real>
__global__ void __launch_bounds__(kRowThreads)
    weight_shift_kernel(const Real* logsumexp, Real* shift, const int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i < count) {
    shift[i] = logsumexp[i] == -INFINITY ? static_cast<Real>(INFINITY) : logsumexp[i];
  }
}

// out[b, r, n] = factor * sum_s partials[s, b, r, n], s ascending; with mean_key
//   out[b, r, n] = factor * (sum_s partials[s, b, r, n] - sum_s mean_key[s, b, r, n] * error[b, n])
//   error[b, n] = sum_s grad_sum[s, b, n] - grad_logsumexp[b, n]
struct SumPartialsParams {
  const float* partials;  // (partial_count, batch * rows, padded)
  const float* mean_key;  // like partials, or null
  const float* grad_sum;  // (partial_count, batch, padded)
  void* output;           // (batch * rows, columns), contiguous
  int64_t partial_stride;
  int64_t rows_total;  // batch * rows
  int rows;
  int partial_count;
  int columns;
  int padded;
  int row_blocks;
  float factor;
  const float* grad_logsumexp;  // (batch, columns); null: zeros
};

template <class T>
__global__ void __launch_bounds__(kRowThreads) sum_partials_kernel(const SumPartialsParams p) {
  const int64_t row = blockIdx.x / p.row_blocks;
  const int column = static_cast<int>(blockIdx.x % p.row_blocks) * kRowThreads + static_cast<int>(threadIdx.x);
  if (column < p.columns) {
    const auto sum_of_partials = [&](const float* from, int64_t stride) {
      float sum = 0.0f;
      for (int s = 0; s < p.partial_count; ++s) {
        sum += from[s * stride];
      }
      return sum;
    };
    float sum = sum_of_partials(p.partials + row * p.padded + column, p.partial_stride);
    if (p.mean_key != nullptr) {
      const int64_t sample = row / p.rows, samples = p.rows_total / p.rows;
      float error = sum_of_partials(p.grad_sum + sample * p.padded + column, samples * p.padded);
      if (p.grad_logsumexp != nullptr) {
        error -= p.grad_logsumexp[sample * p.columns + column];
      }
      sum -= sum_of_partials(p.mean_key + row * p.padded + column, p.partial_stride) * error;
    }
    static_cast<T*>(p.output)[row * p.columns + column] = from_accumulator<T>(sum * p.factor);
  }
}

}  // namespace segattn::cuda
