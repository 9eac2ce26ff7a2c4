#include "cuda/position/wgmma/weighted_sum_launch.cuh"

namespace segattn::cuda {

SEGATTN_INSTANTIATE_WGMMA_WEIGHTED_SUM(__half)

}  // namespace segattn::cuda
