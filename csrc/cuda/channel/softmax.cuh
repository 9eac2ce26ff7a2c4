// Channel attention: the softmax and other passes over the C x K matrices. A block of the softmax has one row.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/channel/params.h"
#include "cuda/common/element.cuh"
#include "cuda/common/launch.cuh"

namespace segattn::cuda {

constexpr int kChannelThreads = 256;

// Whether the weights include the residual, see with_gamma.
template <class T>
constexpr bool kResidualInWeights = sizeof(T) == 2;

struct Maximum {
  template <class Real>
  __device__ __forceinline__ Real operator()(Real a, Real b) const {
    return fmax(a, b);
  }
};
struct Addition {
  template <class Real>
  __device__ __forceinline__ Real operator()(Real a, Real b) const {
    return a + b;
  }
};

// Reduces the values of all threads in a fixed order; every thread receives the result. `identity`: of the reduction.
template <class Real, class Reduction>
__device__ __forceinline__ Real reduce_block(Real value, Real identity, const Reduction& reduce) {
  __shared__ Real partials[kChannelThreads / 32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = reduce(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  __syncthreads();  // the last call's partials have been read
  if (lane == 0) {
    partials[warp] = value;
  }
  __syncthreads();
  value = identity;
#pragma unroll
  for (int w = 0; w < kChannelThreads / 32; ++w) {
    value = reduce(value, partials[w]);
  }
  return value;
}

// Adds the splits in order, stores the sum to values[0] and returns it. Only the same thread reads values[0] later.
template <class Real>
__device__ __forceinline__ Real add_splits(Real* values, int64_t split_stride, int splits) {
  Real sum = values[0];
  for (int s = 1; s < splits; ++s) {
    sum += values[s * split_stride];
  }
  if (splits > 1) {
    values[0] = sum;
  }
  return sum;
}

// The softmax of a row, which recomputes each weight from its product.
template <class Real>
struct RowSoftmax {
  Real* products;
  Real scale, max_energy, sum;

  // Adds the row's splits in order.
  __device__ __forceinline__ RowSoftmax(Real* row, int keys, double scale_, int64_t split_stride, int splits)
      : products(row), scale(static_cast<Real>(scale_)) {
    const Real lowest = -static_cast<Real>(INFINITY);
    max_energy = lowest;
    for (int k = static_cast<int>(threadIdx.x); k < keys; k += kChannelThreads) {
      max_energy = fmax(max_energy, scale * add_splits(products + k, split_stride, splits));
    }
    max_energy = reduce_block(max_energy, lowest, Maximum());
    sum = 0;
    for (int k = static_cast<int>(threadIdx.x); k < keys; k += kChannelThreads) {
      sum += exp(scale * products[k] - max_energy);
    }
    sum = reduce_block(sum, Real(0), Addition());
  }

  __device__ __forceinline__ Real weight(int k) const { return exp(scale * products[k] - max_energy) / sum; }
};

// gamma * weight, or the weight itself without gamma. For 16-bit types the diagonal also gets + 1: the product with the
// input then is gamma * attention + input at no cost, and rounding the weights costs no more than rounding the result.
// Wider types would lose digits: their sums would round at the magnitude of the input (measured: 10 times eager's
// error).
template <class T>
__device__ __forceinline__ Accumulator<T> with_gamma(
    Accumulator<T> weight, const void* gamma, int64_t row, int keys, int k) {
  using Real = Accumulator<T>;
  if (gamma == nullptr) {
    return weight;
  }
  const Real product = static_cast<const Real*>(gamma)[row] * weight;
  return kResidualInWeights<T> && row % keys == k ? product + Real(1) : product;
}

template <class Real>
__global__ void __launch_bounds__(kChannelThreads) sum_splits_kernel(const SumSplitsParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kChannelThreads + threadIdx.x;
  if (i < p.elements) {
    Real sum = p.products[i];
    for (int s = 1; s < p.splits; ++s) {
      sum += p.products[s * p.elements + i];
    }
    p.result[i] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kChannelThreads) channel_softmax_kernel(const ChannelSoftmaxParams p) {
  using Real = Accumulator<T>;
  const int64_t row = blockIdx.x;
  const RowSoftmax<Real> softmax(
      static_cast<Real*>(p.products) + row * p.keys, p.keys, p.scale, p.split_stride, p.splits);
  T* weights = static_cast<T*>(p.weights) + row * p.keys;
  for (int k = static_cast<int>(threadIdx.x); k < p.keys; k += kChannelThreads) {
    weights[k] = from_accumulator<T>(with_gamma<T>(softmax.weight(k), p.gamma, row, p.keys, k));
  }
  if (threadIdx.x == 0) {
    static_cast<Real*>(p.logsumexp)[row] = softmax.max_energy + log(softmax.sum);
  }
}

// Recomputes the row's maximum and sum instead of reading logsumexp: CAM's energies are in the thousands, where
// rounding logsumexp to float32 would change every weight by 2.4e-4 of its value.
template <class T>
__global__ void __launch_bounds__(kChannelThreads)
    channel_softmax_backward_kernel(const ChannelSoftmaxBackwardParams p) {
  using Real = Accumulator<T>;
  const int64_t row = blockIdx.x;
  const RowSoftmax<Real> softmax(
      static_cast<Real*>(p.products) + row * p.keys, p.keys, p.scale, p.split_stride, p.product_splits);
  Real* gradients = static_cast<Real*>(p.grad_weights) + row * p.keys;
  T* weights = static_cast<T*>(p.weights) + row * p.pitch;
  Real partial = 0;
  for (int k = static_cast<int>(threadIdx.x); k < p.keys; k += kChannelThreads) {
    const Real weight = softmax.weight(k);
    weights[k] = from_accumulator<T>(with_gamma<T>(weight, p.gamma, row, p.keys, k));
    partial += weight * add_splits(gradients + k, p.split_stride, p.grad_splits);
  }
  const Real delta = reduce_block(partial, Real(0), Addition());
  if (threadIdx.x == 0 && p.grad_gamma != nullptr) {
    static_cast<Real*>(p.grad_gamma)[row] = delta;
  }
  const Real factor = softmax.scale * (p.gamma == nullptr ? Real(1) : static_cast<const Real*>(p.gamma)[row]);
  for (int k = static_cast<int>(threadIdx.x); k < p.keys; k += kChannelThreads) {
    const Real gradient = factor * softmax.weight(k) * (gradients[k] - delta);
    if (p.grad_products != nullptr) {
      static_cast<T*>(p.grad_products)[row * p.pitch + k] = from_accumulator<T>(gradient);
    } else {
      gradients[k] = gradient;
    }
  }
}

// A block has one row. A row of zeros, and one that is not finite, has the factor 1.
template <class T>
__global__ void __launch_bounds__(kChannelThreads) normalise_rows_kernel(const NormaliseRowsParams p) {
  const int64_t row = blockIdx.x;
  const float* matrix = p.matrix + row * p.columns;
  T* result = static_cast<T*>(p.result) + row * p.columns;
  float sum = 0;
  for (int k = static_cast<int>(threadIdx.x); k < p.columns; k += kChannelThreads) {
    sum += fabsf(matrix[k]);
  }
  sum = reduce_block(sum, 0.0f, Addition());
  int exponent = 0;
  if (sum > 0 && sum < INFINITY) {
    frexpf(sum, &exponent);
    exponent = max(exponent, -126);  // the factor is a normal number
  }
  for (int k = static_cast<int>(threadIdx.x); k < p.columns; k += kChannelThreads) {
    result[k] = from_accumulator<T>(ldexpf(matrix[k], -exponent));
  }
  if (threadIdx.x == 0) {
    p.factors[row] = ldexpf(1.0f, exponent);
  }
}

template <class T>
__global__ void __launch_bounds__(kChannelThreads) scale_rows_kernel(const ScaleRowsParams p) {
  const int64_t row = blockIdx.x / p.row_blocks;
  const int n = static_cast<int>(blockIdx.x % p.row_blocks) * kChannelThreads + static_cast<int>(threadIdx.x);
  if (n < p.positions) {
    T* target = static_cast<T*>(p.target) + row * p.positions + n;
    *target = from_accumulator<T>(to_accumulator(*target) * p.factors[row]);
  }
}

constexpr int kSymmetriseTile = 32;
constexpr int kSymmetriseRows = 8;  // of threads

template <class T>
__global__ void __launch_bounds__(kSymmetriseTile* kSymmetriseRows) symmetrise_kernel(const SymmetriseParams p) {
  using Real = Accumulator<T>;
  __shared__ Real mirrored[kSymmetriseTile][kSymmetriseTile + 1];
  int64_t block = blockIdx.x;
  const int first_column = static_cast<int>(block % p.tiles) * kSymmetriseTile;
  block /= p.tiles;
  const int first_row = static_cast<int>(block % p.tiles) * kSymmetriseTile;
  const int64_t sample = block / p.tiles, channels = p.channels;
  const Real* matrix = static_cast<const Real*>(p.matrix) + sample * channels * channels;
  T* result = static_cast<T*>(p.result) + sample * channels * p.pitch;
  const int x = static_cast<int>(threadIdx.x) % kSymmetriseTile;
  for (int y = static_cast<int>(threadIdx.x) / kSymmetriseTile; y < kSymmetriseTile; y += kSymmetriseRows) {
    const int row = first_column + y, column = first_row + x;
    mirrored[y][x] = row < channels && column < channels ? matrix[row * channels + column] : Real(0);
  }
  __syncthreads();
  for (int y = static_cast<int>(threadIdx.x) / kSymmetriseTile; y < kSymmetriseTile; y += kSymmetriseRows) {
    const int row = first_row + y, column = first_column + x;
    if (row < channels && column < channels) {
      result[static_cast<int64_t>(row) * p.pitch + column] =
          from_accumulator<T>(matrix[row * channels + column] + mirrored[x][y]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kChannelThreads) add_kernel(const AddParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kChannelThreads + threadIdx.x;
  if (i < p.elements) {
    T* target = static_cast<T*>(p.target) + i;
    Accumulator<T> sum = to_accumulator(*target) + to_accumulator(static_cast<const T*>(p.first)[i]);
    if (p.second != nullptr) {
      sum += to_accumulator(static_cast<const T*>(p.second)[i]);
    }
    *target = from_accumulator<T>(sum);
  }
}

}  // namespace segattn::cuda
