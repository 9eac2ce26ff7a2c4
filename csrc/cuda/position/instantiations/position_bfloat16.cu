#include "cuda/position/launch.cuh"

namespace segattn::cuda {

template void launch_weighted_sum<Mma16<__nv_bfloat16>, PositionSum::kForward>(
    const WeightedSumParams&, const DeviceLimits&, cudaStream_t);
template void launch_weighted_sum<Mma16<__nv_bfloat16>, PositionSum::kValueGradient>(
    const WeightedSumParams&, const DeviceLimits&, cudaStream_t);
template void launch_query_key_gradient<Mma16<__nv_bfloat16>>(
    const QueryKeyGradientParams&, const DeviceLimits&, cudaStream_t);

}  // namespace segattn::cuda
