// Tensor maps: what a bulk tensor copy (ptx_sm90.cuh) knows of a feature map in global memory and of the box that it
// copies. A launch encodes them and passes them as __grid_constant__ parameters.
#pragma once

#include <cuda.h>

#include "cuda/common/operands.h"

namespace segattn::cuda {

// The map of a feature map of 16-bit elements (B, channels, positions), with rows that start on 16 bytes (aligned.h).
// Its box has 64 positions, 128 bytes, of box_channels channels (at most 256), and is stored with 128-byte swizzle.
// What lies outside the tensor, past its positions or channels, is copied as zeros. Throws if the driver refuses.
CUtensorMap tensor_map(const FeatureMap& features, int box_channels);

constexpr int kBoxPositions = 64;

}  // namespace segattn::cuda
