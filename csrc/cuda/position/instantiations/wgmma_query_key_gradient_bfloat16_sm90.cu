#include "cuda/position/wgmma/query_key_gradient_launch.cuh"

namespace segattn::cuda {

SEGATTN_INSTANTIATE_WGMMA_QUERY_KEY_GRADIENT(__nv_bfloat16)

}  // namespace segattn::cuda
