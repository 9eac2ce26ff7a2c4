// How a weighted sum on Hopper is divided into blocks.
#pragma once

#include "cuda/position/plan.cuh"
#include "cuda/position/wgmma/weighted_sum_tiles.h"

namespace segattn::cuda {

template <class Element>
WeightedSumPlan plan_wgmma_weighted_sum(
    int64_t batch, int owned_positions, int streamed_positions, int key_channels, int channels,
    const DeviceLimits& limits) {
  WeightedSumPlan plan;
  with_wgmma_weighted_sum_tile<Element>(key_channels, channels, owned_positions, [&]<class Traits>() {
    plan.found = true;
    plan.owned_blocks = ceil_div(owned_positions, Traits::kOwned);
    plan.channel_blocks = ceil_div(channels, Traits::kChannels);
    plan.tile_positions = Traits::kOwned;
    plan.tile_channels = Traits::kChannels;
    plan.steps = ceil_div(streamed_positions, Traits::kStreamed);
    // A multiprocessor does 2,048 multiply-adds a cycle at full rate; two thirds of that are assumed.
    constexpr double kCyclesPerStep =
        1.5 * Traits::kOwned * Traits::kStreamed * (Traits::kKeyChannels + Traits::kChannels) / 2048;
    choose_splits(
        plan, batch * plan.owned_blocks * plan.channel_blocks, Traits::kCluster * plan.channel_blocks, kCyclesPerStep,
        limits.multiprocessors);
  });
  return plan;
}

}  // namespace segattn::cuda
