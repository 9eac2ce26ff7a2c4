// Elementwise and reduction passes over feature maps that several op families share: copies to aligned rows, delta, and
// the sum of partial results.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/operand.h"

namespace segattn::cuda {

constexpr int kRowThreads = 256;

// (rows, columns) with any row stride -> (rows, columns) with rows of `padded` elements, 16-byte aligned. The padding
// is written too, as zeros. 97 x 97 positions in 16 bits make rows of 18,818 bytes, of which cp.async could take but 2.
struct PackParams {
  const void* source;  // (batch, rows, columns), row r of sample b at b * batch_stride + r * row_stride
  void* target;        // (batch, rows, padded), contiguous
  int64_t batch_stride;
  int64_t row_stride;
  int64_t rows_total;  // batch * rows
  int rows;
  int columns;
  int padded;  // a multiple of 16 bytes
  int row_blocks;
};

// A thread makes one 16-byte piece of a row: loads of its elements are neighbours in a warp, the store is one.
template <class T>
__global__ void __launch_bounds__(kRowThreads) pack_rows_kernel(const PackParams p) {
  constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
  const int64_t row = blockIdx.x / p.row_blocks;
  const int first =
      (static_cast<int>(blockIdx.x % p.row_blocks) * kRowThreads + static_cast<int>(threadIdx.x)) * kPiece;
  if (first >= p.padded) {
    return;
  }
  const T* from = static_cast<const T*>(p.source) + row / p.rows * p.batch_stride + row % p.rows * p.row_stride;
  alignas(16) T piece[kPiece];
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    piece[i] = first + i < p.columns ? from[first + i] : from_accumulator<T>(0);
  }
  *reinterpret_cast<uint4*>(static_cast<T*>(p.target) + row * p.padded + first) =
      *reinterpret_cast<const uint4*>(piece);
}

// delta[b, i] = sum_c grad_output[b, c, i] output[b, c, i], of the output before it was rounded where that is known
struct DeltaParams {
  Operand grad_output;  // (B, C, N)
  Operand output;       // (B, C, N)
  Operand output_low;   // (B, C, N), what rounding took from the output; data null: unknown
  void* delta;          // (B, N), accumulator type
  int channels;
  int positions;
  int position_blocks;
};

// 32 positions a block, every eighth channel a warp: a warp's loads are neighbours.
template <class T>
__global__ void __launch_bounds__(kRowThreads) delta_kernel(const DeltaParams p) {
  using Real = Accumulator<T>;
  constexpr int kWarps = kRowThreads / 32;
  __shared__ Real shares[kWarps][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t sample = blockIdx.x / p.position_blocks;
  const int position = static_cast<int>(blockIdx.x % p.position_blocks) * 32 + lane;
  Real sum = 0;
  if (position < p.positions) {
    const T* grad = static_cast<const T*>(p.grad_output.data) + sample * p.grad_output.batch_stride + position;
    const T* out = static_cast<const T*>(p.output.data) + sample * p.output.batch_stride + position;
#pragma unroll 4
    for (int c = warp; c < p.channels; c += kWarps) {
      sum += to_accumulator(grad[c * p.grad_output.row_stride]) * to_accumulator(out[c * p.output.row_stride]);
    }
    if (p.output_low.data != nullptr) {
      const T* low = static_cast<const T*>(p.output_low.data) + sample * p.output_low.batch_stride + position;
#pragma unroll 4
      for (int c = warp; c < p.channels; c += kWarps) {
        sum += to_accumulator(grad[c * p.grad_output.row_stride]) * to_accumulator(low[c * p.output_low.row_stride]);
      }
    }
  }
  shares[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && position < p.positions) {
    sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum += shares[w][lane];
    }
    static_cast<Real*>(p.delta)[sample * p.positions + position] = sum;
  }
}

// out[b, r, n] = factor * sum_s partial[s, b, r, n], s ascending; with mean_key
//   out[b, r, n] = factor * (sum_s partial[s, b, r, n] - sum_s mean_key[s, b, r, n] * sum_s grad_sum[s, b, n])
struct SumPartialsParams {
  const float* partials;  // (parts, batch * rows, padded)
  const float* mean_key;  // like partials, or null
  const float* grad_sum;  // (parts, batch, padded)
  void* output;           // (batch * rows, columns), contiguous
  int64_t part_stride;
  int64_t rows_total;  // batch * rows
  int rows;
  int parts;
  int columns;
  int padded;
  int row_blocks;
  float factor;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads) sum_partials_kernel(const SumPartialsParams p) {
  const int64_t row = blockIdx.x / p.row_blocks;
  const int column = static_cast<int>(blockIdx.x % p.row_blocks) * kRowThreads + static_cast<int>(threadIdx.x);
  if (column < p.columns) {
    const auto sum_over_parts = [&](const float* from, int64_t part_stride) {
      float sum = 0.0f;
      for (int s = 0; s < p.parts; ++s) {
        sum += from[s * part_stride];
      }
      return sum;
    };
    float sum = sum_over_parts(p.partials + row * p.padded + column, p.part_stride);
    if (p.mean_key != nullptr) {
      const int64_t sample = row / p.rows, samples = p.rows_total / p.rows;
      sum -= sum_over_parts(p.mean_key + row * p.padded + column, p.part_stride) *
          sum_over_parts(p.grad_sum + sample * p.padded + column, samples * p.padded);
    }
    static_cast<T*>(p.output)[row * p.columns + column] = from_accumulator<T>(sum * p.factor);
  }
}

}  // namespace segattn::cuda
