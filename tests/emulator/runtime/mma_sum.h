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

template <class Element>
struct RowOf {
  typedef Element type __attribute__((vector_size(8 * sizeof(Element))));
};
template <class Element>
using Row = typename RowOf<Element>::type;  // the 8 columns of a row of the accumulators

template <class Element>
Row<Element> load_row(const Element (&from)[8]) {
  Row<Element> row;
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
  ExponentRange range;
  int infinite = 0;
  for (int i = 0; i < kSize; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(values[i]);
    const int field = int(bits >> 23 & 255);
    infinite |= field == 255;
    const int exponent = (bits << 1) == 0 ? kNoExponent : std::max(field - 127, lowest);
    exponents[i] = exponent;
    range.lowest = std::min(range.lowest, exponent == kNoExponent ? range.lowest : exponent);
    range.highest = std::max(range.highest, exponent);
  }
  range.finite = !infinite;
  return range;
}

template <int kDepth>
struct MmaOperands {
  float a[16][kDepth];
  float b[kDepth][8];
};

template <int kDepth>
struct MmaExponents {
  int32_t a[16][kDepth];
  int32_t b[kDepth][8];
};

// 2^exponent
template <class Real>
Row<Real> power_of_two(Row<int32_t> exponent) {
  using Bits = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;
  constexpr int kBias = sizeof(Real) == 4 ? 127 : 1023, kMantissa = sizeof(Real) == 4 ? 23 : 52;
  const Row<Bits> bits = __builtin_convertvector(exponent + kBias, Row<Bits>) << kMantissa;
  return std::bit_cast<Row<Real>>(bits);
}

// To float32, towards zero. Overflow gives infinity.
inline Row<float> truncate(Row<double> exact) {
  const Row<float> nearest = __builtin_convertvector(exact, Row<float>);
  const Row<int64_t> magnitude = ~(int64_t(1) << 63) & std::bit_cast<Row<int64_t>>(exact);
  const Row<int64_t> rounded =
      ~(int64_t(1) << 63) & std::bit_cast<Row<int64_t>>(__builtin_convertvector(nearest, Row<double>));
  constexpr int64_t kInfinity = int64_t(0x7ff) << 52;
  // -1 where rounding to nearest went away from zero: steps back by one unit.
  const Row<int64_t> away = (rounded > magnitude) & (rounded < kInfinity);
  const Row<int32_t> step = __builtin_convertvector(away, Row<int32_t>);
  return std::bit_cast<Row<float>>(std::bit_cast<Row<int32_t>>(nearest) + step);
}

// One row of an mma, kBlock of the contraction at a time. Real must represent the products and their scaled values:
// double always does, float does for moderate exponents. lowest: the lowest exponent that values are aligned to.
template <class Real, int kBlock, int kDepth>
Row<float> add_row(
    Row<float> sum, const float (&a)[kDepth], const int32_t (&a_exponents)[kDepth], const float (&b)[kDepth][8],
    const int32_t (&b_exponents)[kDepth][8], int fraction_bits, int lowest) {
  for (int first = 0; first < kDepth; first += kBlock) {
    const int end = first + kBlock;
    const Row<int32_t> field = std::bit_cast<Row<int32_t>>(sum) >> 23 & 255;
    Row<int32_t> largest = field - 127 > lowest ? field - 127 : Row<int32_t>{} + lowest;
    for (int k = first; k < end; ++k) {
      const Row<int32_t> exponent = a_exponents[k] + load_row(b_exponents[k]);
      largest = exponent > largest ? exponent : largest;
    }
    const Row<Real> scale = power_of_two<Real>(fraction_bits - largest);
    // A scaled product is below 2^27: two sums of 8 and the accumulator fit 32 bits.
    Row<int32_t> even = __builtin_convertvector(__builtin_convertvector(sum, Row<Real>) * scale, Row<int32_t>);
    Row<int32_t> odd = {};
    for (int k = first; k < end; k += 2) {
      const Row<Real> product = Real(a[k]) * __builtin_convertvector(load_row(b[k]), Row<Real>);
      const Row<Real> next = Real(a[k + 1]) * __builtin_convertvector(load_row(b[k + 1]), Row<Real>);
      even += __builtin_convertvector(product * scale, Row<int32_t>);
      odd += __builtin_convertvector(next * scale, Row<int32_t>);
    }
    const Row<double> total = __builtin_convertvector(even, Row<double>) + __builtin_convertvector(odd, Row<double>);
    sum = truncate(total * power_of_two<double>(largest - fraction_bits));
  }
  return sum;
}

template <class Real, int kBlock, int kDepth>
void add_rows(
    float (&d)[16][8], const MmaOperands<kDepth>& factors, const MmaExponents<kDepth>& exponents, int fraction_bits,
    int lowest) {
  for (int m = 0; m < 16; ++m) {
    const Row<float> sum = add_row<Real, kBlock>(
        load_row(d[m]), factors.a[m], exponents.a[m], factors.b, exponents.b, fraction_bits, lowest);
    std::memcpy(d[m], &sum, sizeof sum);
  }
}

template <class Real, int kDepth>
void add_rows(
    float (&d)[16][8], const MmaOperands<kDepth>& factors, const MmaExponents<kDepth>& exponents, MmaBlocks blocks,
    int lowest) {
  if (blocks.depth == kDepth) {
    add_rows<Real, kDepth>(d, factors, exponents, blocks.fraction_bits, lowest);
  } else {
    add_rows<Real, kDepth / 2>(d, factors, exponents, blocks.fraction_bits, lowest);
  }
}

// d += a * b. lowest_exponent: that of the factors' format.
template <int kDepth>
void add_products_truncated(float (&d)[16][8], MmaOperands<kDepth>& factors, int lowest_exponent, MmaBlocks blocks) {
  MmaExponents<kDepth> exponents;
  int32_t sum_exponents[16 * 8];
  const ExponentRange a = find_exponents<16 * kDepth>(exponents.a[0], factors.a[0], lowest_exponent);
  const ExponentRange b = find_exponents<8 * kDepth>(exponents.b[0], factors.b[0], lowest_exponent);
  const ExponentRange sums = find_exponents<16 * 8>(sum_exponents, d[0], kLowestExponent);
  if (a.finite && b.finite && sums.finite) {
    constexpr int kModerate = 90;  // float's own limit is 126, and 25 bits below the largest exponent matter
    const bool moderate = std::max(a.highest + b.highest, sums.highest) < kModerate &&
        std::min(a.lowest + b.lowest, sums.lowest) > -kModerate;
    return moderate ? add_rows<float>(d, factors, exponents, blocks, -kModerate)
                    : add_rows<double>(d, factors, exponents, blocks, kLowestExponent);
  }

  // Sums with infinities or NaN follow IEEE 754; the others are computed without them.
  double ieee[16][8];
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
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
  clear(factors.b[0], 8 * kDepth);
  clear(d[0], 16 * 8);
  add_products_truncated(d, factors, lowest_exponent, blocks);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n)
      d[m][n] = std::isfinite(ieee[m][n]) ? d[m][n] : float(ieee[m][n]);
  }
}

// d += a * b, each addition rounded to nearest, in order of the contraction.
template <int kDepth>
void add_products_to_nearest(float (&d)[16][8], const MmaOperands<kDepth>& factors) {
  for (int m = 0; m < 16; ++m) {
    Row<float> sum = load_row(d[m]);
    for (int k = 0; k < kDepth; ++k)
      sum += factors.a[m][k] * load_row(factors.b[k]);
    std::memcpy(d[m], &sum, sizeof sum);
  }
}

}  // namespace segattn::emulator
