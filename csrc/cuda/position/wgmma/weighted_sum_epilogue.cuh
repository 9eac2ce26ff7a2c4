// The epilogue of the weighted sum on Hopper (wgmma/weighted_sum.cuh): stores the accumulators as rows of the result.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/ptx_sm90.cuh"
#include "cuda/position/params.h"
#include "cuda/position/weighted_sum_epilogue.cuh"
#include "cuda/position/wgmma/weighted_sum_traits.cuh"

namespace segattn::cuda {

// Named barriers of the kernel.
constexpr int kTurnBarrier = 1;      // and 2: the turns of the consumers
constexpr int kConsumerBarrier = 3;  // all consumers

// The tile of a block.
struct WgmmaTile {
  int sample;
  int partial;  // of the results of splits
  int channel_block;
  int first_owned;
  int first_channel;
};

// A consumer's output tile, 64 positions x kChannels. Position 16 (warp % 4) + lane / 4 + 8 h, channel
// 8 j + 2 (lane % 4) + c is sums[j][2 h + c].
template <class Traits>
using WgmmaSums = float[Traits::kChannels / 8][4];

// Stores a split's result, a tile of (kChannels, kOwned), 8 positions of a channel at a time: whole sectors.
template <class Traits>
__device__ __forceinline__ void store_partial(
    float* partials, const WgmmaSums<Traits>& sums, const WgmmaTile& tile, int consumer) {
  const int lane = lane_index();
  float* corner = partials + (static_cast<int64_t>(tile.partial) * Traits::kChannels + lane % 4 * 2) * Traits::kOwned +
      Traits::kConsumerOwned * consumer + 16 * (warp_index() % 4) + lane / 4;
#pragma unroll
  for (int j = 0; j < Traits::kChannels / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      corner[(8 * j + c % 2) * Traits::kOwned + c / 2 * 8] = sums[j][c];
    }
  }
}

// Stores the sums, or their rounding errors, through shared memory, where all consumers write their positions of a tile
// [kChannels][kOutputPitch]. result: (B, C, owned_positions)
template <class Traits, SumPart kPart>
__device__ __forceinline__ void store_sums_by_rows(
    void* result, unsigned char* shared, const WgmmaSums<Traits>& sums, const WeightedSumParams& p,
    const WgmmaTile& tile, int consumer) {
  using Element = typename Traits::Element;
  constexpr int kPitch = Traits::kOutputPitch;
  const int lane = lane_index();
  Element* rows = reinterpret_cast<Element*>(shared);
  // The lane's row of the four matrices of a store: two of channels x two of positions.
  Element* corner = rows + (lane / 16 * 8 + lane % 8) * kPitch + Traits::kConsumerOwned * consumer +
      16 * (warp_index() % 4) + lane / 8 % 2 * 8;
  const auto part = part_of_sum<Element, kPart>;
  ptx::named_barrier_sync(kConsumerBarrier, 128 * Traits::kConsumers);  // nobody reads the previous contents any more
#pragma unroll
  for (int j = 0; j < Traits::kChannels / 8; j += 2) {
    uint32_t matrices[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &sums[j + i / 2][i % 2 * 2];
      matrices[i] = packed_pair<Element>(part(pair[0]), part(pair[1]));
    }
    ptx::stmatrix_x4_trans(corner + 8 * j * kPitch, matrices);
  }
  ptx::named_barrier_sync(kConsumerBarrier, 128 * Traits::kConsumers);
  const int positions = min(Traits::kOwned, p.owned_positions - tile.first_owned);
  const int channels = min(Traits::kChannels, p.value_channels - tile.first_channel);
  store_rows<kPitch, Traits::kConsumerWarps>(
      static_cast<Element*>(result) + static_cast<int64_t>(tile.sample) * p.value_channels * p.owned_positions, rows,
      tile.first_channel, channels, tile.first_owned, positions, warp_index() - 4, p);
}

}  // namespace segattn::cuda
