// Two or all three gradients of criss-cross attention in one kernel. Blocks own whole lines and compute their weights
// once: the weights give the value gradient and are then overwritten by the gradients of the energies. A gradient whose
// data is null is left out.
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
    weights.template sum_values<kOwner>(values, output, 0, p.lines.length, p.accumulate);
  }

  // A line is one tile: grad_output, staged with value, serves both products.
  __device__ __forceinline__ void value_and_energy_gradients() {
    typename Weights::Products d;
    Weights::Block::clear(d);
    for (int channel = 0; channel < p.value.channels; channel += kProductChannels) {
      weights.block.load_product(p.grad_output, p.value, channel, 0, 0);
      weights.block.multiply_staged(d, p.lines.length, p.lines.length);
      if (p.grad_value.data != nullptr) {
        typename Weights::template Sums<kProductChannels / 16, 1> sums = {};
        weights.template add_staged<LineOwner::kKeys, kProductChannels / 16, 1>(sums, 0, p.lines.length);
        weights.template store_sums<MergeScale::kNone, kProductChannels / 16, 1>(
            sums, p.grad_value, channel, p.value.channels, p.accumulate);
      }
    }
    __syncthreads();  // all warps have read the weights that the gradients overwrite
    weights.replace_by_energy_gradients(d, 0, 0);
  }

  // Lines of several tiles: grad_output and value are read again for each pair of tiles.
  __device__ __forceinline__ void value_and_energy_gradients_by_tiles() {
    if (p.grad_value.data != nullptr) {
      sum<LineOwner::kKeys>(p.grad_output, p.grad_value);
    }
    weights.for_tiles([&](int query, int key) { weights.compute_energy_gradients(query, key); });
  }

  __device__ __forceinline__ void run() {
    weights.for_tiles([&](int query, int key) { weights.compute_weights(query, key); });
    if constexpr (Shape::kTile == kMaxOwned) {
      value_and_energy_gradients();
    } else {  // strips have no registers for both at once
      value_and_energy_gradients_by_tiles();
    }
    if (p.grad_query.data != nullptr) {
      weights.sum_energy_gradients(p.grad_sum, p.accumulate);
      sum<LineOwner::kQueries>(p.key, p.grad_query);
    }
    if (p.grad_key.data != nullptr) {
      sum<LineOwner::kKeys>(p.query, p.grad_key);
    }
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
