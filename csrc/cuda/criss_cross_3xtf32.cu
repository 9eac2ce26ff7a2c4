#include "criss_cross_launch.cuh"

namespace segattn {

SEGATTN_INSTANTIATE_LINES(LineTf32<3>)

} // namespace segattn
