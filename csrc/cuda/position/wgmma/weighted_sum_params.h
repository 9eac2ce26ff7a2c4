// Parameters of the weighted sum on Hopper: those of the mma.sync kernel, and the maps of the operands for bulk copies.
#pragma once

#include <cuda.h>

#include "cuda/position/params.h"

namespace segattn::cuda {

// Boxes: WgmmaWeightedSumTraits. The kernel reads no operand but by its map.
struct WgmmaWeightedSumParams {
  WeightedSumParams problem;
  CUtensorMap owned;     // (B, E, owned_positions), boxes of kKeyChannels channels
  CUtensorMap streamed;  // (B, E, streamed_positions), boxes of kStreamedBox channels
  CUtensorMap values;    // (B, C, streamed_positions), boxes of kValueBox channels
};

}  // namespace segattn::cuda
