// The shape of a weighted-sum block (weighted_sum.cuh): tiles, warps, pipeline stages, shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>

#include "cuda/common/math.h"
#include "cuda/common/mma.cuh"
#include "cuda/common/tile.cuh"

namespace segattn::cuda {

// The work of a block. It stays in shared memory until the end of the kernel, to save registers.
struct WeightedSumBlock {
  int64_t sample;
  int partial;  // of the results of splits
  int channel_block;
  int first_owned;
  int first_channel;
};

// kResidentSteps: mma steps over E whose owned fragments stay in registers. 0: any E, with fragments reloaded from
// shared memory.
template <
    class Mma_, int kOwned_, int kChannels_, int kChannelWarps_, int kStages_, int kResidentSteps_, int kMinBlocks_>
struct WeightedSumTraits {
  using Mma = Mma_;
  using Element = typename Mma::Element;
  static constexpr int kOwned = kOwned_;
  static constexpr int kChannels = kChannels_;
  static constexpr int kStages = kStages_;
  static constexpr int kResidentSteps = kResidentSteps_;
  static constexpr int kMinBlocks = kMinBlocks_;
  static constexpr int kStreamed = 64 / static_cast<int>(sizeof(Element));  // positions of a step
  static constexpr int kWarps = kOwned / 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kChannelWarps = kChannelWarps_;
  static constexpr int kWarpChannels = kChannels / kChannelWarps;
  static constexpr int kWarpOwned = kOwned / (kWarps / kChannelWarps);
  static constexpr int kChannelTiles = kWarpChannels / 16;  // mma tiles of a warp's output tile
  static constexpr int kOwnedTiles = kWarpOwned / 8;

  static_assert(kOwned % 16 == 0, "a warp computes the energies of 16 positions");
  static_assert(kWarps % kChannelWarps == 0, "warps form a grid of positions x channels");
  static_assert(kWarpChannels % 16 == 0 && kWarpOwned % 16 == 0, "warp tiles consist of mma tiles");
  static_assert(kWarpChannels * kWarpOwned <= 64 * 64, "128 accumulators a thread leave room for the rest");
  static_assert(kStages >= 2, "one stage is copied while another is multiplied");

  // The corner of a warp's output tile within the block's.
  static __device__ __forceinline__ int warp_first_owned() { return warp_index() / kChannelWarps * kWarpOwned; }
  static __device__ __forceinline__ int warp_first_channel() { return warp_index() % kChannelWarps * kWarpChannels; }

  // Of the operands: the owned tile, and the streamed and value tiles.
  using OwnedTile = SharedTile<Element, kOwned>;
  using StreamedTile = SharedTile<Element, kStreamed>;
  // TF32: owned and streamed elements are rounded in shared memory, once for all warps, and weights before they are
  // stored. A value is loaded by two warps only.
  using Ready = typename Mma::Ready;
  static constexpr bool kRoundsTiles = !std::is_same_v<Ready, Element>;
  using ReadyOwnedTile = SharedTile<Ready, kOwned>;
  using ReadyStreamedTile = SharedTile<Ready, kStreamed>;  // and weights

  // Rows of the owned and streamed tiles.
  static constexpr __host__ __device__ int key_channel_rows(int key_channels) {
    return kResidentSteps > 0 ? kResidentSteps * Mma::kStep : round_up(key_channels, Mma::kStep);
  }
  static constexpr __host__ __device__ int owned_bytes(int key_channels) {
    return OwnedTile::bytes(key_channel_rows(key_channels));
  }
  static constexpr __host__ __device__ int streamed_bytes(int key_channels) {
    return StreamedTile::bytes(key_channel_rows(key_channels));
  }
  static constexpr int kValueBytes = StreamedTile::bytes(kChannels);
  static constexpr int kWeightBytes = StreamedTile::bytes(kOwned);
  static constexpr int kStatisticsBytes = 2 * (kOwned + kWarps) * 4 + static_cast<int>(sizeof(WeightedSumBlock));
  // 16-bit results pass through shared memory in rows of kOutputPitch elements, which start four banks apart.
  static constexpr int kOutputPitch = kOwned + 8;
  static constexpr int kOutputBytes = sizeof(Element) == 2 ? kChannels * kOutputPitch * 2 : 0;
  static constexpr __host__ __device__ int shared_bytes(int key_channels) {
    const int pipeline = owned_bytes(key_channels) + kStages * (streamed_bytes(key_channels) + kValueBytes) +
        2 * kWeightBytes + kStatisticsBytes;
    return pipeline > kOutputBytes ? pipeline : kOutputBytes;
  }
};

// A warp's output tile.
template <class Traits>
using WeightedSumAccumulators = float[Traits::kChannelTiles][Traits::kOwnedTiles][4];

}  // namespace segattn::cuda
