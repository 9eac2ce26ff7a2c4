// Channel attention: softmax of the rows of C x K matrices, and its gradient.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/common/exp.h"
#include "cpu/common/pack.h"

namespace segattn::cpu {

// The type in which a matrix is stored before it is packed into P: bfloat16 for pairs, else P.
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

// row [padded count], from products to softmax(scale * row) over its first `count` elements, zero beyond. Returns the
// logsumexp.
template <class A>
A softmax_row(A* row, std::int64_t count, A scale) {
  using V = Vec<A>;
  constexpr std::int64_t lanes = kLanes<A>;
  constexpr A infinity = std::numeric_limits<A>::infinity();
  for (std::int64_t i = 0; i < count; ++i) {
    row[i] *= scale;
  }
  std::fill(row + count, row + round_up(count, lanes), -infinity);
  V most = broadcast<V>(-infinity);
  for (std::int64_t i = 0; i < count; i += lanes) {
    most = max(most, load<V>(row + i));
  }
  const A maximum = horizontal_max(most);
  // With a maximum of -inf the padding would become exp(-inf - -inf) = NaN. An offset of 0 gives 0 / 0 = NaN for the
  // row's elements, as softmax does.
  const V offset = broadcast<V>(maximum == -infinity ? A(0) : maximum);
  V sum{};
  for (std::int64_t i = 0; i < count; i += lanes) {
    const V weight = exp(load<V>(row + i) - offset);
    store(row + i, weight);
    sum += weight;
  }
  const A total = horizontal_sum(sum);
  for (std::int64_t i = 0; i < count; i += lanes) {
    store(row + i, load<V>(row + i) * (A(1) / total));
  }
  return maximum + std::log(total);
}

// grad [padded count], from the gradient of the weights to that of the products:
// scale * weight * (grad - sum of weight * grad). Returns the sum.
template <class A>
A softmax_row_backward(const A* weights, A* grad, std::int64_t count, A scale) {
  using V = Vec<A>;
  constexpr std::int64_t lanes = kLanes<A>;
  V products{};
  for (std::int64_t i = 0; i < count; i += lanes) {  // the padding is zero
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
