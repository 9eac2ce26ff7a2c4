// The launch of the weighted sum on Hopper. Each element type has its own file of instantiations/.
#pragma once

#include <cuda_runtime.h>

#include "cuda/position/wgmma/weighted_sum_params.h"

namespace segattn::cuda {

// Element: __half or __nv_bfloat16. The tile is that of with_wgmma_weighted_sum_tile.
template <class Element, PositionSum kSum, Keys kKeys>
void launch_wgmma_weighted_sum(const WgmmaWeightedSumParams& params, cudaStream_t stream);

}  // namespace segattn::cuda
