// What an encoded CUtensorMap holds in the emulator. Internal to the runtime.
#pragma once

#include <cstdint>

#include "../include/cuda.h"

namespace segattn::emulator {

struct TensorMap {
  static constexpr uint64_t kMark = 0x74656e736f724d61u;
  static constexpr int kMaxRank = 5;

  uint64_t mark;
  const char* address;
  uint64_t strides[kMaxRank - 1];  // in bytes, of dimensions 1 and up
  uint32_t last[kMaxRank];         // the size of each dimension less 1
  uint16_t box[kMaxRank];
  uint8_t element_strides[kMaxRank];
  uint8_t rank;
  uint8_t element_bytes;
  uint8_t swizzle_bytes;  // 0: none
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

}  // namespace segattn::emulator
