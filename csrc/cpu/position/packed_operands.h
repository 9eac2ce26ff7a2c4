// Packed operands of the backward pass of position attention, for a stretch of keys and for a stretch of queries:
//   scores  = key^T query             A: key (copied),      B: query (copied)
//   weight gradients = value^T grad   A: value (copied),    B: grad_output (copied)
//   grad_value^T += P^T grad^T        A: the tile, strided, B: grad_output (transposed)
//   grad_key^T   += dS^T query^T      A: the tile, strided, B: query (transposed)
//   grad_query   += key dS^T          A: key (transposed),  B: the tile
// Stretches start at multiples of 16 positions. A stretch is packed tile by tile, and what belongs to position i starts
// at element i * channels of each array (pairs: half of it), so a tile's operands are found by its first position.
#pragma once

#include "cpu/common/pack.h"

namespace segattn::cpu {

template <class T>
struct KeyOperands {
  using P = PackedOf<T>;
  P *key, *key_transposed, *value;

  // Elements for `count` keys with e channels, c of the value.
  static constexpr std::int64_t size(std::int64_t count, std::int64_t e, std::int64_t c) {
    return packed_a_size<P>(count, e) + packed_a_size<P>(e, count) + packed_a_size<P>(count, c);
  }

  static KeyOperands in(P* memory, std::int64_t count, std::int64_t e, std::int64_t c) {
    P* const transposed = memory + packed_a_size<P>(count, e);
    return {memory, transposed, transposed + packed_a_size<P>(e, count)};
  }

  KeyOperands from(std::int64_t first, std::int64_t e, std::int64_t c) const {
    return {key + first * k_steps<P>(e), key_transposed + e * k_steps<P>(first), value + first * k_steps<P>(c)};
  }

  // One tile of `count` keys; keys (E, ld), values (C, ld).
  void pack(const T* keys, const T* values, std::int64_t ld, std::int64_t count, std::int64_t e, std::int64_t c) const {
    pack_a_from_steps<P>(key, keys, ld, count, e);
    pack_a_from_rows<P>(key_transposed, keys, ld, e, count);
    pack_a_from_steps<P>(value, values, ld, count, c);
  }
};

template <class T>
struct QueryOperands {
  using P = PackedOf<T>;
  P *query, *grad, *query_transposed, *grad_transposed;

  static constexpr std::int64_t size(std::int64_t count, std::int64_t e, std::int64_t c) {
    return packed_b_size<P>(count, e) + packed_b_size<P>(count, c) + packed_b_size<P>(e, count) +
        packed_b_size<P>(c, count);
  }

  static QueryOperands in(P* memory, std::int64_t count, std::int64_t e, std::int64_t c) {
    P* const grad = memory + packed_b_size<P>(count, e);
    P* const query_transposed = grad + packed_b_size<P>(count, c);
    return {memory, grad, query_transposed, query_transposed + packed_b_size<P>(e, count)};
  }

  QueryOperands from(std::int64_t first, std::int64_t e, std::int64_t c) const {
    return {
        query + first * k_steps<P>(e), grad + first * k_steps<P>(c),
        query_transposed + padded_columns<P>(e) * k_steps<P>(first),
        grad_transposed + padded_columns<P>(c) * k_steps<P>(first)};
  }

  // One tile of `count` queries; queries (E, ld), grads (C, ld).
  void pack(
      const T* queries, const T* grads, std::int64_t ld, std::int64_t count, std::int64_t e, std::int64_t c) const {
    pack_b_from_steps<P>(query, queries, ld, count, e);
    pack_b_from_steps<P>(grad, grads, ld, count, c);
    pack_b_from_columns<P>(query_transposed, queries, ld, e, count);
    pack_b_from_columns<P>(grad_transposed, grads, ld, c, count);
  }
};

}  // namespace segattn::cpu
