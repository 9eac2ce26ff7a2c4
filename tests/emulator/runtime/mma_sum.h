// How a tensor core adds the products of one mma to float32 accumulators, as measured on hardware (docs/emulator.md
// cites the papers). The contraction is split into blocks. In each block
//   1. products are exact,
//   2. every product and the accumulator are aligned to the largest exponent among them and truncated to
//      `fraction_bits` fraction bits below it,
//   3. the aligned numbers are added exactly,
//   4. the sum is rounded to float32 towards zero.
// The exponent of a product is the sum of its factors' exponents: its significand is in [1, 4). Subnormal factors have
// their format's lowest exponent.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "device.h"

namespace segattn::emulator {

template <class Element, int kColumns>
struct RowOf {
  typedef Element type __attribute__((vector_size(kColumns * sizeof(Element))));
};
template <class Element, int kColumns>
using Row = typename RowOf<Element, kColumns>::type;  // a row of the accumulators

template <class Element, int kColumns>
Row<Element, kColumns> load_row(const Element (&from)[kColumns]) {
  Row<Element, kColumns> row;
  std::memcpy(&row, from, sizeof row);
  return row;
}

constexpr int kLowestExponent = -126;  // float32's, bfloat16's and TF32's
constexpr int kLowestExponentFloat16 = -14;
constexpr int kNoExponent = -1000;  // of a zero: never the largest

// Of all nonzero values.
struct ExponentRange {
  int lowest = 1000, highest = kNoExponent;
  bool finite = true;  // no infinity and no NaN
};

// lowest: the lowest exponent of the values' format.
template <int kSize>
ExponentRange find_exponents(int32_t* exponents, const float* values, int lowest) {
  constexpr int kLanes = 16;
  static_assert(kSize % kLanes == 0);
  using Lanes = Row<int32_t, kLanes>;
  const ExponentRange none;
  Lanes lowest_of_lane = Lanes{} + none.lowest, highest_of_lane = Lanes{} + none.highest, infinite = {};
  for (int i = 0; i < kSize; i += kLanes) {
    Lanes bits;
    std::memcpy(&bits, values + i, sizeof bits);
    const Lanes field = bits >> 23 & 255;
    const Lanes exponent = field - 127 > lowest ? field - 127 : Lanes{} + lowest;
    const Lanes zero = (bits & 0x7fffffff) == 0;
    const Lanes highest = zero ? Lanes{} + kNoExponent : exponent;
    std::memcpy(exponents + i, &highest, sizeof highest);
    lowest_of_lane = (zero == 0) & (exponent < lowest_of_lane) ? exponent : lowest_of_lane;
    highest_of_lane = highest > highest_of_lane ? highest : highest_of_lane;
    infinite |= field == 255;
  }
  ExponentRange range;
  for (int lane = 0; lane < kLanes; ++lane) {
    range.lowest = std::min(range.lowest, lowest_of_lane[lane]);
    range.highest = std::max(range.highest, highest_of_lane[lane]);
    range.finite &= infinite[lane] == 0;
  }
  return range;
}

template <int kDepth, int kColumns>
struct MmaOperands {
  float a[16][kDepth];
  float b[kDepth][kColumns];
};

template <int kDepth, int kColumns>
struct MmaExponents {
  int32_t a[16][kDepth];
  int32_t b[kDepth][kColumns];
};

// 2^exponent
template <class Real, int kColumns>
Row<Real, kColumns> power_of_two(Row<int32_t, kColumns> exponent) {
  using Bits = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;
  constexpr int kBias = sizeof(Real) == 4 ? 127 : 1023, kMantissa = sizeof(Real) == 4 ? 23 : 52;
  const Row<Bits, kColumns> bits = __builtin_convertvector(exponent + kBias, Row<Bits, kColumns>) << kMantissa;
  return std::bit_cast<Row<Real, kColumns>>(bits);
}

// To float32, towards zero. Overflow gives infinity.
template <int kColumns>
Row<float, kColumns> truncate(Row<double, kColumns> exact) {
  const Row<float, kColumns> nearest = __builtin_convertvector(exact, Row<float, kColumns>);
  const Row<int64_t, kColumns> magnitude = ~(int64_t(1) << 63) & std::bit_cast<Row<int64_t, kColumns>>(exact);
  const Row<int64_t, kColumns> rounded = ~(int64_t(1) << 63) &
      std::bit_cast<Row<int64_t, kColumns>>(__builtin_convertvector(nearest, Row<double, kColumns>));
  constexpr int64_t kInfinity = int64_t(0x7ff) << 52;
  // -1 where rounding to nearest went away from zero: steps back by one unit.
  const Row<int64_t, kColumns> away = (rounded > magnitude) & (rounded < kInfinity);
  const Row<int32_t, kColumns> step = __builtin_convertvector(away, Row<int32_t, kColumns>);
  return std::bit_cast<Row<float, kColumns>>(std::bit_cast<Row<int32_t, kColumns>>(nearest) + step);
}

// 2^exponent (even + odd) to float32, towards zero.
template <int kColumns>
Row<float, kColumns> scale_and_truncate(
    Row<int32_t, kColumns> even, Row<int32_t, kColumns> odd, Row<int32_t, kColumns> exponent) {
  if constexpr (kColumns > 8) {
    // The compiler splits comparisons of vectors wider than the processor's, 8 numbers of 64 bits, into single numbers.
    constexpr int kHalf = kColumns / 2;
    struct Integers {
      Row<int32_t, kHalf> half[2];
    };
    struct Floats {
      Row<float, kHalf> half[2];
    };
    const auto e = std::bit_cast<Integers>(even), o = std::bit_cast<Integers>(odd);
    const auto x = std::bit_cast<Integers>(exponent);
    Floats sums;
    for (int i = 0; i < 2; ++i)
      sums.half[i] = scale_and_truncate<kHalf>(e.half[i], o.half[i], x.half[i]);
    return std::bit_cast<Row<float, kColumns>>(sums);
  } else {
    const Row<double, kColumns> total =
        __builtin_convertvector(even, Row<double, kColumns>) + __builtin_convertvector(odd, Row<double, kColumns>);
    return truncate<kColumns>(total * power_of_two<double, kColumns>(exponent));
  }
}

// One row of an mma, kBlock of the contraction at a time. Real must represent the products and their scaled values:
// double always does, float does for moderate exponents. lowest: the lowest exponent that values are aligned to.
template <class Real, int kBlock, int kDepth, int kColumns>
Row<float, kColumns> add_row(
    Row<float, kColumns> sum, const float (&a)[kDepth], const int32_t (&a_exponents)[kDepth],
    const float (&b)[kDepth][kColumns], const int32_t (&b_exponents)[kDepth][kColumns], int fraction_bits, int lowest) {
  for (int first = 0; first < kDepth; first += kBlock) {
    const int end = first + kBlock;
    const Row<int32_t, kColumns> field = std::bit_cast<Row<int32_t, kColumns>>(sum) >> 23 & 255;
    Row<int32_t, kColumns> largest = field - 127 > lowest ? field - 127 : Row<int32_t, kColumns>{} + lowest;
    for (int k = first; k < end; ++k) {
      const Row<int32_t, kColumns> exponent = a_exponents[k] + load_row(b_exponents[k]);
      largest = exponent > largest ? exponent : largest;
    }
    const Row<Real, kColumns> scale = power_of_two<Real, kColumns>(fraction_bits - largest);
    // A scaled product is below 2^27: two sums of 8 and the accumulator fit 32 bits.
    Row<int32_t, kColumns> even =
        __builtin_convertvector(__builtin_convertvector(sum, Row<Real, kColumns>) * scale, Row<int32_t, kColumns>);
    Row<int32_t, kColumns> odd = {};
    for (int k = first; k < end; k += 2) {
      const Row<Real, kColumns> product = Real(a[k]) * __builtin_convertvector(load_row(b[k]), Row<Real, kColumns>);
      const Row<Real, kColumns> next =
          Real(a[k + 1]) * __builtin_convertvector(load_row(b[k + 1]), Row<Real, kColumns>);
      even += __builtin_convertvector(product * scale, Row<int32_t, kColumns>);
      odd += __builtin_convertvector(next * scale, Row<int32_t, kColumns>);
    }
    sum = scale_and_truncate<kColumns>(even, odd, largest - fraction_bits);
  }
  return sum;
}

template <class Real, int kBlock, int kDepth, int kColumns>
void add_rows(
    float (&d)[16][kColumns], const MmaOperands<kDepth, kColumns>& factors,
    const MmaExponents<kDepth, kColumns>& exponents, int fraction_bits, int lowest) {
  for (int m = 0; m < 16; ++m) {
    const Row<float, kColumns> sum = add_row<Real, kBlock>(
        load_row(d[m]), factors.a[m], exponents.a[m], factors.b, exponents.b, fraction_bits, lowest);
    std::memcpy(d[m], &sum, sizeof sum);
  }
}

template <class Real, int kDepth, int kColumns>
void add_rows(
    float (&d)[16][kColumns], const MmaOperands<kDepth, kColumns>& factors,
    const MmaExponents<kDepth, kColumns>& exponents, MmaBlocks blocks, int lowest) {
  if (blocks.depth == kDepth) {
    add_rows<Real, kDepth>(d, factors, exponents, blocks.fraction_bits, lowest);
  } else {
    add_rows<Real, kDepth / 2>(d, factors, exponents, blocks.fraction_bits, lowest);
  }
}

// d += a * b. lowest_exponent: that of the factors' format.
template <int kDepth, int kColumns>
void add_products_truncated(
    float (&d)[16][kColumns], MmaOperands<kDepth, kColumns>& factors, int lowest_exponent, MmaBlocks blocks) {
  MmaExponents<kDepth, kColumns> exponents;
  int32_t sum_exponents[16 * kColumns];
  const ExponentRange a = find_exponents<16 * kDepth>(exponents.a[0], factors.a[0], lowest_exponent);
  const ExponentRange b = find_exponents<kColumns * kDepth>(exponents.b[0], factors.b[0], lowest_exponent);
  const ExponentRange sums = find_exponents<16 * kColumns>(sum_exponents, d[0], kLowestExponent);
  if (a.finite && b.finite && sums.finite) {
    constexpr int kModerate = 90;  // float's own limit is 126, and 25 bits below the largest exponent matter
    const bool moderate = std::max(a.highest + b.highest, sums.highest) < kModerate &&
        std::min(a.lowest + b.lowest, sums.lowest) > -kModerate;
    return moderate ? add_rows<float>(d, factors, exponents, blocks, -kModerate)
                    : add_rows<double>(d, factors, exponents, blocks, kLowestExponent);
  }

  // Sums with infinities or NaN follow IEEE 754; the others are computed without them.
  double ieee[16][kColumns];
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < kColumns; ++n) {
      ieee[m][n] = d[m][n];
      for (int k = 0; k < kDepth; ++k)
        ieee[m][n] += double(factors.a[m][k]) * double(factors.b[k][n]);
    }
  }
  const auto clear = [](float* values, int size) {
    for (int i = 0; i < size; ++i)
      values[i] = std::isfinite(values[i]) ? values[i] : 0.0f;
  };
  clear(factors.a[0], 16 * kDepth);
  clear(factors.b[0], kColumns * kDepth);
  clear(d[0], 16 * kColumns);
  add_products_truncated(d, factors, lowest_exponent, blocks);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < kColumns; ++n)
      d[m][n] = std::isfinite(ieee[m][n]) ? d[m][n] : float(ieee[m][n]);
  }
}

// d += a * b, each addition rounded to nearest, in order of the contraction.
template <int kDepth, int kColumns>
void add_products_to_nearest(float (&d)[16][kColumns], const MmaOperands<kDepth, kColumns>& factors) {
  for (int m = 0; m < 16; ++m) {
    Row<float, kColumns> sum = load_row(d[m]);
    for (int k = 0; k < kDepth; ++k)
      sum += factors.a[m][k] * load_row(factors.b[k]);
    std::memcpy(d[m], &sum, sizeof sum);
  }
}

}  // namespace segattn::emulator
