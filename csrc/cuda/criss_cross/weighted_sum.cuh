// Weighted sums over a line with any kind of weights: aggregation, the gradients of affinity and aggregation, mean_key,
// and criss-cross attention for lines whose weights do not fit in shared memory.
#pragma once

#include "cuda/criss_cross/line_weights.cuh"

namespace segattn::cuda {

// Given weights: the sums of several passes stay in registers, because their roundings to 16 bits would add up. Every
// kLineChannels channels then copy all weights again.
template <class Arithmetic, LineOwner kOwner>
__device__ __forceinline__ void line_sum_given(LineWeights<Arithmetic, StripShape>& weights, const LineSumParams& p) {
  using Weights = LineWeights<Arithmetic, StripShape>;
  const int first_channel = weights.channel_group() * p.channels_per_group;
  int channel = first_channel, channel_end = 0;
  do {
    typename Weights::ChannelSums sums = {};
    for (int first = 0; first < p.lines.length; first += p.positions_per_pass) {
      if (channel == first_channel || p.positions_per_pass < p.lines.length) {
        weights.template start_pass<kOwner>(first);
        weights.copy_given_weights();
      }
      weights.template add_values<kOwner>(
          sums, p.values, channel, first, min(first + p.positions_per_pass, p.lines.length));
    }
    channel_end = weights.channel_end(p.values);
    weights.template store_sums<MergeScale::kNone, Weights::kSumRows, Weights::kOwnedTiles>(
        sums, p.output, channel, channel_end, p.accumulate);
    channel += kLineChannels;
  } while (channel < channel_end);
}

// Computed weights: a pass adds to the output of the passes before it. The products of the weights leave no registers
// for the sums.
template <class Arithmetic, LineWeight kWeight, LineOwner kOwner>
__device__ __forceinline__ void line_sum_computed(
    LineWeights<Arithmetic, StripShape>& weights, const LineSumParams& p) {
  for (int first = 0; first < p.lines.length; first += p.positions_per_pass) {
    weights.template start_pass<kOwner>(first);
    weights.for_tiles([&](int query, int key) {
      weights.compute_weights(query, key);
      if constexpr (kWeight == LineWeight::kGradient) {
        weights.compute_energy_gradients(query, key);
      }
    });
    if constexpr (kWeight == LineWeight::kGradient && kOwner == LineOwner::kQueries) {
      weights.sum_energy_gradients(p.grad_sum, p.accumulate || first > 0);
    }
    weights.template sum_values<kOwner>(
        p.values, p.output, first, min(first + p.positions_per_pass, p.lines.length), p.accumulate || first > 0);
    __syncthreads();  // the weights of the next pass overwrite these
  }
}

template <class Arithmetic, LineWeight kWeight, LineOwner kOwner>
__global__ void __launch_bounds__(kMaxLineThreads<Arithmetic, StripShape>) line_sum_kernel(const LineSumParams p) {
  if constexpr (kLineCompiled<Arithmetic>) {
    SEGATTN_DYNAMIC_SHARED(LineWord<typename Arithmetic::Element>, shared);
    LineWeights<Arithmetic, StripShape> weights(p, shared);
    if constexpr (kWeight == LineWeight::kGiven) {
      line_sum_given<Arithmetic, kOwner>(weights, p);
    } else {
      line_sum_computed<Arithmetic, kWeight, kOwner>(weights, p);
    }
  }
}

}  // namespace segattn::cuda
