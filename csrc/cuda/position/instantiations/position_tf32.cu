#include "cuda/position/launch.cuh"

namespace segattn::cuda {

SEGATTN_INSTANTIATE_POSITION(MmaTf32<1>)

}  // namespace segattn::cuda
