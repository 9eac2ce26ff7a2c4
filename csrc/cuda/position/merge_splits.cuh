// The results of split keys merged into one: every split has a softmax of its own.
#pragma once

#include <cmath>
#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/row_kernels.cuh"
#include "cuda/position/params.h"

namespace segattn::cuda {

// Split keys: every split has its own softmax; weighed by exp(logsumexp_s - logsumexp) they add up to the whole.
struct MergeSplitsParams {
  const float* partials;           // (splits, B, C, N)
  const float* partial_logsumexp;  // (splits, B, N)
  void* output;                    // (B, C, N)
  void* output_low;                // (B, C, N), 16-bit types: what rounding took from the output; null: not wanted
  float* logsumexp;                // (B, N)
  int64_t batch;
  int splits;
  int channels;
  int positions;
  int position_blocks;
  int channel_blocks;  // of kMergeChannels
};

constexpr int kMergeChannels = 32;

// A thread has one position and kMergeChannels channels, for which it makes the splits' weights once.
template <class T>
__global__ void __launch_bounds__(kRowThreads) merge_splits_kernel(const MergeSplitsParams p) {
  int64_t block = blockIdx.x;
  const int position = static_cast<int>(block % p.position_blocks) * kRowThreads + static_cast<int>(threadIdx.x);
  block /= p.position_blocks;
  const int channel_block = static_cast<int>(block % p.channel_blocks);
  const int64_t sample = block / p.channel_blocks;
  if (position >= p.positions) {
    return;
  }
  float weights[kMaxSplits];
  float highest = -INFINITY;
#pragma unroll
  for (int s = 0; s < kMaxSplits; ++s) {
    weights[s] = s < p.splits ? p.partial_logsumexp[(s * p.batch + sample) * p.positions + position] : -INFINITY;
    highest = fmaxf(highest, weights[s]);
  }
  const float shift = highest == -INFINITY ? 0.0f : highest;
  float sum = 0.0f;
#pragma unroll
  for (int s = 0; s < kMaxSplits; ++s) {
    weights[s] = expf(weights[s] - shift);
    sum += weights[s];
  }
  if (channel_block == 0) {
    p.logsumexp[sample * p.positions + position] = highest + logf(sum);
  }
  const int first = channel_block * kMergeChannels;
  for (int c = first; c < min(first + kMergeChannels, p.channels); ++c) {
    const int64_t map = static_cast<int64_t>(p.channels) * p.positions;
    const int64_t at = static_cast<int64_t>(c) * p.positions + position;
    float value = 0.0f;
#pragma unroll
    for (int s = 0; s < kMaxSplits; ++s) {
      // a split whose keys all scored -inf is NaN and weighs nothing
      if (s < p.splits && weights[s] > 0.0f) {
        value += weights[s] * p.partials[(s * p.batch + sample) * map + at];
      }
    }
    const T result = from_accumulator<T>(value / sum);
    static_cast<T*>(p.output)[sample * map + at] = result;
    if (p.output_low != nullptr) {
      static_cast<T*>(p.output_low)[sample * map + at] = from_accumulator<T>(value / sum - to_accumulator(result));
    }
  }
}

}  // namespace segattn::cuda
