// The launches of position attention's kernels. Each arithmetic has its own file of instantiations/.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/device_limits.h"
#include "cuda/position/params.h"

namespace segattn::cuda {

// Mma: an arithmetic of mma.cuh that has a tile for the problem (plan.cuh).
template <class Mma, PositionSum kSum, Keys kKeys>
void launch_weighted_sum(const WeightedSumParams& params, const DeviceLimits& limits, cudaStream_t stream);

template <class Mma, Keys kKeys>
void launch_query_key_gradient(const QueryKeyGradientParams& params, const DeviceLimits& limits, cudaStream_t stream);

// Sets params.owned_blocks and params.channel_blocks itself. T: __half, __nv_bfloat16, float or double.
// kCorrectedQueryGradient: float only.
template <class T, PositionSum kSum, Keys kKeys>
void launch_simt_sum(SimtParams params, cudaStream_t stream);

}  // namespace segattn::cuda
