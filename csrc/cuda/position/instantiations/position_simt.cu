#include "cuda/common/launch.cuh"
#include "cuda/common/math.h"
#include "cuda/position/simt.cuh"
#include "cuda/position/simt_launch.h"

namespace segattn::cuda {

template <class T, PositionSum kSum>
void launch_simt_sum(SimtParams params, cudaStream_t stream) {
  using Traits = SimtTraits<T, kSum>;
  params.owned_blocks = ceil_div(params.owned_positions, Traits::kTile);
  params.channel_blocks = ceil_div(params.out_channels, Traits::kChannels);
  SEGATTN_LAUNCH(
      (simt_sum_kernel<Traits>), dim3(grid_blocks(params.batch * params.owned_blocks * params.channel_blocks)),
      dim3(Traits::kThreads), Traits::kSharedBytes, stream, params);
}

#define SEGATTN_SIMT_SUMS(T)                                                               \
  template void launch_simt_sum<T, PositionSum::kForward>(SimtParams, cudaStream_t);       \
  template void launch_simt_sum<T, PositionSum::kValueGradient>(SimtParams, cudaStream_t); \
  template void launch_simt_sum<T, PositionSum::kQueryGradient>(SimtParams, cudaStream_t); \
  template void launch_simt_sum<T, PositionSum::kKeyGradient>(SimtParams, cudaStream_t)

SEGATTN_SIMT_SUMS(__half);
SEGATTN_SIMT_SUMS(__nv_bfloat16);
SEGATTN_SIMT_SUMS(float);
SEGATTN_SIMT_SUMS(double);

}  // namespace segattn::cuda
