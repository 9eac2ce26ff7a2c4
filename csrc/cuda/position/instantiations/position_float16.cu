#include "cuda/position/launch.cuh"

namespace segattn::cuda {

template void launch_weighted_sum<Mma16<__half>, PositionSum::kForward>(
    const WeightedSumParams&, const DeviceLimits&, cudaStream_t);
template void launch_weighted_sum<Mma16<__half>, PositionSum::kValueGradient>(
    const WeightedSumParams&, const DeviceLimits&, cudaStream_t);
template void launch_query_key_gradient<Mma16<__half>>(
    const QueryKeyGradientParams&, const DeviceLimits&, cudaStream_t);

}  // namespace segattn::cuda
