// exp of vector lanes.
//
// exp(x) = 2^n * exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2. exp(r) = 1 + r + r^2 q(r), where q is a minimax
// polynomial with a relative error of 3.1e-9 in float and 9.9e-18 in double, below rounding.
//
// The relative error is at most 1.5 * eps (eps = 2^-23, 2^-52) where the result is a normal number; tests/cpu verify
// that over the whole range. Subnormal results are flushed to 0, so exp(-inf) = 0. Overflow gives inf. NaN stays NaN.
#pragma once

#include <bit>
#include <limits>
#include <span>

#include "cpu/common/simd.h"

namespace segattn::cpu {

namespace detail {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = std::uint32_t;  // unsigned: for x out of range the sum of the bit patterns wraps, and is not used
  static constexpr int mantissa_bits = 23;
  static constexpr float round_magic = 0x1.8p23f;  // x + round_magic holds round(x) in its low bits
  static constexpr float inverse_ln2 = 0x1.715476p+0f;
  static constexpr float ln2_high = 0x1.62e4p-1f;  // 15 bits: n * ln2_high is exact for |n| < 2^9
  static constexpr float ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float smallest = -0x1.5d589ep+6f;  // ln(2^-126), rounded up
  static constexpr float largest = 0x1.62e42ep+6f;    // the largest float whose exp is finite
  static constexpr float polynomial[] = {
      0x1.6a2350582208bp-10f, 0x1.123a6b3911f70p-7f, 0x1.5558f4cf721afp-5f, 0x1.5554909fdcae9p-3f,
      0x1.fffffb9443323p-2f};
};

template <>
struct ExpConstants<double> {
  using Bits = std::uint64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr double round_magic = 0x1.8p52;
  static constexpr double inverse_ln2 = 0x1.71547652b82fep+0;
  static constexpr double ln2_high = 0x1.62e42fefa3800p-1;  // 42 bits: exact times |n| < 2^11
  static constexpr double ln2_low = 0x1.ef35793c76730p-45;
  static constexpr double smallest = -0x1.6232bdd7abcd2p+9;  // ln(2^-1022)
  static constexpr double largest = 0x1.62e42fefa39efp+9;
  static constexpr double polynomial[] = {
      0x1.a9a740039ecbep-26, 0x1.28a8640de83b3p-22, 0x1.71e197b665a07p-19, 0x1.a019a0589352ep-16, 0x1.a01a0010f8b1cp-13,
      0x1.6c16c18155dfep-10, 0x1.111111115b60ep-7,  0x1.55555555519a4p-5,  0x1.5555555555431p-3,  0x1.0000000000005p-1};
};

}  // namespace detail

template <class V>
inline V exp(V x) {
  using T = ElementOf<V>;
  using C = detail::ExpConstants<T>;
  using B = VecN<typename C::Bits, kWidthOf<V>>;
  const V shifted = fma(x, broadcast<V>(C::inverse_ln2), broadcast<V>(C::round_magic));
  const V n = shifted - C::round_magic;
  V r = fma(n, broadcast<V>(-C::ln2_high), x);
  r = fma(n, broadcast<V>(-C::ln2_low), r);
  V q = broadcast<V>(C::polynomial[0]);
  for (const T coefficient : std::span(C::polynomial).template subspan<1>()) {
    q = fma(q, r, broadcast<V>(coefficient));
  }
  const V fraction = fma(q, r * r, r) + T(1);
  // Adding n to the exponent field multiplies by 2^n. A factor 2^n would overflow for n = 128 (double: 1024).
  const B exponent = bit_cast_vector<B>(shifted) - std::bit_cast<typename C::Bits>(C::round_magic);
  V result = bit_cast_vector<V>(bit_cast_vector<B>(fraction) + (exponent << C::mantissa_bits));
  result = select(x < C::smallest, V{}, result);
  return select(x <= C::largest, result, x + std::numeric_limits<T>::infinity());
}

}  // namespace segattn::cpu
