// Launches of the criss-cross kernels. One file per arithmetic (LineMma16<T>, LineTf32<1 or 3>, LineSimt<T>)
// instantiates them. They partition the lines into blocks: of `lines`, the caller sets batch, count, length and
// skips_self.
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

// Whether shared memory holds the weights of 16 queries of a line for all of its keys, as launch_line_attention
// requires.
template <class Arithmetic>
bool line_attention_fits(Lines lines, const LineFeatures& output, const DeviceLimits& limits);

template <class Arithmetic>
void launch_line_attention(LineAttentionParams params, const DeviceLimits& limits, cudaStream_t stream);

// Returns false and launches nothing if the weights of whole lines do not fit in shared memory.
template <class Arithmetic>
bool try_launch_line_backward(LineBackwardParams params, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace segattn::cuda
