#include "cuda/position/launch.cuh"

namespace segattn::cuda {

SEGATTN_INSTANTIATE_POSITION(Mma16<__nv_bfloat16>)

}  // namespace segattn::cuda
