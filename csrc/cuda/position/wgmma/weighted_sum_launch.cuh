// Definition of the launch of the weighted sum on Hopper. Only the files of instantiations/ include this.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/position/wgmma/launch.h"
#include "cuda/position/wgmma/weighted_sum.cuh"
#include "cuda/position/wgmma/weighted_sum_tiles.h"

namespace segattn::cuda {

template <class Element, PositionSum kSum, Keys kKeys>
void launch_wgmma_weighted_sum(const WgmmaWeightedSumParams& params, cudaStream_t stream) {
  const WeightedSumParams& p = params.problem;
  const int64_t blocks = static_cast<int64_t>(p.tiles) * p.splits;
  with_wgmma_weighted_sum_tile<Element>(p.key_channels, p.value_channels, p.owned_positions, [&]<class Traits>() {
    SEGATTN_LAUNCH_CLUSTER(
        (wgmma_weighted_sum_kernel<Traits, kSum, kKeys>), Traits::kCluster, dim3(grid_blocks(blocks)),
        dim3(Traits::kThreads), Traits::kSharedBytes, stream, params);
  });
}

#define SEGATTN_INSTANTIATE_WGMMA_WEIGHTED_SUM_OF(Element, kSum, kKeys)             \
  template void launch_wgmma_weighted_sum<Element, PositionSum::kSum, Keys::kKeys>( \
      const WgmmaWeightedSumParams&, cudaStream_t);

#define SEGATTN_INSTANTIATE_WGMMA_WEIGHTED_SUM(Element)               \
  SEGATTN_INSTANTIATE_WGMMA_WEIGHTED_SUM_OF(Element, kForward, kAll)  \
  SEGATTN_INSTANTIATE_WGMMA_WEIGHTED_SUM_OF(Element, kForward, kKept) \
  SEGATTN_INSTANTIATE_WGMMA_WEIGHTED_SUM_OF(Element, kValueGradient, kAll)

}  // namespace segattn::cuda
