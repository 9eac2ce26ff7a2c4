// The SIMT kernel's launch, instantiated for every element type and sum by position_simt.cu.
#pragma once

#include <cuda_runtime.h>

#include "cuda/position/params.h"

namespace segattn::cuda {

// Cuts the sum into blocks (owned_blocks and channel_blocks need not be filled) and launches it. T: __half,
// __nv_bfloat16, float or double.
template <class T, PositionSum kSum>
void launch_simt_sum(SimtParams params, cudaStream_t stream);

}  // namespace segattn::cuda
