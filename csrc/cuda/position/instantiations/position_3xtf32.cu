#include "cuda/position/launch.cuh"

namespace segattn::cuda {

SEGATTN_INSTANTIATE_POSITION(MmaTf32<3>)

}  // namespace segattn::cuda
