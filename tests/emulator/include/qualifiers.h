// CUDA's qualifiers for a host compiler.
#pragma once

#ifndef SEGATTN_EMULATED
#error "tests/emulator/include is for builds with SEGATTN_EMULATED"
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
// Thread-local storage places a library's static shared arrays in one segment, which the runtime finds and poisons.
#define __shared__ static thread_local
