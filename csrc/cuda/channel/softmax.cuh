// Channel attention: the passes over the C x K maps. A block has one row of the map.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/channel/params.h"
#include "cuda/common/element.cuh"
#include "cuda/common/launch.cuh"

namespace segattn::cuda {

constexpr int kChannelThreads = 256;

// Whether the map applied to the input holds the residual as well, see with_gamma.
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

// Every thread's value combined, in a fixed order, for every thread; `neutral` leaves others as they are.
template <class Real, class Combine>
__device__ __forceinline__ Real combine_block(Real value, Real neutral, const Combine& combine) {
  __shared__ Real shares[kChannelThreads / 32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  __syncthreads();  // the last call's shares have been read
  if (lane == 0) {
    shares[warp] = value;
  }
  __syncthreads();
  value = neutral;
#pragma unroll
  for (int w = 0; w < kChannelThreads / 32; ++w) {
    value = combine(value, shares[w]);
  }
  return value;
}

// values[0] = the sum of the splits, in order; returned as well. Only the thread that has added them up reads it again.
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

// The softmax of a row of the map, each weight from the energy again.
template <class Real>
struct RowSoftmax {
  Real* energies;
  Real scale, highest, sum;

  // adds up the row's splits, in order
  __device__ __forceinline__ RowSoftmax(Real* row, int keys, double scale_, int64_t split_stride, int splits)
      : energies(row), scale(static_cast<Real>(scale_)) {
    const Real lowest = -static_cast<Real>(INFINITY);
    highest = lowest;
    for (int k = static_cast<int>(threadIdx.x); k < keys; k += kChannelThreads) {
      highest = fmax(highest, scale * add_splits(energies + k, split_stride, splits));
    }
    highest = combine_block(highest, lowest, Maximum());
    sum = 0;
    for (int k = static_cast<int>(threadIdx.x); k < keys; k += kChannelThreads) {
      sum += exp(scale * energies[k] - highest);
    }
    sum = combine_block(sum, Real(0), Addition());
  }

  __device__ __forceinline__ Real weight(int k) const { return exp(scale * energies[k] - highest) / sum; }
};

// gamma * weight; the weight where there is no gamma. In 16 bits, and 1 more where a channel meets itself: applied to the
// input it gives gamma * attention + input for nothing, and the map's rounding is that of the result. Wider types would
// lose digits to it: their sums would be rounded at the size of the input (measured: 10 times eager's error).
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

template <class T>
__global__ void __launch_bounds__(kChannelThreads) channel_softmax_kernel(const ChannelSoftmaxParams p) {
  using Real = Accumulator<T>;
  const int64_t row = blockIdx.x;
  const RowSoftmax<Real> softmax(
      static_cast<Real*>(p.energies) + row * p.keys, p.keys, p.scale, p.split_stride, p.splits);
  T* attention = static_cast<T*>(p.attention) + row * p.keys;
  for (int k = static_cast<int>(threadIdx.x); k < p.keys; k += kChannelThreads) {
    attention[k] = from_accumulator<T>(with_gamma<T>(softmax.weight(k), p.gamma, row, p.keys, k));
  }
  if (threadIdx.x == 0) {
    static_cast<Real*>(p.logsumexp)[row] = softmax.highest + log(softmax.sum);
  }
}

// The weights come from the row's own maximum and sum once more: CAM's energies are in the thousands, where a rounded
// logsumexp would be worth 2.4e-4 of every weight in float32.
template <class T>
__global__ void __launch_bounds__(kChannelThreads)
    channel_softmax_backward_kernel(const ChannelSoftmaxBackwardParams p) {
  using Real = Accumulator<T>;
  const int64_t row = blockIdx.x;
  const RowSoftmax<Real> softmax(
      static_cast<Real*>(p.energies) + row * p.keys, p.keys, p.scale, p.split_stride, p.energy_splits);
  Real* gradients = static_cast<Real*>(p.grad_attention) + row * p.keys;
  T* attention = static_cast<T*>(p.attention) + row * p.pitch;
  Real share = 0;
  for (int k = static_cast<int>(threadIdx.x); k < p.keys; k += kChannelThreads) {
    const Real weight = softmax.weight(k);
    attention[k] = from_accumulator<T>(with_gamma<T>(weight, p.gamma, row, p.keys, k));
    share += weight * add_splits(gradients + k, p.split_stride, p.grad_splits);
  }
  const Real delta = combine_block(share, Real(0), Addition());
  if (threadIdx.x == 0 && p.grad_gamma != nullptr) {
    static_cast<Real*>(p.grad_gamma)[row] = delta;
  }
  const Real factor = softmax.scale * (p.gamma == nullptr ? Real(1) : static_cast<const Real*>(p.gamma)[row]);
  for (int k = static_cast<int>(threadIdx.x); k < p.keys; k += kChannelThreads) {
    const Real gradient = factor * softmax.weight(k) * (gradients[k] - delta);
    if (p.grad_energies != nullptr) {
      static_cast<T*>(p.grad_energies)[row * p.pitch + k] = from_accumulator<T>(gradient);
    } else {
      gradients[k] = gradient;
    }
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
    Accumulator<T> sum = to_accumulator(*target) + to_accumulator(static_cast<const T*>(p.other)[i]);
    if (p.another != nullptr) {
      sum += to_accumulator(static_cast<const T*>(p.another)[i]);
    }
    *target = from_accumulator<T>(sum);
  }
}

}  // namespace segattn::cuda
