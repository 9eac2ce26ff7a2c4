// The launch of the gradients of query and key on Hopper. Each element type has its own file of instantiations/.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/device_limits.h"
#include "cuda/position/wgmma/query_key_gradient_params.h"

namespace segattn::cuda {

// Element: __half or __nv_bfloat16, with a tile for the problem (query_key_gradient_plan.h).
template <class Element, Keys kKeys>
void launch_wgmma_query_key_gradient(
    const WgmmaQueryKeyGradientParams& params, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace segattn::cuda
