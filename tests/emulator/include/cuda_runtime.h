// Stands in for CUDA's <cuda_runtime.h> when csrc/cuda is compiled by g++ for the emulator: qualifiers, built-in
// variables, intrinsics (device_intrinsics.h) and the part of the runtime API that host launch code uses (runtime_api.h).
#pragma once

#ifndef SEGATTN_EMULATED
#error "tests/emulator/include is for builds with SEGATTN_EMULATED"
#endif

#include "emulator.h"
#include "vector_functions.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
// Thread-local storage gathers a library's static shared arrays in one segment, which the runtime can find and poison.
#define __shared__ static thread_local

#define threadIdx (::segattn::emulator::current->thread_index)
#define blockIdx (::segattn::emulator::block.block_index)
#define blockDim (::segattn::emulator::block.block_size)
#define gridDim (::segattn::emulator::block.grid_size)
#ifndef warpSize
#define warpSize 32
#endif

#include "device_intrinsics.h"
#include "runtime_api.h"
