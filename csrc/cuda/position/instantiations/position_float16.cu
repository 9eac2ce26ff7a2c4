#include "cuda/position/launch.cuh"

namespace segattn::cuda {

template void launch_weighted_sum<Mma16<__half>, true>(const WeightedSumParams&, const DeviceLimits&, cudaStream_t);
template void launch_weighted_sum<Mma16<__half>, false>(const WeightedSumParams&, const DeviceLimits&, cudaStream_t);
template void launch_query_key_gradient<Mma16<__half>>(
    const QueryKeyGradientParams&, const DeviceLimits&, cudaStream_t);

}  // namespace segattn::cuda
