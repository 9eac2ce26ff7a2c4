// The choice of tile for the weighted sum on Hopper: 256 or 128 channels, and clusters of two blocks where there are
// pairs of owned tiles. Every tile has 128 owned positions. A single block does 128 FLOP for each byte that it reads
// from L2, which allows 704 TFLOP/s at 5.5 TB/s; tiles of 128 channels, which C = 512 does not take, do without
// clusters.
#pragma once

#include "cuda/common/math.h"
#include "cuda/position/wgmma/weighted_sum_traits.cuh"

namespace segattn::cuda {

// Whether two blocks of 256 channels share their copies. An odd number of owned tiles leaves one without a neighbour,
// and a block without positions would occupy a multiprocessor as long as its neighbour does.
template <class Element, int kKeyChannels, class Visit>
void with_wgmma_weighted_sum_cluster(int owned_positions, const Visit& visit) {
  using Pair = WgmmaWeightedSumTraits<Element, 256, kKeyChannels, 2>;
  if (ceil_div(owned_positions, Pair::kOwned) % 2 == 0) {
    visit.template operator()<Pair>();
  } else {
    visit.template operator()<WgmmaWeightedSumTraits<Element, 256, kKeyChannels, 1>>();
  }
}

// Calls visit.operator()<Traits>() with the tile for E = key_channels, at most 128, and C = value_channels. Every
// channel block computes the energies: the width with fewer products is chosen, the larger one of equals.
template <class Element, class Visit>
void with_wgmma_weighted_sum_tile(int key_channels, int value_channels, int owned_positions, const Visit& visit) {
  const auto visit_width = [&]<int kKeyChannels>() {
    const auto products = [&](int channels) { return ceil_div(value_channels, channels) * (kKeyChannels + channels); };
    if (products(128) < products(256)) {
      visit.template operator()<WgmmaWeightedSumTraits<Element, 128, kKeyChannels, 1>>();
    } else {
      with_wgmma_weighted_sum_cluster<Element, kKeyChannels>(owned_positions, visit);
    }
  };
  if (key_channels <= 64) {
    visit_width.template operator()<64>();
  } else {
    visit_width.template operator()<128>();
  }
}

}  // namespace segattn::cuda
