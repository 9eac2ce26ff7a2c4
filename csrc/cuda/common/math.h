// Integer and logarithm helpers of host and device code.
#pragma once

#include <cuda_runtime.h>

namespace segattn::cuda {

constexpr float kLog2E = 1.4426950408889634f;  // log2(e)

template <class A, class B>
__host__ __device__ constexpr auto ceil_div(A dividend, B divisor) {
  return (dividend + divisor - 1) / divisor;
}

// x rounded up to a multiple of `unit`.
template <class A, class B>
__host__ __device__ constexpr auto round_up(A x, B unit) {
  return ceil_div(x, unit) * unit;
}

}  // namespace segattn::cuda
