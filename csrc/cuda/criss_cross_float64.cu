#include "criss_cross_launch.cuh"

namespace segattn {

SEGATTN_INSTANTIATE_LINES(LineSimt<double>)

} // namespace segattn
