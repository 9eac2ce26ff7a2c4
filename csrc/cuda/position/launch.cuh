// Launches of the tensor-core kernels, instantiated by one file an arithmetic.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/position/plan.cuh"

namespace segattn::cuda {

template <class Mma, PositionSum kSum>
void launch_weighted_sum(const WeightedSumParams& params, const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t blocks = params.batch * params.splits * params.owned_blocks * params.channel_blocks;
  with_weighted_sum_tile<Mma>(params.key_channels, params.value_channels, limits.shared_bytes, [&]<class Traits>() {
    SEGATTN_LAUNCH(
        (weighted_sum_kernel<Traits, kSum>), dim3(grid_blocks(blocks)), dim3(Traits::kThreads),
        Traits::shared_bytes(params.key_channels), stream, params);
  });
}

template <class Mma>
void launch_query_key_gradient(const QueryKeyGradientParams& params, const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t blocks = params.batch * params.groups * params.ranges;
  with_query_key_gradient_tile<Mma>(params.key_channels, limits.shared_bytes, [&]<class Traits>() {
    SEGATTN_LAUNCH(
        (query_key_gradient_kernel<Traits>), dim3(grid_blocks(blocks)), dim3(Traits::kThreads),
        Traits::shared_bytes(params.key_channels), stream, params);
  });
}

}  // namespace segattn::cuda
