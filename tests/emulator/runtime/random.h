// A fast generator for schedules (xorshift64*): a seed gives the same schedule on every machine.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__BMI2__)
#include <immintrin.h>
#endif

namespace segattn::emulator {

class Random {
 public:
  explicit Random(uint64_t seed = 1) : state_(seed * 0x9e3779b97f4a7c15u + 0x632be59bd9b4e019u) {
    if (state_ == 0)
      state_ = 1;
  }

  uint32_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return uint32_t((state_ * 0x2545f4914f6cdd1du) >> 32);
  }

  // A uniformly random set bit of `mask`, which is not zero.
  int bit_of(uint32_t mask) {
    uint32_t skip = uint32_t(uint64_t(next()) * uint32_t(std::popcount(mask)) >> 32);
#if defined(__BMI2__)
    return std::countr_zero(_pdep_u32(1u << skip, mask));
#else
    for (; skip > 0; --skip)
      mask &= mask - 1;
    return std::countr_zero(mask);
#endif
  }

 private:
  uint64_t state_;
};

}  // namespace segattn::emulator
