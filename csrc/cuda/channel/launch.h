// The launches of channel attention's tensor-core kernels, for 16-bit types; instantiated by channel_gemm.cu.
#pragma once

#include <cuda_runtime.h>

#include "cuda/channel/params.h"

namespace segattn::cuda {

constexpr int kGramTile = 128;     // channels
constexpr int kGramDepth = 64;     // positions
constexpr int kMaxGramSplits = 8;  // more of them write and read more partial matrices than input

// T: __half, __nv_bfloat16
template <class T>
void launch_gram(const GramParams& params, cudaStream_t stream);

template <class T>
void launch_channel_combine(const ChannelCombineParams& params, int64_t batch, cudaStream_t stream);

}  // namespace segattn::cuda
