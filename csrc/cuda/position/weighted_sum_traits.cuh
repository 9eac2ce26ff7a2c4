// The shape of a block of the weighted sum (weighted_sum.cuh): tiles, warps, pipeline stages, shared memory.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/math.h"
#include "cuda/common/mma.cuh"
#include "cuda/common/tile.cuh"

namespace segattn::cuda {

// kScoreSteps: mma steps over E whose owned fragments stay in registers; 0 reads them from shared memory, for any E.
template <class Mma_, int kOwned_, int kChannels_, int kChannelWarps_, int kStages_, int kScoreSteps_, int kMinBlocks_>
struct WeightedSumTraits {
  using Mma = Mma_;
  using Element = typename Mma::Element;
  static constexpr int kOwned = kOwned_;
  static constexpr int kChannels = kChannels_;
  static constexpr int kStages = kStages_;
  static constexpr int kScoreSteps = kScoreSteps_;
  static constexpr int kMinBlocks = kMinBlocks_;
  static constexpr int kStreamed = 64 / static_cast<int>(sizeof(Element));  // positions a step
  static constexpr int kWarps = kOwned / 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kChannelWarps = kChannelWarps_;
  static constexpr int kWarpChannels = kChannels / kChannelWarps;
  static constexpr int kWarpOwned = kOwned / (kWarps / kChannelWarps);
  static constexpr int kChannelTiles = kWarpChannels / 16;  // mma tiles of a warp's part of the output
  static constexpr int kOwnedTiles = kWarpOwned / 8;

  static_assert(kOwned % 16 == 0, "scores are made 16 positions to a warp");
  static_assert(kWarps % kChannelWarps == 0, "warps form a grid of positions x channels");
  static_assert(kWarpChannels % 16 == 0 && kWarpOwned % 16 == 0, "warp tiles consist of mma tiles");
  static_assert(kWarpChannels * kWarpOwned <= 64 * 64, "128 accumulators a thread leave room for the rest");
  static_assert(kStages >= 2, "a copy is under way while another stage is multiplied");

  // A warp's part of the output's tile.
  static __device__ __forceinline__ int warp_first_owned() { return warp_index() / kChannelWarps * kWarpOwned; }
  static __device__ __forceinline__ int warp_first_channel() { return warp_index() % kChannelWarps * kWarpChannels; }

  using OwnedTile = SharedTile<Element, kOwned>;
  using StreamedTile = SharedTile<Element, kStreamed>;

  // Rows of the tiles whose rows are key channels.
  static constexpr __host__ __device__ int embedding_rows(int key_channels) {
    return kScoreSteps > 0 ? kScoreSteps * Mma::kStep : round_up(key_channels, Mma::kStep);
  }
  static constexpr __host__ __device__ int owned_bytes(int key_channels) {
    return OwnedTile::bytes(embedding_rows(key_channels));
  }
  static constexpr __host__ __device__ int streamed_bytes(int key_channels) {
    return StreamedTile::bytes(embedding_rows(key_channels));
  }
  static constexpr int kValueBytes = StreamedTile::bytes(kChannels);
  static constexpr int kWeightBytes = StreamedTile::bytes(kOwned);
  static constexpr int kStatisticsBytes = 2 * (kOwned + kWarps) * 4 + 24;  // and a WeightedSumBlock
  // 16-bit results pass through shared memory, rows of kOutputPitch elements: four banks on from row to row.
  static constexpr int kOutputPitch = kOwned + 8;
  static constexpr int kOutputBytes = sizeof(Element) == 2 ? kChannels * kOutputPitch * 2 : 0;
  static constexpr __host__ __device__ int shared_bytes(int key_channels) {
    const int pipeline = owned_bytes(key_channels) + kStages * (streamed_bytes(key_channels) + kValueBytes) +
        2 * kWeightBytes + kStatisticsBytes;
    return pipeline > kOutputBytes ? pipeline : kOutputBytes;
  }
};

// A warp's part of the output.
template <class Traits>
using WeightedSumAccumulators = float[Traits::kChannelTiles][Traits::kOwnedTiles][4];

// What a block works on. It waits in shared memory for the end, where registers are free again.
struct WeightedSumBlock {
  int64_t sample;
  int split;
  int channel_block;
  int first_owned;
  int first_channel;
};

}  // namespace segattn::cuda
