// Channel attention: the passes over the C x K maps. A block has one row of the map.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "channel_params.cuh"
#include "element.cuh"
#include "launch.cuh"

namespace segattn {

constexpr int kChannelThreads = 256;

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
  __syncthreads(); // the last call's shares have been read
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

template <class T>
__global__ void __launch_bounds__(kChannelThreads) channel_softmax_kernel(const ChannelSoftmaxParams p) {
  using Real = Accumulator<T>;
  const int64_t row = blockIdx.x;
  Real* energies = static_cast<Real*>(p.energies) + row * p.keys;
  const Real scale = static_cast<Real>(p.scale);
  const Real lowest = -static_cast<Real>(INFINITY);
  Real highest = lowest;
  for (int k = static_cast<int>(threadIdx.x); k < p.keys; k += kChannelThreads) {
    highest = fmax(highest, scale * add_splits(energies + k, p.split_stride, p.splits));
  }
  highest = combine_block(highest, lowest, Maximum());
  Real sum = 0;
  for (int k = static_cast<int>(threadIdx.x); k < p.keys; k += kChannelThreads) {
    sum += exp(scale * energies[k] - highest);
  }
  sum = combine_block(sum, Real(0), Addition());
  T* attention = static_cast<T*>(p.attention) + row * p.keys;
  for (int k = static_cast<int>(threadIdx.x); k < p.keys; k += kChannelThreads) {
    attention[k] = from_accumulator<T>(exp(scale * energies[k] - highest) / sum);
  }
  if (threadIdx.x == 0) {
    static_cast<Real*>(p.logsumexp)[row] = highest + log(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kChannelThreads) channel_softmax_backward_kernel(
    const ChannelSoftmaxBackwardParams p) {
  using Real = Accumulator<T>;
  const int64_t row = blockIdx.x;
  Real* energies = static_cast<Real*>(p.energies) + row * p.keys;
  Real* gradients = static_cast<Real*>(p.grad_attention) + row * p.keys;
  T* attention = static_cast<T*>(p.attention) + row * p.pitch;
  const Real scale = static_cast<Real>(p.scale), logsumexp = static_cast<const Real*>(p.logsumexp)[row];
  Real share = 0;
  for (int k = static_cast<int>(threadIdx.x); k < p.keys; k += kChannelThreads) {
    const Real weight = exp(scale * add_splits(energies + k, p.split_stride, p.energy_splits) - logsumexp);
    attention[k] = from_accumulator<T>(weight);
    share += weight * add_splits(gradients + k, p.split_stride, p.grad_splits);
  }
  const Real delta = combine_block(share, Real(0), Addition());
  for (int k = static_cast<int>(threadIdx.x); k < p.keys; k += kChannelThreads) {
    const Real weight = exp(scale * energies[k] - logsumexp);
    const Real gradient = scale * weight * (gradients[k] - delta);
    if (p.grad_energies != nullptr) {
      static_cast<T*>(p.grad_energies)[row * p.pitch + k] = from_accumulator<T>(gradient);
    } else {
      gradients[k] = gradient;
    }
  }
}

constexpr int kSymmetriseTile = 32;
constexpr int kSymmetriseRows = 8; // of threads

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
    *target = from_accumulator<T>(to_accumulator(*target) + to_accumulator(static_cast<const T*>(p.other)[i]));
  }
}

} // namespace segattn
