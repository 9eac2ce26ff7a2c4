// Fetching ahead, between the parts of a product, what the processor does not see coming: stretches of a map's rows.
#pragma once

#include <cstdint>
#include <type_traits>

namespace segattn::cpu {

// The line of `address` into the second-level cache, to be written if it is not const. GCC 12 takes a function that does
// nothing but prefetch for one without effects and drops its calls; the empty assembly keeps them.
template <class T>
inline void prefetch_to_l2(T* address) {
  __builtin_prefetch(address, std::is_const_v<T> ? 0 : 1, 2);
  asm volatile("");
}

// A part of `rows` rows of `count` elements, `stride` apart.
template <class T>
void prefetch_rows(T* first, std::int64_t rows, std::int64_t stride, std::int64_t count, std::int64_t part,
                   std::int64_t parts) {
  constexpr std::int64_t line = 64 / static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
    T* const address = first + row * stride;
    for (std::int64_t i = 0; i < count; i += line) {
      prefetch_to_l2(address + i);
    }
    prefetch_to_l2(address + count - 1);
  }
}

// For a product with nothing to do between its parts.
struct DoNothing {
  void operator()(std::int64_t, std::int64_t) const {}
};

}  // namespace segattn::cpu
