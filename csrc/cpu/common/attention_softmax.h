// The softmax of position and criss-cross attention, whose energies, scale * product of query and key, may be large.
//
// The backward pass recomputes the weights as exp(energy - logsumexp). In float a logsumexp of 1000 is rounded by up to
// 3e-5, which would be a relative error of all weights of its query. Therefore the forward pass stores the rounding
// error as well. Neither pass rounds an energy, because that error would be as large.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/common/exp.h"

namespace segattn::cpu {

// The forward pass. Its maximum is that of the products, times the sign of scale; it stands for the largest energy.
template <class V>
struct ForwardSoftmax {
  using A = ElementOf<V>;
  V sign, size;  // of scale

  explicit ForwardSoftmax(A scale)
      : sign(broadcast<V>(scale < 0 ? A(-1) : A(1))), size(broadcast<V>(std::abs(scale))) {}

  static V lowest() { return broadcast<V>(-std::numeric_limits<A>::infinity()); }
  V maximum(V maximum, V product) const { return max(maximum, product * sign); }

  // exp(energy - largest energy). The difference is that of the products, times scale: energies of 10^9 are rounded by
  // more than exp takes.
  V weight(V product, V offset) const { return exp(fma(product, sign, -offset) * size); }

  // What products are compared with, for a maximum. If all energies are -inf, the weights are 0, not
  // exp(-inf - -inf) = NaN. A largest energy of inf makes them NaN, also where scale overflows a finite product.
  V offset(V maximum) const {
    const V energy = maximum * size;
    const V or_nan = select(energy == -lowest(), energy - energy, maximum);
    return select(energy == lowest(), V{}, or_nan);
  }

  // exp(largest energy - a larger one); 0 without a finite energy. The first test is for a scale of 0, times which the
  // maximum of no products is NaN.
  V factor(V maximum, V common) const {
    const V finite = select(maximum * size == lowest(), V{}, exp((maximum - common) * size));
    return select(maximum == lowest(), V{}, finite);
  }
};

// A sum over keys, in blocks of 16: of 481 equal weights one running sum was 14 units in the last place off, 10 times
// eager's error, since every step rounds in the same direction.
template <class V>
class BlockedSum {
 public:
  void add(V term, std::int64_t index) {
    block_ += term;
    if (index % 16 == 15) {
      blocks_ += block_;
      block_ = V{};
    }
  }
  V total() const { return blocks_ + block_; }

 private:
  V blocks_{}, block_{};
};

template <class A>
struct SplitLogsumexp {
  A value, low;  // low: the exact logsumexp minus value
};

// largest energy + log(total), for the maximum and scale's size of ForwardSoftmax; energy = maximum * size, rounded.
// Not inlined: contracted with that product, the sums below would not be those of the rounded energy.
template <class A>
[[gnu::noinline]] SplitLogsumexp<A> split_logsumexp(A maximum, A size, A energy, A total) {
  const A log_total = std::log(total);
  const A value = energy + log_total;
  const A added = value - energy;
  const A low = fma(maximum, size, -energy) + (energy - (value - added)) + (log_total - added);
  return {value, std::isfinite(value) ? low : A(0)};
}

// The backward pass: a weight from the logsumexp and its rounding error.
template <class V>
V backward_weight(V product, V scale, V logsumexp, V logsumexp_low) {
  return exp(fma(product, scale, -logsumexp) - logsumexp_low);
}

}  // namespace segattn::cpu
