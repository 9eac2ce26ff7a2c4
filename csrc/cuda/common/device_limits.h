// The device properties that launch plans depend on.
#pragma once

namespace segattn::cuda {

struct DeviceLimits {
  int architecture;  // of the code that runs, not of the processor: 80 for sm_80
  int shared_bytes;  // maximum dynamic shared memory of a block, with the opt-in
  int multiprocessors;
  int device_architecture;  // of the processor
};

// Whether the library contains code for sm_90a, which runs on sm_90 and no other architecture: setup.py compiles the
// files named *_sm90.cu where the build is for sm_90. Code that refers to them stands behind `if constexpr`.
#ifdef SEGATTN_SM90A
constexpr bool kHasSm90aFiles = true;
#else
constexpr bool kHasSm90aFiles = false;
#endif

}  // namespace segattn::cuda
