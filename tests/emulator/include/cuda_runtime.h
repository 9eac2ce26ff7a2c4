// Stands in for CUDA's <cuda_runtime.h> when g++ compiles csrc/cuda for the emulator: qualifiers, built-in variables,
// intrinsics (device_intrinsics.h) and the runtime API of host code (runtime_api.h).
#pragma once

#include "emulator.h"
#include "vector_functions.h"
#include "vector_types.h"

#define threadIdx (::segattn::emulator::current->thread_index)
#define blockIdx (::segattn::emulator::current->block->block_index)
#define blockDim (::segattn::emulator::current->block->block_size)
#define gridDim (::segattn::emulator::current->block->grid_size)

inline constexpr int warpSize = 32;

#include "device_intrinsics.h"
#include "runtime_api.h"
