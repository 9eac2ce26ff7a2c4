// The epilogue of position attention's weighted sum (weighted_sum.cuh): stores the accumulators as rows of the result.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/position/params.h"
#include "cuda/position/weighted_sum_traits.cuh"

namespace segattn::cuda {

// Stores a split's result, a tile of (kChannels, kOwned), 8 positions of a channel at a time: whole sectors. Without
// edges and with rows of constant size it needs no other addresses than the first.
template <class Traits>
__device__ __forceinline__ void store_partial(
    float* partials, const WeightedSumAccumulators<Traits>& sums, const WeightedSumBlock& block) {
  const int lane = lane_index();
  float* corner = partials +
      (static_cast<int64_t>(block.partial) * Traits::kChannels + Traits::warp_first_channel() + lane / 4) *
          Traits::kOwned +
      Traits::warp_first_owned() + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < Traits::kChannelTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int j = 0; j < Traits::kOwnedTiles; ++j) {
        store_pair(corner + (16 * i + 8 * h) * Traits::kOwned + 8 * j, sums[i][j][2 * h], sums[i][j][2 * h + 1]);
      }
    }
  }
}

// float32. output: the sample's, (C, owned_positions). Stores straight from the accumulators, 8 positions of a channel
// at a time.
template <class Traits>
__device__ __forceinline__ void store_sums(
    float* output, const WeightedSumAccumulators<Traits>& sums, const WeightedSumParams& p,
    const WeightedSumBlock& block) {
  const int lane = lane_index();
#pragma unroll
  for (int i = 0; i < Traits::kChannelTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int channel = block.first_channel + Traits::warp_first_channel() + 16 * i + lane / 4 + 8 * h;
      if (channel < p.value_channels) {
        float* row = output + static_cast<int64_t>(channel) * p.owned_positions;
#pragma unroll
        for (int j = 0; j < Traits::kOwnedTiles; ++j) {
          const int position = block.first_owned + Traits::warp_first_owned() + 8 * j + lane % 4 * 2;
          const float low = sums[i][j][2 * h], high = sums[i][j][2 * h + 1];
          const bool both = position + 1 < p.owned_positions;
          if (both && reinterpret_cast<uintptr_t>(row + position) % sizeof(float2) == 0) {
            store_pair(row + position, low, high);
          } else {
            if (position < p.owned_positions) {
              row[position] = low;
            }
            if (both) {
              row[position + 1] = high;
            }
          }
        }
      }
    }
  }
}

// The sum rounded to the element type, or the error of that rounding (output_low).
enum class SumPart { kRounded, kRoundingError };

// The part of x to store. For kRounded the store itself rounds.
template <class Element, SumPart kPart>
__device__ __forceinline__ float part_of_sum(float x) {
  return kPart == SumPart::kRoundingError ? x - to_accumulator(from_accumulator<Element>(x)) : x;
}

// Stores a tile [channels][kPitch] of 16-bit elements in shared memory to rows of `output`, the sample's (C,
// owned_positions). Warp `warp` of kWarps writes whole rows in 4-byte stores, starting at their first 4-byte boundary.
template <int kPitch, int kWarps, class Element>
__device__ __forceinline__ void store_rows(
    Element* output, const Element* tile, int first_channel, int channels, int first_owned, int positions, int warp,
    const WeightedSumParams& p) {
  const int lane = lane_index();
  for (int channel = warp; channel < channels; channel += kWarps) {
    const Element* from = tile + channel * kPitch;
    Element* row = output + static_cast<int64_t>(first_channel + channel) * p.owned_positions + first_owned;
    const int before = reinterpret_cast<uintptr_t>(row) / 2 % 2;  // elements before the boundary
    if (before != 0 && lane == 0) {
      row[0] = from[0];
    }
    for (int i = before + 2 * lane; i < positions; i += 64) {
      if (i + 1 < positions) {
        const uint32_t low = *reinterpret_cast<const unsigned short*>(from + i);
        const uint32_t high = *reinterpret_cast<const unsigned short*>(from + i + 1);
        *reinterpret_cast<uint32_t*>(row + i) = low | high << 16;
      } else {
        row[i] = from[i];
      }
    }
  }
}

// store_sums for 16-bit types, through shared memory: 8 positions are only half a sector, and unaligned rows would take
// 2-byte stores.
template <class Traits, SumPart kPart>
__device__ __forceinline__ void store_sums_by_rows(
    typename Traits::Element* output, unsigned char* shared, const WeightedSumAccumulators<Traits>& sums,
    const WeightedSumParams& p, const WeightedSumBlock& block) {
  using Element = typename Traits::Element;
  constexpr int kPitch = Traits::kOutputPitch;
  const int lane = lane_index();
  Element* tile = reinterpret_cast<Element*>(shared);
  __syncthreads();  // no warp reads the previous contents any more
#pragma unroll
  for (int i = 0; i < Traits::kChannelTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Traits::kOwnedTiles; ++j) {
      Element* corner = tile + (Traits::warp_first_channel() + 16 * i + lane / 4) * kPitch +
          Traits::warp_first_owned() + 8 * j + lane % 4 * 2;
      const auto part = part_of_sum<Element, kPart>;
      store_pair(corner, part(sums[i][j][0]), part(sums[i][j][1]));
      store_pair(corner + 8 * kPitch, part(sums[i][j][2]), part(sums[i][j][3]));
    }
  }
  __syncthreads();
  const int positions = min(Traits::kOwned, p.owned_positions - block.first_owned);
  const int channels = min(Traits::kChannels, p.value_channels - block.first_channel);
  store_rows<kPitch, Traits::kWarps>(
      output, tile, block.first_channel, channels, block.first_owned, positions, warp_index(), p);
}

}  // namespace segattn::cuda
