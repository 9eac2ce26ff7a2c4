// The launches of channel attention's tensor-core kernels, for 16-bit types. channel_gemm.cu instantiates them.
#pragma once

#include <cuda_runtime.h>

#include "cuda/channel/params.h"

namespace segattn::cuda {

constexpr int kGramTile = 128;     // channels
constexpr int kGramDepth = 32;     // positions
constexpr int kMaxGramSplits = 8;  // with more, the partials are larger than the input

// T: __half, __nv_bfloat16
template <class T>
void launch_gram(const GramParams& params, cudaStream_t stream);

template <class T>
void launch_input_gradient(const InputGradientParams& params, int64_t batch, cudaStream_t stream);

}  // namespace segattn::cuda
