// 16-bit elements as float32, exactly.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace segattn::emulator {

inline float from_float16(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  _Float16 value;
  std::memcpy(&value, &bits, sizeof value);
  return float(value);
#endif
}

inline float from_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(uint32_t(bits) << 16);
}

}  // namespace segattn::emulator
