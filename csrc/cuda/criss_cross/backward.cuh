// All three gradients of criss-cross attention in one kernel: blocks own whole lines, whose weights are made once, serve
// the value gradient, and turn into the energies' gradient.
#pragma once

#include "cuda/criss_cross/line_weights.cuh"

namespace segattn::cuda {

template <class Arithmetic, class Shape>
struct LineGradients {
  using T = typename Arithmetic::Element;
  using Weights = LineWeights<Arithmetic, Shape>;

  const LineBackwardParams& p;
  Weights weights;

  __device__ __forceinline__ LineGradients(const LineBackwardParams& params, LineWord<T>* shared)
      : p(params), weights(params, shared) {}

  template <LineOwner kOwner>
  __device__ __forceinline__ void sum(const LineFeatures& values, const LineFeatures& output) {
    weights.template apply<kOwner>(values, output, 0, p.lines.length, p.accumulate);
  }

  // A line is a tile: grad_output is staged for both of its uses, with value.
  __device__ __forceinline__ void value_and_energy_gradients() {
    typename Weights::Scores d;
    Weights::Block::clear(d);
    for (int channel = 0; channel < p.value.channels; channel += kProductChannels) {
      weights.block.load_product(p.grad_output, p.value, channel, 0, 0);
      weights.block.multiply_staged(d, p.lines.length, p.lines.length);
      typename Weights::template Sums<kProductChannels / 16, 1> sums = {};
      weights.template add<LineOwner::kKeys, kProductChannels / 16, 1>(sums, 0, p.lines.length);
      weights.template write<MergeScale::kNone, kProductChannels / 16, 1>(
          sums, p.grad_value, channel, p.value.channels, p.accumulate);
    }
    __syncthreads();  // all have taken the weights that their gradients replace
    weights.weigh_gradient(d, 0, 0);
  }

  // Longer lines: grad_output and value are read again for each pair of tiles.
  __device__ __forceinline__ void value_and_energy_gradients_by_tiles() {
    sum<LineOwner::kKeys>(p.grad_output, p.grad_value);
    weights.for_pieces([&](int query, int key) { weights.make_gradient(query, key); });
  }

  __device__ __forceinline__ void run() {
    weights.for_pieces([&](int query, int key) { weights.make_softmax(query, key); });
    if constexpr (Shape::kTile == kMaxOwned) {
      value_and_energy_gradients();
    } else {  // strips have no registers to do both at once
      value_and_energy_gradients_by_tiles();
    }
    weights.sum_gradients(p.grad_sum, p.accumulate);
    sum<LineOwner::kQueries>(p.key, p.grad_query);
    sum<LineOwner::kKeys>(p.query, p.grad_key);
  }
};

template <class Arithmetic, class Shape>
__global__ void __launch_bounds__(kMaxLineThreads<Arithmetic, Shape>) line_backward_kernel(const LineBackwardParams p) {
  if constexpr (kLineCompiled<Arithmetic>) {
    SEGATTN_DYNAMIC_SHARED(LineWord<typename Arithmetic::Element>, shared);
    LineGradients<Arithmetic, Shape>(p, shared).run();
  }
}

}  // namespace segattn::cuda
