#include "cuda/channel/gram.cuh"
#include "cuda/channel/input_gradient.cuh"
#include "cuda/channel/launch.h"

namespace segattn::cuda {

template <class T>
void launch_gram(const GramParams& params, cudaStream_t stream) {
  using Traits = GramTraits<Mma16<T>>;
  static_assert(Traits::kTile == kGramTile && Traits::kDepth == kGramDepth);
  const int64_t blocks = params.batch * params.tile_pairs * params.splits;
  SEGATTN_LAUNCH(
      (gram_kernel<Traits>), dim3(grid_blocks(blocks)), dim3(Traits::kThreads), Traits::kSharedBytes, stream, params);
}

template <class T>
void launch_input_gradient(const InputGradientParams& params, int64_t batch, cudaStream_t stream) {
  using Traits = InputGradientTraits<Mma16<T>>;
  const int64_t blocks = batch * params.channel_tiles * params.position_tiles;
  SEGATTN_LAUNCH(
      (channel_combine_kernel<Traits>), dim3(grid_blocks(blocks)), dim3(Traits::kThreads), Traits::kSharedBytes, stream,
      params);
}

template void launch_gram<__half>(const GramParams&, cudaStream_t);
template void launch_gram<__nv_bfloat16>(const GramParams&, cudaStream_t);
template void launch_input_gradient<__half>(const InputGradientParams&, int64_t, cudaStream_t);
template void launch_input_gradient<__nv_bfloat16>(const InputGradientParams&, int64_t, cudaStream_t);

}  // namespace segattn::cuda
