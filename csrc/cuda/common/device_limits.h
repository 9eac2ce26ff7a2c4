// What a launch choice needs to know of the device.
#pragma once

namespace segattn::cuda {

struct DeviceLimits {
  int architecture;  // 80 for sm_80: of the code that runs, not only of the processor
  int shared_bytes;  // dynamic shared memory a block may ask for
  int multiprocessors;
};

}  // namespace segattn::cuda
