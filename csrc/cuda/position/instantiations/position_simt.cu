#include "cuda/common/launch.cuh"
#include "cuda/common/math.h"
#include "cuda/position/launch.h"
#include "cuda/position/simt.cuh"

namespace segattn::cuda {

template <class T, PositionSum kSum, Keys kKeys>
void launch_simt_sum(SimtParams params, cudaStream_t stream) {
  using Traits = SimtTraits<T, kSum, kKeys>;
  params.owned_blocks = ceil_div(params.owned_positions, Traits::kTile);
  params.channel_blocks = ceil_div(params.out_channels, Traits::kChannels);
  SEGATTN_LAUNCH(
      (simt_sum_kernel<Traits>), dim3(grid_blocks(params.batch * params.owned_blocks * params.channel_blocks)),
      dim3(Traits::kThreads), Traits::kSharedBytes, stream, params);
}

#define SEGATTN_INSTANTIATE_SIMT_SUM(T, kSum, kKeys) \
  template void launch_simt_sum<T, PositionSum::kSum, Keys::kKeys>(SimtParams, cudaStream_t);

#define SEGATTN_INSTANTIATE_SIMT_SUMS(T)                 \
  SEGATTN_INSTANTIATE_SIMT_SUM(T, kForward, kAll)        \
  SEGATTN_INSTANTIATE_SIMT_SUM(T, kForward, kKept)       \
  SEGATTN_INSTANTIATE_SIMT_SUM(T, kValueGradient, kAll)  \
  SEGATTN_INSTANTIATE_SIMT_SUM(T, kQueryGradient, kAll)  \
  SEGATTN_INSTANTIATE_SIMT_SUM(T, kQueryGradient, kKept) \
  SEGATTN_INSTANTIATE_SIMT_SUM(T, kKeyGradient, kAll)

SEGATTN_INSTANTIATE_SIMT_SUMS(__half)
SEGATTN_INSTANTIATE_SIMT_SUMS(__nv_bfloat16)
SEGATTN_INSTANTIATE_SIMT_SUMS(float)
SEGATTN_INSTANTIATE_SIMT_SUMS(double)
SEGATTN_INSTANTIATE_SIMT_SUM(float, kCorrectedQueryGradient, kAll)
SEGATTN_INSTANTIATE_SIMT_SUM(float, kCorrectedQueryGradient, kKept)

}  // namespace segattn::cuda
