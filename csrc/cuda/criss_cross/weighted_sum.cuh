// Weighted sums over a line with any kind of weights: aggregation, the gradients of affinity and aggregation, mean_key,
// and criss-cross attention for lines whose weights do not fit in shared memory.
#pragma once

#include "cuda/criss_cross/line_weights.cuh"

namespace segattn::cuda {

template <class Arithmetic, LineWeight kWeight, LineOwner kOwner>
__device__ __forceinline__ void line_sum(const LineSumParams& p, LineWord<typename Arithmetic::Element>* shared) {
  LineWeights<Arithmetic, StripShape> weights(p, shared);
  const auto& block = weights.block;
  for (int first = 0; first < p.lines.length; first += p.positions_per_pass) {
    weights.first_query = kOwner == LineOwner::kKeys ? first : block.owned_begin;
    weights.first_key = kOwner == LineOwner::kKeys ? block.owned_begin : first;
    if constexpr (kWeight == LineWeight::kGiven) {
      weights.copy_given_weights();
    } else {
      weights.for_tiles([&](int query, int key) {
        weights.compute_weights(query, key);
        if constexpr (kWeight == LineWeight::kGradient) {
          weights.compute_energy_gradients(query, key);
        }
      });
    }
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
    line_sum<Arithmetic, kWeight, kOwner>(p, shared);
  }
}

}  // namespace segattn::cuda
