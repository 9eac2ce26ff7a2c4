// Parameters of the gradients of query and key on Hopper: those of the mma.sync kernel, and the maps of the operands
// for bulk copies.
#pragma once

#include <cuda.h>

#include "cuda/position/params.h"

namespace segattn::cuda {

struct WgmmaQueryKeyGradientParams {
  QueryKeyGradientParams problem;
  CUtensorMap query;        // (B, E, N), boxes of all key channels
  CUtensorMap key;          // (B, E, M), boxes of all key channels
  CUtensorMap value;        // (B, C, M), boxes of 32 channels
  CUtensorMap grad_output;  // (B, C, N), boxes of 32 channels
};

}  // namespace segattn::cuda
