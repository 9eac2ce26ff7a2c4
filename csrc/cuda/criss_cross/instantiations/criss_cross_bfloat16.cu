#include "cuda/criss_cross/launch.cuh"

namespace segattn::cuda {

SEGATTN_INSTANTIATE_LINES(LineMma16<__nv_bfloat16>)

}  // namespace segattn::cuda
