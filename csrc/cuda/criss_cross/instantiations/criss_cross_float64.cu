#include "cuda/criss_cross/launch.cuh"

namespace segattn::cuda {

SEGATTN_INSTANTIATE_LINES(LineSimt<double>)

}  // namespace segattn::cuda
