// Channel attention: rows of the C x K matrices: softmax and its derivative.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/common/exp.h"
#include "cpu/common/pack.h"

namespace segattn::cpu {

// What a matrix is stored as to be packed into P: bfloat16 where two of them make one element.
template <class P>
using StoredOf = std::conditional_t<kIsPair<P>, BFloat16, P>;

template <class V>
inline ElementOf<V> horizontal_max(V vector) {
  ElementOf<V> result = vector[0];
  for (int i = 1; i < kWidthOf<V>; ++i) {
    result = result > vector[i] ? result : vector[i];
  }
  return result;
}

template <class V>
inline ElementOf<V> horizontal_sum(V vector) {
  ElementOf<V> result = vector[0];
  for (int i = 1; i < kWidthOf<V>; ++i) {
    result += vector[i];
  }
  return result;
}

// energy [padded count] becomes softmax(scale * energy) over its first `count` elements, zero beyond. Returns the
// log-sum-exp. energy has room for whole vectors.
template <class A>
A softmax_row(A* energy, std::int64_t count, A scale) {
  using V = Vec<A>;
  constexpr std::int64_t lanes = kLanes<A>;
  constexpr A infinity = std::numeric_limits<A>::infinity();
  for (std::int64_t i = 0; i < count; ++i) {
    energy[i] *= scale;
  }
  std::fill(energy + count, energy + round_up(count, lanes), -infinity);
  V most = broadcast<V>(-infinity);
  for (std::int64_t i = 0; i < count; i += lanes) {
    most = max(most, load<V>(energy + i));
  }
  const A maximum = horizontal_max(most);
  // -inf - -inf would be NaN in the padding; with 0 a row that is all -inf has weights 0 / 0, as everywhere.
  const V offset = broadcast<V>(maximum == -infinity ? A(0) : maximum);
  V sum{};
  for (std::int64_t i = 0; i < count; i += lanes) {
    const V weight = exp(load<V>(energy + i) - offset);
    store(energy + i, weight);
    sum += weight;
  }
  const A total = horizontal_sum(sum);
  for (std::int64_t i = 0; i < count; i += lanes) {
    store(energy + i, load<V>(energy + i) * (A(1) / total));
  }
  return maximum + std::log(total);
}

// grad [padded count], the gradient of the weights, becomes that of the energy:
// scale * weight * (grad - sum of weight * grad). Returns that sum.
template <class A>
A softmax_row_backward(const A* weights, A* grad, std::int64_t count, A scale) {
  using V = Vec<A>;
  constexpr std::int64_t lanes = kLanes<A>;
  V products{};
  for (std::int64_t i = 0; i < count; i += lanes) {  // beyond `count` both are zero
    products = fma(load<V>(weights + i), load<V>(grad + i), products);
  }
  const A dot = horizontal_sum(products);
  for (std::int64_t i = 0; i < count; i += lanes) {
    store(grad + i, load<V>(weights + i) * (load<V>(grad + i) - dot) * scale);
  }
  return dot;
}

template <class A>
void multiply_row(A* row, std::int64_t padded_count, A factor) {
  using V = Vec<A>;
  for (std::int64_t i = 0; i < padded_count; i += kLanes<A>) {
    store(row + i, load<V>(row + i) * broadcast<V>(factor));
  }
}

template <class Stored, class A>
void store_row(Stored* target, const A* source, std::int64_t padded_count) {
  constexpr int lanes = kLanes<A>;
  for (std::int64_t i = 0; i < padded_count; i += lanes) {
    narrow<lanes>(target + i, load<Vec<A>>(source + i));
  }
}

}  // namespace segattn::cpu
