// Integer arithmetic of sizes: all values are non-negative, divisors positive. Pointers that may be null.
#pragma once

#include <cstdint>

namespace segattn::cpu {

constexpr std::int64_t ceil_div(std::int64_t value, std::int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

// Null where there is no array.
template <class T>
constexpr T* advance(T* data, std::int64_t elements) {
  return data == nullptr ? nullptr : data + elements;
}

}  // namespace segattn::cpu
