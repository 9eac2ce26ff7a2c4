#include "cuda/criss_cross/launch.cuh"

namespace segattn::cuda {

// processors before sm_80
SEGATTN_INSTANTIATE_LINES(LineSimt<__half>)
SEGATTN_INSTANTIATE_LINES(LineSimt<__nv_bfloat16>)
SEGATTN_INSTANTIATE_LINES(LineSimt<float>)

}  // namespace segattn::cuda
