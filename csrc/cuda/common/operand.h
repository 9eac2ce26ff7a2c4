// A matrix in global memory, as the kernels' parameters hold it.
#pragma once

#include <cstdint>

namespace segattn::cuda {

// (B, channels, positions): channel c of sample b starts at data + b * batch_stride + c * row_stride; positions are
// contiguous. Strides are in elements.
struct Operand {
  const void* data;
  int64_t batch_stride;
  int64_t row_stride;
};

}  // namespace segattn::cuda
