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

// Runs of `length` elements, `inner` of them `inner_stride` apart, and that `outer` times, `outer_stride` apart. Each call
// fetches a share of them, so that all have been fetched after so many calls as it says there will be. It counts along:
// divisions in each call took a tenth of the time of a product.
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
      share_ = (left_ + calls - 1) / calls;
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

// For a product with nothing to do between its parts.
struct DoNothing {
  void operator()(std::int64_t) const {}
};

}  // namespace segattn::cpu
