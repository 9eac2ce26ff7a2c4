// Which kernels serve position attention: "wgmma", Hopper's (wgmma/), for 16-bit types; "mma", mma.sync; "simt".
#pragma once

#include <cstdint>

#include "cuda/common/launch_context.h"

namespace segattn::cuda {

enum class PositionEngine { kSimt, kMma, kWgmma };

constexpr int kWgmmaMostKeyChannels = 128;

// The engine for E = key_channels, any C: the fastest that serves the device, dtype and E, or the one that is forced. A
// forced engine passes on only the dtypes that it has no kernels for: wgmma passes float32 to mma, which passes float64
// to simt. Where it cannot serve for another reason, throws std::runtime_error.
//
// A library without sm_90a has no kernels of wgmma/: what launches them is inside `if constexpr (kHasSm90aFiles)`
// (device_limits.h).
PositionEngine choose_position_engine(const LaunchContext& context, int64_t key_channels);

// Called before SIMT kernels take a problem that no tile fits. Throws where an engine with kernels for the dtype is
// forced.
void check_simt_may_serve(const LaunchContext& context, int64_t key_channels);

}  // namespace segattn::cuda
