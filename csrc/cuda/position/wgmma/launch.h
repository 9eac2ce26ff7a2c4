// The launches of position attention's kernels on Hopper. Element: __half or __nv_bfloat16. Each kernel and element
// type has its own file of instantiations/.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/device_limits.h"
#include "cuda/position/wgmma/params.h"

namespace segattn::cuda {

// The tile is that of with_wgmma_weighted_sum_tile.
template <class Element, PositionSum kSum, Keys kKeys>
void launch_wgmma_weighted_sum(const WgmmaWeightedSumParams& params, cudaStream_t stream);

// The tile is that of with_wgmma_query_key_gradient_tile, which has one for the problem.
template <class Element, Keys kKeys>
void launch_wgmma_query_key_gradient(
    const WgmmaQueryKeyGradientParams& params, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace segattn::cuda
