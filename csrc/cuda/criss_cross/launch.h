// The launches of the criss-cross kernels, instantiated by one file an arithmetic (LineMma16<T>, LineTf32<1 or 3>,
// LineSimt<T>). They cut the lines into blocks: of `lines`, batch, count, length and skips_self are given.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/device_limits.h"
#include "cuda/criss_cross/params.h"

namespace segattn::cuda {

template <class Arithmetic>
void launch_line_statistics(LineStatisticsParams params, const DeviceLimits& limits, cudaStream_t stream);

template <class Arithmetic>
void launch_line_product(LineProductParams params, const DeviceLimits& limits, cudaStream_t stream);

template <class Arithmetic, LineWeight kWeight, LineOwner kOwner>
void launch_line_sum(LineSumParams params, const DeviceLimits& limits, cudaStream_t stream);

// whether the weights of 16 whole lines' queries fit shared memory, as launch_line_attention needs
template <class Arithmetic>
bool line_attention_fits(Lines lines, const LineFeatures& output, const DeviceLimits& limits);

template <class Arithmetic>
void launch_line_attention(LineAttentionParams params, const DeviceLimits& limits, cudaStream_t stream);

// false, and nothing launched, where the weights of whole lines do not fit shared memory
template <class Arithmetic>
bool launch_line_backward(LineBackwardParams params, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace segattn::cuda
