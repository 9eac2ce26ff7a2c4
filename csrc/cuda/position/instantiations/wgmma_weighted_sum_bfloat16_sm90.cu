#include "cuda/position/wgmma/weighted_sum_launch.cuh"

namespace segattn::cuda {

SEGATTN_INSTANTIATE_WGMMA_WEIGHTED_SUM(__nv_bfloat16)

}  // namespace segattn::cuda
