// Sums over a line by weights of any kind: aggregation, all its gradients, and criss-cross attention where the weights of
// whole lines do not fit shared memory.
#pragma once

#include "cuda/criss_cross/line_weights.cuh"

namespace segattn::cuda {

template <class Arithmetic, LineWeight kWeight, LineOwner kOwner>
__device__ __forceinline__ void line_sum(const LineSumParams& p, LineWord<typename Arithmetic::Element>* shared) {
  LineWeights<Arithmetic, StripShape> weights(p, shared);
  const auto& block = weights.block;
  for (int first = 0; first < p.lines.length; first += p.part) {
    weights.first_query = kOwner == LineOwner::kKeys ? first : block.owned_begin;
    weights.first_key = kOwner == LineOwner::kKeys ? block.owned_begin : first;
    if constexpr (kWeight == LineWeight::kGiven) {
      weights.copy_given();
    } else {
      weights.for_pieces([&](int query, int key) {
        weights.make_softmax(query, key);
        if constexpr (kWeight == LineWeight::kGradient) {
          weights.make_gradient(query, key);
        }
      });
    }
    if constexpr (kWeight == LineWeight::kGradient && kOwner == LineOwner::kQueries) {
      weights.sum_gradients(p.grad_sum, p.accumulate || first > 0);
    }
    weights.template apply<kOwner>(
        p.values, p.output, first, min(first + p.part, p.lines.length), p.accumulate || first > 0);
    __syncthreads();  // the next part's weights take the place of these
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
