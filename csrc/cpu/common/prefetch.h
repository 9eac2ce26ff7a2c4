// Software prefetch between the parts of a product, for accesses that the hardware prefetchers do not predict: runs of
// a feature map's rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/common/math.h"

namespace segattn::cpu {

// Fetches the cache line of `address` into L2, for writing unless it is const. GCC 12 drops calls of a function that
// only prefetches, because it has no side effects; the empty assembly keeps them.
template <class T>
inline void prefetch_to_l2(T* address) {
  __builtin_prefetch(address, std::is_const_v<T> ? 0 : 1, 2);
  asm volatile("");
}

// Fetches outer x inner runs of `length` elements, `outer_stride` and `inner_stride` apart. A call fetches an equal
// share: after `calls` calls all runs have been fetched. The position is kept incrementally: divisions in each call
// took a tenth of a product's time.
template <class T>
class Prefetch {
 public:
  Prefetch(
      T* first, std::int64_t outer, std::int64_t outer_stride, std::int64_t inner, std::int64_t inner_stride,
      std::int64_t length)
      : run_(first),
        left_(outer * inner),
        inner_(inner),
        inner_stride_(inner_stride),
        skip_(outer_stride - inner * inner_stride),
        length_(length) {}

  void operator()(std::int64_t calls) {
    constexpr std::int64_t line = 64 / static_cast<std::int64_t>(sizeof(T));
    if (share_ == 0) {
      share_ = ceil_div(left_, calls);
    }
    const std::int64_t count = left_ < share_ ? left_ : share_;
    left_ -= count;
    for (std::int64_t i = 0; i < count; ++i) {
      for (std::int64_t element = 0; element < length_; element += line) {
        prefetch_to_l2(run_ + element);
      }
      prefetch_to_l2(run_ + length_ - 1);
      run_ += inner_stride_;
      if (++done_ == inner_) {
        done_ = 0;
        run_ += skip_;
      }
    }
  }

 private:
  T* run_;
  std::int64_t left_, inner_, inner_stride_, skip_, length_;
  std::int64_t done_ = 0;
  std::int64_t share_ = 0;
};

// For a product without prefetch.
struct DoNothing {
  void operator()(std::int64_t) const {}
};

}  // namespace segattn::cpu
