// Merges the results of split keys. Every split has its own softmax.
#pragma once

#include <cmath>
#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/row_kernels.cuh"
#include "cuda/position/params.h"

namespace segattn::cuda {

// output = sum_s exp(logsumexp_s - logsumexp) partials_s, logsumexp = log(sum_s exp(logsumexp_s)).
struct MergeSplitsParams {
  const float* partials;           // (splits, B, C, N)
  const float* partial_logsumexp;  // (splits, B, N)
  void* output;                    // (B, C, N)
  void* output_low;                // (B, C, N), 16-bit types: the output's rounding error; null: not written
  float* logsumexp;                // (B, N)
  int64_t batch;
  int splits;
  int channels;
  int positions;
  int position_blocks;
  int channel_blocks;     // of kMergeChannels
  const int* key_counts;  // Keys::kKept: (B)
};

constexpr int kMergeChannels = 32;

// A thread merges kMergeChannels channels of one position with the same factors. Without any key (Keys::kKept), the
// output is 0 and the logsumexp -inf.
template <class T, Keys kKeys>
__global__ void __launch_bounds__(kRowThreads) merge_splits_kernel(const MergeSplitsParams p) {
  int64_t block = blockIdx.x;
  const int position = static_cast<int>(block % p.position_blocks) * kRowThreads + static_cast<int>(threadIdx.x);
  block /= p.position_blocks;
  const int channel_block = static_cast<int>(block % p.channel_blocks);
  const int64_t sample = block / p.channel_blocks;
  if (position >= p.positions) {
    return;
  }
  float factors[kMaxSplits];
  float max_logsumexp = -INFINITY;
#pragma unroll
  for (int s = 0; s < kMaxSplits; ++s) {
    factors[s] = s < p.splits ? p.partial_logsumexp[(s * p.batch + sample) * p.positions + position] : -INFINITY;
    max_logsumexp = fmaxf(max_logsumexp, factors[s]);
  }
  const float shift = max_logsumexp == -INFINITY ? 0.0f : max_logsumexp;
  float sum = 0.0f;
#pragma unroll
  for (int s = 0; s < kMaxSplits; ++s) {
    factors[s] = expf(factors[s] - shift);
    sum += factors[s];
  }
  if (channel_block == 0) {
    p.logsumexp[sample * p.positions + position] = max_logsumexp + logf(sum);
  }
  if constexpr (kKeys == Keys::kKept) {
    sum = p.key_counts[sample] == 0 ? 1.0f : sum;
  }
  const int first = channel_block * kMergeChannels;
  for (int c = first; c < min(first + kMergeChannels, p.channels); ++c) {
    const int64_t sample_elements = static_cast<int64_t>(p.channels) * p.positions;
    const int64_t element = static_cast<int64_t>(c) * p.positions + position;
    float value = 0.0f;
#pragma unroll
    for (int s = 0; s < kMaxSplits; ++s) {
      // The partial of a split whose energies are all -inf is NaN, and its factor 0.
      if (s < p.splits && factors[s] > 0.0f) {
        value += factors[s] * p.partials[(s * p.batch + sample) * sample_elements + element];
      }
    }
    const T result = from_accumulator<T>(value / sum);
    static_cast<T*>(p.output)[sample * sample_elements + element] = result;
    if (p.output_low != nullptr) {
      static_cast<T*>(p.output_low)[sample * sample_elements + element] =
          from_accumulator<T>(value / sum - to_accumulator(result));
    }
  }
}

}  // namespace segattn::cuda
