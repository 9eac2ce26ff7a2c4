// Integer arithmetic of sizes: all values are non-negative, divisors positive.
#pragma once

#include <cstdint>

namespace segattn::cpu {

constexpr std::int64_t ceil_div(std::int64_t value, std::int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

}  // namespace segattn::cpu
