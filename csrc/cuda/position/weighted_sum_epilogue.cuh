// The end of position attention's weighted sum (weighted_sum.cuh): the accumulators become rows of the result.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/common/element.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/position/params.h"
#include "cuda/position/weighted_sum_traits.cuh"

namespace segattn::cuda {

// map: the sample's output, (C, owned_positions). Straight from the accumulators, a channel's 8 positions at a time:
// for float32 these are whole sectors.
template <class Traits, class Out>
__device__ __forceinline__ void store_sums(
    Out* map, const WeightedSumAccumulators<Traits>& sums, const WeightedSumParams& p, const WeightedSumBlock& at) {
  const int lane = lane_index();
#pragma unroll
  for (int i = 0; i < Traits::kChannelTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int channel = at.first_channel + Traits::warp_first_channel() + 16 * i + lane / 4 + 8 * h;
      if (channel < p.value_channels) {
        Out* row = map + static_cast<int64_t>(channel) * p.owned_positions;
#pragma unroll
        for (int j = 0; j < Traits::kOwnedTiles; ++j) {
          const int position = at.first_owned + Traits::warp_first_owned() + 8 * j + lane % 4 * 2;
          const float low = sums[i][j][2 * h], high = sums[i][j][2 * h + 1];
          const bool both = position + 1 < p.owned_positions;
          if (both && reinterpret_cast<uintptr_t>(row + position) % (2 * sizeof(Out)) == 0) {
            store_pair(row + position, low, high);
          } else {
            if (position < p.owned_positions) {
              row[position] = from_accumulator<Out>(low);
            }
            if (both) {
              row[position + 1] = from_accumulator<Out>(high);
            }
          }
        }
      }
    }
  }
}

// x as an Element, or (kLow) what that rounding takes from it.
template <class Element, bool kLow>
__device__ __forceinline__ float part_of_sum(float x) {
  return kLow ? x - to_accumulator(from_accumulator<Element>(x)) : x;
}

// The same for 16 bits, by way of shared memory: 8 positions are but half a sector there, and unaligned rows would take
// 2-byte stores. A warp writes whole rows in 4-byte stores, from their first 4-byte boundary on. kLow: writes what
// rounding takes from the sums.
template <class Traits, bool kLow>
__device__ __forceinline__ void store_sums_by_rows(
    typename Traits::Element* map, unsigned char* shared, const WeightedSumAccumulators<Traits>& sums,
    const WeightedSumParams& p, const WeightedSumBlock& at) {
  using Element = typename Traits::Element;
  constexpr int kPitch = Traits::kOutputPitch;
  const int lane = lane_index();
  Element* tile = reinterpret_cast<Element*>(shared);
  __syncthreads();  // every warp is done with what lies there
#pragma unroll
  for (int i = 0; i < Traits::kChannelTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Traits::kOwnedTiles; ++j) {
      Element* corner = tile + (Traits::warp_first_channel() + 16 * i + lane / 4) * kPitch +
          Traits::warp_first_owned() + 8 * j + lane % 4 * 2;
      const auto part = part_of_sum<Element, kLow>;
      store_pair(corner, part(sums[i][j][0]), part(sums[i][j][1]));
      store_pair(corner + 8 * kPitch, part(sums[i][j][2]), part(sums[i][j][3]));
    }
  }
  __syncthreads();
  const int positions = min(Traits::kOwned, p.owned_positions - at.first_owned);
  const int channels = min(Traits::kChannels, p.value_channels - at.first_channel);
  for (int channel = warp_index(); channel < channels; channel += Traits::kWarps) {
    const Element* from = tile + channel * kPitch;
    Element* row = map + static_cast<int64_t>(at.first_channel + channel) * p.owned_positions + at.first_owned;
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

}  // namespace segattn::cuda
