// Definition of the launch of the gradients of query and key on Hopper. Only the files of instantiations/ include this.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/position/wgmma/launch.h"
#include "cuda/position/wgmma/query_key_gradient.cuh"
#include "cuda/position/wgmma/query_key_gradient_tiles.h"

namespace segattn::cuda {

template <class Element, Keys kKeys>
void launch_wgmma_query_key_gradient(
    const WgmmaQueryKeyGradientParams& params, const DeviceLimits& limits, cudaStream_t stream) {
  const QueryKeyGradientParams& p = params.problem;
  const int64_t blocks = p.batch * p.groups * p.ranges;
  with_wgmma_query_key_gradient_tile<Element>(
      p.key_channels, p.value_channels, limits.shared_bytes, [&]<class Traits>() {
        SEGATTN_LAUNCH(
            (wgmma_query_key_gradient_kernel<Traits, kKeys>), dim3(grid_blocks(blocks)), dim3(Traits::kThreads),
            Traits::shared_bytes(p.value_channels), stream, params);
      });
}

#define SEGATTN_INSTANTIATE_WGMMA_QUERY_KEY_GRADIENT(Element)                 \
  template void launch_wgmma_query_key_gradient<Element, Keys::kAll>(         \
      const WgmmaQueryKeyGradientParams&, const DeviceLimits&, cudaStream_t); \
  template void launch_wgmma_query_key_gradient<Element, Keys::kKept>(        \
      const WgmmaQueryKeyGradientParams&, const DeviceLimits&, cudaStream_t);

}  // namespace segattn::cuda
