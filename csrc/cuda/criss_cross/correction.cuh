// The last step of the query gradient. delta is computed from an output rounded to its dtype. Its error is the same for
// all keys of a query, so it adds a multiple of the query's mean key to grad_query and does not average out. In exact
// arithmetic the energy gradients of a query sum to its gradient of the logsumexp: with `error` the difference,
// grad_query - error * mean_key is the same gradient, and there the error of delta cancels. This holds only where
// logsumexp and output are over the keys of the call (keys_complete).
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"

namespace segattn::cuda {

constexpr int kCorrectionThreads = 256;
constexpr int kCorrectionChannels = 16;  // per thread, which reads its query's sum once

// grad_query[b, e, i] -= (grad_sum[b, i] - scale * grad_logsumexp[b, i]) * mean_key[b, e, i]; all contiguous
struct QueryCorrectionParams {
  void* grad_query;      // (B, E, N)
  const void* mean_key;  // (B, E, N), sum_j p_ij key_j over row and column; its rounding only scales the correction
  const void* grad_sum;  // (B, N), accumulator type: sum of the energy gradients, times scale
  int64_t positions;     // N
  int channels;          // E
  int position_blocks;   // of kCorrectionThreads
  int channel_blocks;    // of kCorrectionChannels
  const void* grad_logsumexp;  // (B, N), accumulator type; null: zeros
  double scale;
};

template <class T>
__global__ void __launch_bounds__(kCorrectionThreads) correct_query_gradient_kernel(const QueryCorrectionParams p) {
  using Real = Accumulator<T>;
  int64_t block = blockIdx.x;
  const int64_t position = block % p.position_blocks * kCorrectionThreads + threadIdx.x;
  block /= p.position_blocks;
  const int first = static_cast<int>(block % p.channel_blocks) * kCorrectionChannels;
  const int64_t sample = block / p.channel_blocks;
  if (position >= p.positions) {
    return;
  }
  Real error = static_cast<const Real*>(p.grad_sum)[sample * p.positions + position];
  if (p.grad_logsumexp != nullptr) {
    error -= static_cast<Real>(p.scale) * static_cast<const Real*>(p.grad_logsumexp)[sample * p.positions + position];
  }
  const int64_t offset = (sample * p.channels + first) * p.positions + position;
  const T* mean_key = static_cast<const T*>(p.mean_key) + offset;
  T* grad_query = static_cast<T*>(p.grad_query) + offset;
  const int channels = min(p.channels - first, kCorrectionChannels);
#pragma unroll 4
  for (int c = 0; c < channels; ++c) {
    const Real before = to_accumulator(grad_query[c * p.positions]);
    grad_query[c * p.positions] = from_accumulator<T>(before - error * to_accumulator(mean_key[c * p.positions]));
  }
}

}  // namespace segattn::cuda
