// Parameters of position attention's kernels on Hopper: those of the mma.sync kernels (cuda/position/params.h), and the
// maps of the operands for bulk copies, by which alone the kernels read them.
#pragma once

#include <cuda.h>

#include "cuda/position/params.h"

namespace segattn::cuda {

// Boxes: WgmmaWeightedSumTraits.
struct WgmmaWeightedSumParams {
  WeightedSumParams problem;
  CUtensorMap owned;     // (B, E, owned_positions), boxes of kKeyChannels channels
  CUtensorMap streamed;  // (B, E, streamed_positions), boxes of kStreamedBox channels
  CUtensorMap values;    // (B, C, streamed_positions), boxes of kValueBox channels
};

struct WgmmaQueryKeyGradientParams {
  QueryKeyGradientParams problem;
  CUtensorMap query;        // (B, E, N), boxes of all key channels
  CUtensorMap key;          // (B, E, M), boxes of all key channels
  CUtensorMap value;        // (B, C, M), boxes of 32 channels
  CUtensorMap grad_output;  // (B, C, N), boxes of 32 channels
};

}  // namespace segattn::cuda
