// The device properties that launch plans depend on.
#pragma once

namespace segattn::cuda {

struct DeviceLimits {
  int architecture;  // of the code that runs, not of the processor: 80 for sm_80
  int shared_bytes;  // maximum dynamic shared memory of a block, with the opt-in
  int multiprocessors;
};

}  // namespace segattn::cuda
