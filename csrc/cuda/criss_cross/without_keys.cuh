// Queries whose energies are all -inf in a part of criss-cross attention, rows or columns alone. Of the whole, they
// give NaN; of a part, output and gradients are 0.
#pragma once

#include <cmath>
#include <cstdint>

#include <cuda_runtime.h>

namespace segattn::cuda {

constexpr int kWithoutKeysThreads = 256;

// output[b, c, i] = 0 where logsumexp[b, i] is -inf
template <class Real>
struct ClearParams {
  Real* output;           // (B, C, N), contiguous
  const Real* logsumexp;  // (B, N), contiguous
  int64_t positions;      // N
  int channels;           // C
  int position_blocks;    // of kWithoutKeysThreads
};

template <class Real>
__global__ void __launch_bounds__(kWithoutKeysThreads) clear_without_keys_kernel(const ClearParams<Real> p) {
  const int64_t sample = blockIdx.x / p.position_blocks;
  const int64_t position =
      static_cast<int64_t>(blockIdx.x % p.position_blocks) * kWithoutKeysThreads + static_cast<int>(threadIdx.x);
  if (position >= p.positions || p.logsumexp[sample * p.positions + position] != -static_cast<Real>(INFINITY)) {
    return;
  }
  Real* output = p.output + sample * p.channels * p.positions + position;
#pragma unroll 1
  for (int c = 0; c < p.channels; ++c, output += p.positions) {
    *output = 0;
  }
}

// The logsumexp for the backward kernels, whose weights are exp(energy - logsumexp): +inf in place of -inf, because
// exp(-inf - +inf) is 0 and exp(-inf - -inf) is NaN.
template <class Real>
struct LogsumexpParams {
  const Real* given;  // (count), contiguous
  Real* logsumexp;    // (count), contiguous
  int64_t count;
};

template <class Real>
__global__ void __launch_bounds__(kWithoutKeysThreads) logsumexp_of_weights_kernel(const LogsumexpParams<Real> p) {
  constexpr Real kInfinity = static_cast<Real>(INFINITY);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWithoutKeysThreads + static_cast<int>(threadIdx.x);
  if (i < p.count) {
    const Real value = p.given[i];
    p.logsumexp[i] = value == -kInfinity ? kInfinity : value;
  }
}

}  // namespace segattn::cuda
