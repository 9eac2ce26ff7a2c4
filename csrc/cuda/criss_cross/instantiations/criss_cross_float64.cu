#include "cuda/criss_cross/launch.cuh"

namespace segattn {

SEGATTN_INSTANTIATE_LINES(LineSimt<double>)

} // namespace segattn
