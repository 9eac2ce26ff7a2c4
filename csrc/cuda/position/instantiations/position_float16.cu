#include "cuda/position/launch.cuh"

namespace segattn::cuda {

SEGATTN_INSTANTIATE_POSITION(Mma16<__half>)

}  // namespace segattn::cuda
