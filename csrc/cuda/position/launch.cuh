// Definitions of the tensor-core launches. Only the files of instantiations/ include this.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/position/launch.h"
#include "cuda/position/plan.cuh"

namespace segattn::cuda {

template <class Mma, PositionSum kSum, Keys kKeys>
void launch_weighted_sum(const WeightedSumParams& params, const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>(params.tiles) * params.splits;
  with_weighted_sum_tile<Mma>(params.key_channels, params.value_channels, limits.shared_bytes, [&]<class Traits>() {
    SEGATTN_LAUNCH(
        (weighted_sum_kernel<Traits, kSum, kKeys>), dim3(grid_blocks(blocks)), dim3(Traits::kThreads),
        Traits::shared_bytes(params.key_channels), stream, params);
  });
}

template <class Mma, Keys kKeys>
void launch_query_key_gradient(const QueryKeyGradientParams& params, const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t blocks = params.batch * params.groups * params.ranges;
  with_query_key_gradient_tile<Mma>(
      params.key_channels, params.value_channels, limits.shared_bytes, [&]<class Traits>() {
        SEGATTN_LAUNCH(
            (query_key_gradient_kernel<Traits, kKeys>), dim3(grid_blocks(blocks)), dim3(Traits::kThreads),
            Traits::shared_bytes(params.key_channels, params.value_channels), stream, params);
      });
}

#define SEGATTN_INSTANTIATE_WEIGHTED_SUM(Mma, kSum, kKeys)                \
  template void launch_weighted_sum<Mma, PositionSum::kSum, Keys::kKeys>( \
      const WeightedSumParams&, const DeviceLimits&, cudaStream_t);

#define SEGATTN_INSTANTIATE_QUERY_KEY_GRADIENT(Mma, kKeys)   \
  template void launch_query_key_gradient<Mma, Keys::kKeys>( \
      const QueryKeyGradientParams&, const DeviceLimits&, cudaStream_t);

#define SEGATTN_INSTANTIATE_POSITION(Mma)                     \
  SEGATTN_INSTANTIATE_WEIGHTED_SUM(Mma, kForward, kAll)       \
  SEGATTN_INSTANTIATE_WEIGHTED_SUM(Mma, kForward, kKept)      \
  SEGATTN_INSTANTIATE_WEIGHTED_SUM(Mma, kValueGradient, kAll) \
  SEGATTN_INSTANTIATE_QUERY_KEY_GRADIENT(Mma, kAll)           \
  SEGATTN_INSTANTIATE_QUERY_KEY_GRADIENT(Mma, kKept)

}  // namespace segattn::cuda
