// Merges the results of the output tiles whose streamed positions were split (weighted_sum.cuh).
#pragma once

#include <cmath>
#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/row_kernels.cuh"
#include "cuda/position/params.h"

namespace segattn::cuda {

// Forward, where every split has its own softmax:
//   output = sum_s exp(logsumexp_s - logsumexp) partials_s, logsumexp = log(sum_s exp(logsumexp_s)).
// Value gradient: output = sum_s partials_s.
struct MergeSplitsParams {
  const float* partials;           // (splits, tiles, tile_channels, kPositions)
  const float* partial_logsumexp;  // forward: (splits, tiles, kPositions)
  void* output;                    // (B, C, N)
  void* output_low;                // forward: (B, C, N), 16-bit types: the output's rounding error; null: not written
  float* logsumexp;                // forward: (B, N)
  int first_tile, tiles;           // in the order of channel blocks, owned blocks, samples
  int tile_channels;
  int splits;
  int channels;
  int positions;
  int owned_blocks;
  int channel_blocks;
  int blocks_per_tile;
  const int* key_counts;  // Keys::kKept: (B)
  // Forward with float32 results: the rounding errors of the logsumexps, like those. Null: unknown, and not written
  const float* partial_logsumexp_low;
  float* logsumexp_low;
  bool is_part;  // of the keys: a query whose energies are all -inf has the output 0, not NaN
};

constexpr int kMergeChannels = 8;  // of a thread

// The channels that a block merges of a tile of kPositions.
template <int kPositions>
constexpr int kMergeBlockChannels = kRowThreads / kPositions * kMergeChannels;

// A thread merges kMergeChannels channels of one position, so that it computes a split's factor once for all of them.
// Loads and stores of a warp are adjacent. Without any key (Keys::kKept), the output is 0 and the logsumexp -inf.
template <class T, PositionSum kSum, Keys kKeys, int kPositions>
__global__ void __launch_bounds__(kRowThreads) merge_splits_kernel(const MergeSplitsParams p) {
  constexpr bool kForward = kSum == PositionSum::kForward;
  constexpr bool kHasLow = kForward && sizeof(T) == 4;
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned blocks_per_tile = p.blocks_per_tile, channel_blocks = p.channel_blocks, owned_blocks = p.owned_blocks;
  const int partial = static_cast<int>(blockIdx.x / blocks_per_tile);
  const int channel_in_tile = static_cast<int>(blockIdx.x % blocks_per_tile) * kMergeBlockChannels<kPositions> +
      thread / kPositions * kMergeChannels;
  const int position_in_tile = thread % kPositions;
  unsigned tile = p.first_tile + partial;
  const int first_channel = static_cast<int>(tile % channel_blocks) * p.tile_channels + channel_in_tile;
  tile /= channel_blocks;
  const int position = static_cast<int>(tile % owned_blocks) * kPositions + position_in_tile;
  const int64_t sample = tile / owned_blocks;
  const int channels = min(kMergeChannels, p.channels - first_channel);
  if (position >= p.positions || channels <= 0) {
    return;
  }

  const float* split_logsumexp = nullptr;
  const float* split_low = nullptr;
  const auto weight = [](float difference, const float* low) {
    return expf(kHasLow && low != nullptr ? difference + *low : difference);
  };
  float shift = 0.0f, sum = 1.0f;
  if constexpr (kForward) {
    split_logsumexp = p.partial_logsumexp + partial * kPositions + position_in_tile;
    if (kHasLow && p.partial_logsumexp_low != nullptr) {
      split_low = p.partial_logsumexp_low + partial * kPositions + position_in_tile;
    }
    const int stride = p.tiles * kPositions;
    float max_logsumexp = -INFINITY;
    for (int s = 0; s < p.splits; ++s) {
      max_logsumexp = fmaxf(max_logsumexp, split_logsumexp[s * stride]);
    }
    shift = max_logsumexp == -INFINITY ? 0.0f : max_logsumexp;
    sum = 0.0f;
    for (int s = 0; s < p.splits; ++s) {
      sum += weight(
          split_logsumexp[s * stride] - shift, kHasLow && split_low != nullptr ? split_low + s * stride : nullptr);
    }
    if (first_channel == 0) {
      const float log = logf(sum), logsumexp = max_logsumexp + log;
      p.logsumexp[sample * p.positions + position] = logsumexp;
      if (kHasLow && p.logsumexp_low != nullptr) {
        p.logsumexp_low[sample * p.positions + position] = rounding_error(logsumexp, (max_logsumexp - logsumexp) + log);
      }
    }
    if constexpr (kKeys == Keys::kKept) {
      sum = p.key_counts[sample] == 0 ? 1.0f : sum;
    }
    if constexpr (kHasLow) {
      sum = p.is_part && sum == 0.0f ? 1.0f : sum;
    }
  }

  float values[kMergeChannels] = {};
  const float* from =
      p.partials + (static_cast<int64_t>(partial) * p.tile_channels + channel_in_tile) * kPositions + position_in_tile;
  for (int s = 0; s < p.splits; ++s) {
    float factor = 1.0f;
    if constexpr (kForward) {
      factor = weight(*split_logsumexp - shift, split_low);
      split_logsumexp += p.tiles * kPositions;
      if (kHasLow && split_low != nullptr) {
        split_low += p.tiles * kPositions;
      }
    }
#pragma unroll
    for (int c = 0; c < kMergeChannels; ++c) {
      const float value = from[c * kPositions];
      // The partial of a split whose energies are all -inf is NaN, and its factor 0.
      values[c] = !kForward || factor > 0.0f ? fmaf(factor, value, values[c]) : values[c];
    }
    from += static_cast<int64_t>(p.tiles) * p.tile_channels * kPositions;
  }

  const float scale = 1.0f / sum;
  const int64_t first = (sample * p.channels + first_channel) * p.positions + position;
#pragma unroll
  for (int c = 0; c < kMergeChannels; ++c) {
    if (c < channels) {
      const float value = values[c] * scale;
      const T result = from_accumulator<T>(value);
      static_cast<T*>(p.output)[first + c * static_cast<int64_t>(p.positions)] = result;
      if constexpr (kForward && sizeof(T) == 2) {
        if (p.output_low != nullptr) {
          static_cast<T*>(p.output_low)[first + c * static_cast<int64_t>(p.positions)] =
              from_accumulator<T>(value - to_accumulator(result));
        }
      }
    }
  }
}

}  // namespace segattn::cuda
