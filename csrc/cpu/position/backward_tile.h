// One tile (keys x queries) of the backward pass of position attention: weights and energy gradients, and the products
// with them. Tiles are transposed as in the forward pass: rows are keys, queries are along vector lanes. Symbols as in
// backward.h, operands as in packed_operands.h.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/common/attention_softmax.h"
#include "cpu/common/exp.h"
#include "cpu/common/pack.h"
#include "cpu/common/parallel.h"
#include "cpu/position/packed_operands.h"

namespace segattn::cpu {

// What delta is summed over: the channels of grad_output * output, or the keys of the tile.
enum class DeltaSource { kOutput, kTile };

// What the tiles of a call compute.
struct PositionTileWork {
  PositionGradients wanted;
  DeltaSource delta_source;
  bool mean_keys;  // the sums s and M
};

template <class T>
class PositionBackwardTile {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  using V = Vec<A>;
  static constexpr std::int64_t kLane = kLanes<A>;

 public:
  static constexpr std::int64_t kKeys = 128;
  static constexpr std::int64_t kQueries = 4 * panel_columns<P>;
  // Whether delta has the rounding error of a sum in the accumulator, which is that of the results: for float.
  static constexpr bool kIsFloat = std::is_same_v<T, float>;

  // Of the tile's queries. grad_query and mean_keys are sums over the tiles of a unit, in C panels (E x queries).
  A *logsumexp, *logsumexp_low;
  A* grad_logsumexp;  // read with DeltaSource::kTile; with kOutput it is part of delta
  A* delta;           // scale * (delta - grad_logsumexp)
  A *grad_query, *mean_keys;
  A* grad_sum;  // s, over the tiles of a unit

  // Memory for tiles of up to `keys` x `queries`.
  PositionBackwardTile(
      const PositionSizes& sizes, A scale, const PositionTileWork& work, std::int64_t keys, std::int64_t queries,
      Scratch& scratch)
      : sizes_(sizes), scale_(scale), work_(work) {
    const PositionGradients& wanted = work.wanted;
    weights_ = scratch.take<A>(keys * panel_columns<P>);
    weight_grads_ = scratch.take<A>(wanted.of_energies() ? keys * panel_columns<P> : 0);
    weight_rows_ = scratch.take<P>(wanted.value ? k_steps<P>(keys * queries) : 0);
    energy_grad_rows_ = scratch.take<P>(wanted.key ? k_steps<P>(keys * queries) : 0);
    energy_grads_ = scratch.take<P>(wanted.query ? k_steps<P>(keys * queries) : 0);
    logsumexp = scratch.take<A>(queries);
    logsumexp_low = scratch.take<A>(queries);
    grad_logsumexp = scratch.take<A>(queries);
    delta = scratch.take<A>(queries);
    grad_sum = scratch.take<A>(queries);
    grad_query = scratch.take<A>(wanted.query ? sizes.key_channels * queries : 0);
    mean_keys = scratch.take<A>(work.mean_keys ? sizes.key_channels * queries : 0);
  }

  static std::size_t scratch(
      const PositionSizes& sizes, const PositionTileWork& work, std::int64_t keys, std::int64_t queries) {
    const PositionGradients& wanted = work.wanted;
    const auto count = [](bool first, bool second) { return (first ? 1 : 0) + (second ? 1 : 0); };
    return count(true, wanted.of_energies()) * scratch_bytes<A>(keys * panel_columns<P>) +
        (count(wanted.value, wanted.key) + count(wanted.query, false)) * scratch_bytes<P>(k_steps<P>(keys * queries)) +
        5 * scratch_bytes<A>(queries) +
        count(wanted.query, work.mean_keys) * scratch_bytes<A>(sizes.key_channels * queries);
  }

  // Computes P and dS. With DeltaSource::kTile also delta; where mean keys are summed, adds the tile's part to grad_sum
  // and, in `mode`, to mean_keys.
  void differentiate(
      const KeyOperands<T>& key_operands, std::int64_t keys, const QueryOperands<T>& query_operands,
      std::int64_t queries, GemmMode mode) const {
    const std::int64_t e = sizes_.key_channels;
    const std::int64_t c = sizes_.value_channels;
    const std::int64_t columns = padded_columns<P>(queries);
    const V scale = broadcast<V>(scale_);
    for (std::int64_t column = 0; column < queries; column += panel_columns<P>) {
      const std::int64_t width = panel_width<P>(queries, column);
      tile_gemm<P>(
          AOperand<P>::packed(key_operands.key), query_operands.query + column * k_steps<P>(e),
          COperand<A>::panels(weights_), keys, width, k_steps<P>(e), GemmMode::kStore);
      if (work_.wanted.of_energies()) {
        tile_gemm<P>(
            AOperand<P>::packed(key_operands.value), query_operands.grad_output + column * k_steps<P>(c),
            COperand<A>::panels(weight_grads_), keys, width, k_steps<P>(c), GemmMode::kStore);
      }
      const bool for_value = work_.wanted.value;
      for_each_vector(keys, width, [&](std::int64_t row, std::int64_t i) {
        A* const element = weights_ + row * width + i;
        const V weight =
            weight_of(load<V>(element), scale, load<V>(logsumexp + column + i), load<V>(logsumexp_low + column + i));
        store(element, weight);
        if (for_value) {
          store_row(weight_rows_, row * columns + column + i, weight);
        }
      });
      if (work_.wanted.of_energies()) {
        differentiate_energies(key_operands, keys, column, width, columns, mode);
      }
      if constexpr (kIsPair<P>) {
        if (queries % 2 != 0 && column + width > queries) {
          clear_padding_query(keys, queries, columns);
        }
      }
    }
  }

  // Adds the tile's part of the wanted ones of grad_value and grad_key, transposed, in C panels (keys x C) and
  // (keys x E).
  void add_key_gradients(
      std::int64_t keys, const QueryOperands<T>& query_operands, std::int64_t queries, A* grad_value, A* grad_key,
      GemmMode mode) const {
    const std::int64_t row_stride = k_steps<P>(padded_columns<P>(queries));
    if (work_.wanted.value) {
      tile_gemm<P>(
          AOperand<P>::strided(weight_rows_, 1, row_stride), query_operands.grad_output_transposed,
          COperand<A>::panels(grad_value), keys, sizes_.value_channels, k_steps<P>(queries), mode);
    }
    if (work_.wanted.key) {
      tile_gemm<P>(
          AOperand<P>::strided(energy_grad_rows_, 1, row_stride), query_operands.query_transposed,
          COperand<A>::panels(grad_key), keys, sizes_.key_channels, k_steps<P>(queries), mode);
    }
  }

  // Adds the tile's part to grad_query.
  void add_query_gradient(
      const KeyOperands<T>& key_operands, std::int64_t keys, std::int64_t queries, GemmMode mode) const {
    tile_gemm<P>(
        AOperand<P>::packed(key_operands.key_transposed), energy_grads_, COperand<A>::panels(grad_query),
        sizes_.key_channels, queries, k_steps<P>(keys), mode);
  }

  // grad_query -= s M
  void subtract_mean_keys(std::int64_t queries) const {
    for (std::int64_t first = 0; first < queries; first += panel_columns<P>) {
      const std::int64_t width = panel_width<P>(queries, first);
      for (std::int64_t row = 0; row < sizes_.key_channels; ++row) {
        for (std::int64_t i = 0; i < width; i += kLane) {
          const std::int64_t at = first * sizes_.key_channels + row * width + i;
          store(grad_query + at, load<V>(grad_query + at) - load<V>(mean_keys + at) * load<V>(grad_sum + first + i));
        }
      }
    }
  }

 private:
  // Calls use(row, column) for every vector of a panel.
  template <class Use>
  static void for_each_vector(std::int64_t keys, std::int64_t width, const Use& use) {
    for (std::int64_t row = 0; row < keys; ++row) {
      for (std::int64_t i = 0; i < width; i += kLane) {
        use(row, i);
      }
    }
  }

  // 16-bit types have no logsumexp_low, and a logsumexp of 10^8 is rounded by 4. At most 1 then, not exp(4): the
  // gradients stay finite.
  static V weight_of(V product, V scale, V logsumexp, V logsumexp_low) {
    if constexpr (sizeof(T) == 2) {
      return exp(min(V{}, fma(product, scale, -logsumexp) - logsumexp_low));
    } else {
      return backward_weight(product, scale, logsumexp, logsumexp_low);
    }
  }

  // An element of the strided A operands weight_rows_ and energy_grad_rows_.
  static void store_row(P* rows, std::int64_t at, V vector) {
    if constexpr (kIsPair<P>) {
      narrow<kLane>(reinterpret_cast<T*>(rows) + at, vector);
    } else {
      store(rows + at, vector);
    }
  }

  // dS of one column panel, from its weights and dP. columns: of the tile.
  void differentiate_energies(
      const KeyOperands<T>& key_operands, std::int64_t keys, std::int64_t column, std::int64_t width,
      std::int64_t columns, GemmMode mode) const {
    const std::int64_t e = sizes_.key_channels;
    const V scale = broadcast<V>(scale_);
    P* const energy_grads = energy_grads_ + column * k_steps<P>(keys);
    if (work_.delta_source == DeltaSource::kTile) {
      compute_delta(keys, column, width);
    }
    if constexpr (kIsFloat) {
      if (work_.mean_keys) {
        tile_gemm<P>(
            AOperand<P>::packed(key_operands.key_transposed), weights_, COperand<A>::panels(mean_keys + column * e), e,
            width, k_steps<P>(keys), mode);
      }
    }
    const bool for_query = work_.wanted.query;
    const bool for_key = work_.wanted.key;
    for_each_vector(keys, width, [&](std::int64_t row, std::int64_t i) {
      const std::int64_t at = row * width + i;
      const V energy_grad =
          load<V>(weights_ + at) * fma(load<V>(weight_grads_ + at), scale, -load<V>(delta + column + i));
      if (for_key) {
        store_row(energy_grad_rows_, row * columns + column + i, energy_grad);
      }
      if (for_query) {
        if constexpr (kIsPair<P>) {
          store(weight_grads_ + at, energy_grad);
        } else {
          store(energy_grads + at, energy_grad);
        }
      }
    });
    if constexpr (kIsPair<P>) {
      if (for_query) {
        pack_b_from_panels<P>(energy_grads, weight_grads_, keys, width);
      }
    }
    if constexpr (kIsFloat) {
      if (work_.mean_keys) {
        add_rows(energy_grads, keys, width, grad_sum + column);
      }
    }
  }

  // An odd number of queries leaves half of the last pair to a padding query. Its weights are 0, but NaN for a key of
  // -inf, and the products sum over it.
  void clear_padding_query(std::int64_t keys, std::int64_t queries, std::int64_t columns) const {
    for (std::int64_t row = 0; row < keys; ++row) {
      if (work_.wanted.value) {
        reinterpret_cast<T*>(weight_rows_)[row * columns + queries] = T{};
      }
      if (work_.wanted.key) {
        reinterpret_cast<T*>(energy_grad_rows_)[row * columns + queries] = T{};
      }
    }
  }

  // delta of one column panel: scale * mean of dP weighted by P, over its keys, less scale * grad_logsumexp. The
  // division by the sum of the weights, which differs from 1 by the rounding of the logsumexp, keeps the sum of the
  // energy gradients at scale * grad_logsumexp. For float the mean is subtracted from dP and delta is the mean of the
  // rest, because the rounding of the whole mean would leave a sum of that size too.
  void compute_delta(std::int64_t keys, std::int64_t column, std::int64_t width) const {
    for (std::int64_t i = 0; i < width; i += kLane) {
      V sum{}, total{};
      for (std::int64_t row = 0; row < keys; ++row) {
        const V weight = load<V>(weights_ + row * width + i);
        sum = fma(weight, load<V>(weight_grads_ + row * width + i), sum);
        total += weight;
      }
      const auto mean_of = [&](V weighted) { return select(total > V{}, weighted / total, V{}); };
      V mean = mean_of(sum);
      if constexpr (kIsFloat) {
        V rest{};
        for (std::int64_t row = 0; row < keys; ++row) {
          A* const grad = weight_grads_ + row * width + i;
          const V grad_rest = load<V>(grad) - mean;
          store(grad, grad_rest);
          rest = fma(load<V>(weights_ + row * width + i), grad_rest, rest);
        }
        mean = mean_of(rest);
      }
      mean -= mean_of(load<V>(grad_logsumexp + column + i));
      store(delta + column + i, mean * broadcast<V>(scale_));
    }
  }

  // sums += the rows of one column panel of `width`
  static void add_rows(const A* panel, std::int64_t rows, std::int64_t width, A* sums) {
    for (std::int64_t i = 0; i < width; i += kLane) {
      V sum = load<V>(sums + i);
      for (std::int64_t row = 0; row < rows; ++row) {
        sum += load<V>(panel + row * width + i);
      }
      store(sums + i, sum);
    }
  }

  PositionSizes sizes_;
  A scale_;
  PositionTileWork work_;
  A *weights_, *weight_grads_;          // P and dP of one column panel
  P *weight_rows_, *energy_grad_rows_;  // P and dS of the tile, row-major: strided A operands
  P* energy_grads_;                     // dS of the tile in panels: a B operand
};

}  // namespace segattn::cpu
