// Packed operands of the backward pass of position attention, for a range of keys and for a range of queries:
//   S^T           = key^T query            A: key (copied),      B: query (copied)
//   dP^T          = value^T grad_output    A: value (copied),    B: grad_output (copied)
//   grad_value^T += P^T grad_output^T      A: the tile, strided, B: grad_output (transposed)
//   grad_key^T   += dS^T query^T           A: the tile, strided, B: query (transposed)
//   grad_query   += key dS^T               A: key (transposed),  B: the tile
// A product that no wanted gradient needs has no operands: their arrays are empty.
// Ranges start at multiples of 16 positions and are packed tile by tile. The operands of position i start at element
// i * channels of each array (pairs: half of that), so a tile's operands are found by its first position.
#pragma once

#include "cpu/common/pack.h"
#include "cpu/position/arguments.h"

namespace segattn::cpu {

template <class T>
struct KeyOperands {
  using P = PackedOf<T>;
  P *key, *key_transposed, *value;

  // Elements for `count` keys.
  static constexpr std::int64_t size(std::int64_t count, const PositionSizes& sizes, const PositionGradients& wanted) {
    return packed_a_size<P>(count, sizes.key_channels) +
        (wanted.query ? packed_a_size<P>(sizes.key_channels, count) : 0) +
        (wanted.of_energies() ? packed_a_size<P>(count, sizes.value_channels) : 0);
  }

  static KeyOperands in(P* memory, std::int64_t count, const PositionSizes& sizes, const PositionGradients& wanted) {
    P* const transposed = memory + packed_a_size<P>(count, sizes.key_channels);
    return {memory, transposed, transposed + (wanted.query ? packed_a_size<P>(sizes.key_channels, count) : 0)};
  }

  KeyOperands from(std::int64_t first, const PositionSizes& sizes) const {
    return {
        key + first * k_steps<P>(sizes.key_channels), key_transposed + sizes.key_channels * k_steps<P>(first),
        value + first * k_steps<P>(sizes.value_channels)};
  }

  // Packs one tile of `count` keys of keys (E, M) and values (C, M).
  void pack(
      const T* keys, const T* values, std::int64_t count, const PositionSizes& sizes,
      const PositionGradients& wanted) const {
    pack_a_from_steps<P>(key, keys, sizes.keys, count, sizes.key_channels);
    if (wanted.query) {
      pack_a_from_rows<P>(key_transposed, keys, sizes.keys, sizes.key_channels, count);
    }
    if (wanted.of_energies()) {
      pack_a_from_steps<P>(value, values, sizes.keys, count, sizes.value_channels);
    }
  }
};

template <class T>
struct QueryOperands {
  using P = PackedOf<T>;
  P *query, *grad_output, *query_transposed, *grad_output_transposed;

  // Elements for `count` queries.
  static constexpr std::int64_t size(std::int64_t count, const PositionSizes& sizes, const PositionGradients& wanted) {
    return packed_b_size<P>(count, sizes.key_channels) +
        (wanted.of_energies() ? packed_b_size<P>(count, sizes.value_channels) : 0) +
        (wanted.key ? packed_b_size<P>(sizes.key_channels, count) : 0) +
        (wanted.value ? packed_b_size<P>(sizes.value_channels, count) : 0);
  }

  static QueryOperands in(P* memory, std::int64_t count, const PositionSizes& sizes, const PositionGradients& wanted) {
    P* const grad_output = memory + packed_b_size<P>(count, sizes.key_channels);
    P* const query_transposed =
        grad_output + (wanted.of_energies() ? packed_b_size<P>(count, sizes.value_channels) : 0);
    return {
        memory, grad_output, query_transposed,
        query_transposed + (wanted.key ? packed_b_size<P>(sizes.key_channels, count) : 0)};
  }

  QueryOperands from(std::int64_t first, const PositionSizes& sizes) const {
    return {
        query + first * k_steps<P>(sizes.key_channels), grad_output + first * k_steps<P>(sizes.value_channels),
        query_transposed + padded_columns<P>(sizes.key_channels) * k_steps<P>(first),
        grad_output_transposed + padded_columns<P>(sizes.value_channels) * k_steps<P>(first)};
  }

  // Packs one tile of `count` queries of queries (E, N) and grads (C, N).
  void pack(
      const T* queries, const T* grads, std::int64_t count, const PositionSizes& sizes,
      const PositionGradients& wanted) const {
    pack_b_from_steps<P>(query, queries, sizes.queries, count, sizes.key_channels);
    if (wanted.of_energies()) {
      pack_b_from_steps<P>(grad_output, grads, sizes.queries, count, sizes.value_channels);
    }
    if (wanted.key) {
      pack_b_from_columns<P>(query_transposed, queries, sizes.queries, sizes.key_channels, count);
    }
    if (wanted.value) {
      pack_b_from_columns<P>(grad_output_transposed, grads, sizes.queries, sizes.value_channels, count);
    }
  }
};

}  // namespace segattn::cpu
