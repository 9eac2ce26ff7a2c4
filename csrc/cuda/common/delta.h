// The launches of delta_kernel and weight_shift_kernel, for the backward passes that recompute the weights from the
// logsumexp.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/common/launch.cuh"
#include "cuda/common/launch_context.h"
#include "cuda/common/math.h"
#include "cuda/common/operands.h"
#include "cuda/common/row_kernels.cuh"

namespace segattn::cuda {

// delta (B, N) in the dtype of accumulation, allocated with `sizes`: sum_c grad_output * output, with the output before
// rounding where output_low is given, less grad_logsumexp where that is given. grad_output, output, output_low:
// (B, C, *S), N positions; grad_logsumexp: (B, *S), contiguous, dtype of accumulation. rounds_to_tf32: takes
// grad_output rounded to TF32, for kernels whose dP does.
inline Tensor delta_of(
    const LaunchContext& context, const FeatureMap& grad_output, const FeatureMap& output,
    const std::optional<FeatureMap>& output_low, const std::optional<Tensor>& grad_logsumexp,
    const std::vector<int64_t>& sizes, bool rounds_to_tf32 = false) {
  const Tensor delta = allocate(output.tensor, sizes, accumulation_dtype(context.dtype));
  DeltaParams params{};
  params.grad_output = grad_output.operand;
  params.output = output.operand;
  if (output_low.has_value()) {
    params.output_low = output_low->operand;
  }
  params.grad_logsumexp = data_of(grad_logsumexp);
  params.rounds_to_tf32 = rounds_to_tf32;
  params.delta = delta.mutable_data_ptr();
  params.channels = static_cast<int>(output.tensor.size(1));
  params.positions = context.position_count("output", output.positions);
  params.position_blocks = ceil_div(params.positions, 32);
  const int64_t blocks = output.tensor.size(0) * params.position_blocks;
  with_element(context.dtype, [&]<class T>() {
    SEGATTN_LAUNCH((delta_kernel<T>), dim3(grid_blocks(blocks)), dim3(kRowThreads), 0, context.stream, params);
  });
  return delta;
}

// logsumexp (B, *S), contiguous, with inf for -inf
inline Tensor weight_shift(const LaunchContext& context, const Tensor& logsumexp) {
  const Tensor shift = allocate_like(logsumexp);
  const int64_t count = logsumexp.numel();
  with_element(logsumexp.scalar_type(), [&]<class Real>() {
    if constexpr (sizeof(Real) > 2) {
      if (count > 0) {
        SEGATTN_LAUNCH(
            (weight_shift_kernel<Real>), dim3(grid_blocks(ceil_div(count, kRowThreads))), dim3(kRowThreads), 0,
            context.stream, static_cast<const Real*>(logsumexp.const_data_ptr()),
            static_cast<Real*>(shift.mutable_data_ptr()), count);
      }
    }
  });
  return shift;
}

}  // namespace segattn::cuda
