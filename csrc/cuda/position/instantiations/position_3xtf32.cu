#include "cuda/position/launch.cuh"

namespace segattn::cuda {

template void launch_weighted_sum<MmaTf32<3>, PositionSum::kForward>(
    const WeightedSumParams&, const DeviceLimits&, cudaStream_t);
template void launch_weighted_sum<MmaTf32<3>, PositionSum::kValueGradient>(
    const WeightedSumParams&, const DeviceLimits&, cudaStream_t);
template void launch_query_key_gradient<MmaTf32<3>>(const QueryKeyGradientParams&, const DeviceLimits&, cudaStream_t);

}  // namespace segattn::cuda
