#include "cuda/criss_cross/launch.cuh"

namespace segattn::cuda {

SEGATTN_INSTANTIATE_LINES(LineTf32<3>)

}  // namespace segattn::cuda
