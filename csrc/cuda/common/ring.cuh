// A ring of shared-memory stages between a producer warp and consumer warpgroups (sm_90a). Each stage has two memory
// barriers: `full`, which bulk copies complete, and `empty`, at which the consumers arrive when they have read it.
#pragma once

#include <cstdint>

#include "cuda/common/ptx_sm90.cuh"

namespace segattn::cuda {

// A place in the ring, and the parity of the phase that a consumer waits for there. A producer waits for the opposite
// parity at `empty`, so its first pass over the ring does not wait.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace segattn::cuda
