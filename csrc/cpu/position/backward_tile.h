// One tile (keys x queries) of the backward pass of position attention: weights and energy gradients, and the products
// with them. Tiles are transposed as in the forward pass: rows are keys, queries are along vector lanes. Symbols as in
// backward.h, operands as in packed_operands.h.
#pragma once

#include <limits>
#include <type_traits>

#include "checks/position.h"
#include "cpu/common/exp.h"
#include "cpu/common/pack.h"
#include "cpu/common/parallel.h"
#include "cpu/position/packed_operands.h"

namespace segattn::cpu {

// What delta is summed over: the channels of grad_output * output, or the keys of the tile.
enum class DeltaSource { kOutput, kTile };

template <class T>
class PositionBackwardTile {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  using V = Vec<A>;
  static constexpr std::int64_t kLane = kLanes<A>;

 public:
  static constexpr std::int64_t kKeys = 128;
  static constexpr std::int64_t kQueries = 4 * panel_columns<P>;
  // Whether s M is subtracted from grad_query where D comes from the output: for float.
  static constexpr bool kSubtractsMeanKeys = std::is_same_v<T, float>;

  // Of the tile's queries. grad_query and mean_keys are sums over the tiles of a unit, in C panels (E x queries).
  A *logsumexp, *correction, *delta;
  A *grad_query, *mean_keys;
  A* grad_sum;  // s, over the tiles of a unit

  // Memory for tiles of up to `keys` x `queries`.
  PositionBackwardTile(const PositionSizes& sizes, A scale, std::int64_t keys, std::int64_t queries, Scratch& scratch)
      : sizes_(sizes), scale_(scale) {
    weights_ = scratch.take<A>(keys * panel_columns<P>);
    weight_grads_ = scratch.take<A>(keys * panel_columns<P>);
    weight_rows_ = scratch.take<P>(k_steps<P>(keys * queries));
    energy_grad_rows_ = scratch.take<P>(k_steps<P>(keys * queries));
    energy_grads_ = scratch.take<P>(k_steps<P>(keys * queries));
    logsumexp = scratch.take<A>(queries);
    correction = scratch.take<A>(queries);
    delta = scratch.take<A>(queries);
    grad_sum = scratch.take<A>(queries);
    grad_query = scratch.take<A>(sizes.key_channels * queries);
    mean_keys = kSubtractsMeanKeys ? scratch.take<A>(sizes.key_channels * queries) : nullptr;
  }

  static std::size_t scratch(const PositionSizes& sizes, std::int64_t keys, std::int64_t queries) {
    return 2 * scratch_bytes<A>(keys * panel_columns<P>) + 3 * scratch_bytes<P>(k_steps<P>(keys * queries)) +
        4 * scratch_bytes<A>(queries) + (kSubtractsMeanKeys ? 2 : 1) * scratch_bytes<A>(sizes.key_channels * queries);
  }

  // Computes P and dS. With DeltaSource::kTile also delta; else, where kSubtractsMeanKeys, adds the tile's part to
  // grad_sum and, in `mode`, to mean_keys.
  void differentiate(
      const KeyOperands<T>& key_operands, std::int64_t keys, const QueryOperands<T>& query_operands,
      std::int64_t queries, DeltaSource delta_source, GemmMode mode) const {
    const std::int64_t e = sizes_.key_channels;
    const std::int64_t c = sizes_.value_channels;
    const std::int64_t columns = padded_columns<P>(queries);
    const V scale = broadcast<V>(scale_);
    for (std::int64_t column = 0; column < queries; column += panel_columns<P>) {
      const std::int64_t width = panel_width<P>(queries, column);
      tile_gemm<P>(
          AOperand<P>::packed(key_operands.key), query_operands.query + column * k_steps<P>(e),
          COperand<A>::panels(weights_), keys, width, k_steps<P>(e), GemmMode::kStore);
      tile_gemm<P>(
          AOperand<P>::packed(key_operands.value), query_operands.grad_output + column * k_steps<P>(c),
          COperand<A>::panels(weight_grads_), keys, width, k_steps<P>(c), GemmMode::kStore);
      P* const energy_grads = energy_grads_ + column * k_steps<P>(keys);
      for (std::int64_t row = 0; row < keys; ++row) {
        for (std::int64_t i = 0; i < width; i += kLane) {
          A* const element = weights_ + row * width + i;
          store(
              element,
              exp(fma(load<V>(element), scale, -load<V>(logsumexp + column + i)) - load<V>(correction + column + i)));
        }
      }
      if (delta_source == DeltaSource::kTile) {
        compute_delta(keys, width, delta + column);
      }
      if constexpr (kSubtractsMeanKeys) {
        if (delta_source == DeltaSource::kOutput) {
          tile_gemm<P>(
              AOperand<P>::packed(key_operands.key_transposed), weights_, COperand<A>::panels(mean_keys + column * e),
              e, width, k_steps<P>(keys), mode);
        }
      }
      for (std::int64_t row = 0; row < keys; ++row) {
        for (std::int64_t i = 0; i < width; i += kLane) {
          const std::int64_t at = row * width + i;
          const V weight = load<V>(weights_ + at);
          const V energy_grad = weight * fma(load<V>(weight_grads_ + at), scale, -load<V>(delta + column + i));
          const std::int64_t row_at = row * columns + column + i;
          if constexpr (kIsPair<P>) {
            narrow<kLane>(reinterpret_cast<T*>(weight_rows_) + row_at, weight);
            narrow<kLane>(reinterpret_cast<T*>(energy_grad_rows_) + row_at, energy_grad);
            store(weight_grads_ + at, energy_grad);
          } else {
            store(weight_rows_ + row_at, weight);
            store(energy_grad_rows_ + row_at, energy_grad);
            store(energy_grads + at, energy_grad);
          }
        }
      }
      if constexpr (kIsPair<P>) {
        pack_b_from_panels<P>(energy_grads, weight_grads_, keys, width);
        if (queries % 2 != 0 && column + width > queries) {
          clear_padding_query(keys, queries, columns);
        }
      }
      if constexpr (kSubtractsMeanKeys) {
        if (delta_source == DeltaSource::kOutput) {
          add_rows(energy_grads, keys, width, grad_sum + column);
        }
      }
    }
  }

  // Adds the tile's part of grad_value and grad_key, transposed, in C panels (keys x C) and (keys x E).
  void add_key_gradients(
      std::int64_t keys, const QueryOperands<T>& query_operands, std::int64_t queries, A* grad_value, A* grad_key,
      GemmMode mode) const {
    const std::int64_t row_stride = k_steps<P>(padded_columns<P>(queries));
    tile_gemm<P>(
        AOperand<P>::strided(weight_rows_, 1, row_stride), query_operands.grad_output_transposed,
        COperand<A>::panels(grad_value), keys, sizes_.value_channels, k_steps<P>(queries), mode);
    tile_gemm<P>(
        AOperand<P>::strided(energy_grad_rows_, 1, row_stride), query_operands.query_transposed,
        COperand<A>::panels(grad_key), keys, sizes_.key_channels, k_steps<P>(queries), mode);
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
  // An odd number of queries leaves half of the last pair to a padding query. Its weights are 0, but NaN for a key of
  // -inf, and the products sum over it.
  void clear_padding_query(std::int64_t keys, std::int64_t queries, std::int64_t columns) const {
    for (std::int64_t row = 0; row < keys; ++row) {
      reinterpret_cast<T*>(weight_rows_)[row * columns + queries] = T{};
      reinterpret_cast<T*>(energy_grad_rows_)[row * columns + queries] = T{};
    }
  }

  // panel_delta = scale * mean of dP weighted by P, over the keys of one column panel of `width`. The division by the
  // sum of the weights, which differs from 1 by the rounding of the logsumexp, keeps the sum of the energy gradients 0.
  // For float the mean is subtracted from dP and panel_delta is the mean of the rest, because the rounding of the whole
  // mean would leave a sum of that size too.
  void compute_delta(std::int64_t keys, std::int64_t width, A* panel_delta) const {
    for (std::int64_t i = 0; i < width; i += kLane) {
      V sum{}, total{};
      for (std::int64_t row = 0; row < keys; ++row) {
        const V weight = load<V>(weights_ + row * width + i);
        sum = fma(weight, load<V>(weight_grads_ + row * width + i), sum);
        total += weight;
      }
      const auto mean_of = [&](V weighted) { return select(total > V{}, weighted / total, V{}); };
      V mean = mean_of(sum);
      if constexpr (kSubtractsMeanKeys) {
        V rest{};
        for (std::int64_t row = 0; row < keys; ++row) {
          A* const grad = weight_grads_ + row * width + i;
          const V grad_rest = load<V>(grad) - mean;
          store(grad, grad_rest);
          rest = fma(load<V>(weights_ + row * width + i), grad_rest, rest);
        }
        mean = mean_of(rest);
      }
      store(panel_delta + i, mean * broadcast<V>(scale_));
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
  A *weights_, *weight_grads_;          // P and dP of one column panel
  P *weight_rows_, *energy_grad_rows_;  // P and dS of the tile, row-major: strided A operands
  P* energy_grads_;                     // dS of the tile in panels: a B operand
};

}  // namespace segattn::cpu
