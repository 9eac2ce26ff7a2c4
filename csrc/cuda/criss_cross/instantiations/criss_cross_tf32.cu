#include "cuda/criss_cross/launch.cuh"

namespace segattn::cuda {

SEGATTN_INSTANTIATE_LINES(LineTf32<1>)

}  // namespace segattn::cuda
