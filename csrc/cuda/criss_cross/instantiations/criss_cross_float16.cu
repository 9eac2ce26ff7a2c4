#include "cuda/criss_cross/launch.cuh"

namespace segattn::cuda {

SEGATTN_INSTANTIATE_LINES(LineMma16<__half>)

}  // namespace segattn::cuda
