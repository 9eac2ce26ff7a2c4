// The products of criss-cross attention along a row of a feature map (channels, H, W), whose positions lie next to each
// other: tile_gemm's, in chunks of channels, so that the operands stay in the second-level cache.
//
// A row's weights are C panels (keys x queries), or B operands of tile_gemm, for a block of queries.
#pragma once

#include "cpu/common/map_sizes.h"
#include "cpu/common/pack.h"
#include "cpu/common/parallel.h"

namespace segattn::cpu {

// C(row, column) in panels of `rows` rows.
template <class A>
constexpr std::int64_t panel_offset(std::int64_t rows, std::int64_t columns, std::int64_t row, std::int64_t column) {
  const std::int64_t first = column / panel_columns<A> * panel_columns<A>;
  return first * rows + row * panel_width<A>(columns, first) + column - first;
}

// B(k = column, column = row) of C panels (m x n).
template <class P>
void pack_b_from_transposed_panels(P* target, const AccumulatorOf<P>* panels, std::int64_t m, std::int64_t n) {
  using A = AccumulatorOf<P>;
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>;
  const std::int64_t steps = k_steps<P>(n);
  for (std::int64_t column = 0; column < n; column += lanes) {
    const std::int64_t columns = std::min<std::int64_t>(lanes, n - column);
    const std::int64_t ld = panel_width<P>(n, column / panel_columns<P> * panel_columns<P>);
    for (std::int64_t row = 0; row < m; row += lanes) {
      const A* const block = panels + panel_offset<A>(m, n, row, column);
      V vectors[lanes];
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) {
        vectors[r] = row + r < m ? load<V>(block + r * ld) : V{};
      }
      transpose(vectors);
      const std::int64_t first = row / panel_columns<P> * panel_columns<P>;
      const std::int64_t width = panel_width<P>(m, first);
      P* const out = target + first * steps + row - first;
      if constexpr (kIsPair<P>) {
#pragma GCC unroll 16
        for (int c = 0; c < lanes; c += 2) {
          auto bits = bfloat16_bits<lanes>(vectors[c]);
          if (c + 1 < columns) {  // the padding's columns hold no zeros
            bits |= bfloat16_bits<lanes>(vectors[c + 1]) << 16;
          }
          if (c < columns) {
            store(out + (column + c) / 2 * width, bits);
          }
        }
      } else {
#pragma GCC unroll 16
        for (int c = 0; c < lanes; ++c) {
          if (c < columns) {
            store(out + (column + c) * width, vectors[c]);
          }
        }
      }
    }
  }
}

template <class T>
class RowProducts {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  using V = Vec<A>;
  static constexpr std::int64_t kLane = kLanes<A>;
  // Operands for which a row of the map will do as it is.
  static constexpr bool kInPlace = std::is_same_v<T, P>;
  // A block of tile_gemm's k: the energy's sums stay in registers for as long.
  static constexpr std::int64_t kScoreChannels = kBlockSteps;
  // 64 channels of values (25 KB at 97) and of results (29 KB) go through the first-level cache.
  static constexpr std::int64_t kApplyChannels = 64;

 public:
  // Queries of a row that are worked on at once: all of them while the weights (256 x 256 float: 256 KB) fit, then a
  // strip that keeps the scratch memory linear in the width. It depends on nothing but the width: gradients are summed
  // over blocks.
  static std::int64_t query_block(std::int64_t width) {
    constexpr std::int64_t whole = 256;
    constexpr std::int64_t panel = panel_columns<P>;
    return width <= whole ? width : std::max(panel, whole * whole / width / panel * panel);
  }

  // Products of at most `channels` channels.
  RowProducts(MapSizes map, std::int64_t channels)
      : map_(map),
        block_(query_block(map.width)),
        score_channels_(std::min(channels, kScoreChannels)),
        apply_channels_(std::min(channels, kApplyChannels)) {}

  std::int64_t block() const { return block_; }

  std::size_t scratch() const { return scratch_bytes<P>(operand_size()) + scratch_bytes<A>(result_size()); }

  // The same with memory from `scratch`, for one row.
  RowProducts of_row(std::int64_t row, Scratch& scratch) const {
    RowProducts products = *this;
    products.row_ = row * map_.width;
    products.operands_ = scratch.take<P>(operand_size());
    products.results_ = scratch.take<A>(result_size());
    return products;
  }

  // Where the row begins in a map's channel.
  std::int64_t offset() const { return row_; }

  // C panels (keys x queries): the dot products over channels of `keys`' and `queries`' columns. Both maps: (channels, H,
  // W). Queries [first, first + count).
  void score(
      const T* keys, const T* queries, std::int64_t channels, std::int64_t first, std::int64_t count, A* panels) const {
    const std::int64_t positions = map_.positions();
    const bool alone = is_alone(count);
    const std::int64_t columns = count - (alone ? 1 : 0);
    for (std::int64_t channel = 0; channel < channels; channel += score_channels_) {
      const std::int64_t depth = std::min(score_channels_, channels - channel);
      const T* const key_chunk = keys + channel * positions + row_;
      const T* const query_chunk = queries + channel * positions + row_ + first;
      P* const packed_keys = operands_;
      P* const packed_queries = operands_ + packed_a_size<P>(map_.width, depth);
      pack_a_from_steps<P>(packed_keys, key_chunk, positions, map_.width, depth);
      pack_b_from_steps<P>(packed_queries, query_chunk, positions, columns, depth);
      const std::int64_t next = std::min(score_channels_, channels - channel - depth);
      Prefetch next_keys(key_chunk + depth * positions, next, positions, 1, 0, map_.width);
      Prefetch next_queries(query_chunk + depth * positions, next, positions, 1, 0, count);
      tile_gemm<P>(
          AOperand<P>::packed(packed_keys), packed_queries, COperand<A>::panels(panels), map_.width, columns,
          k_steps<P>(depth), channel == 0 ? GemmMode::store : GemmMode::add, nullptr, [&](std::int64_t parts) {
            next_keys(parts);
            next_queries(parts);
          });
      if (alone) {
        score_alone(key_chunk, query_chunk + columns, depth, channel > 0);
      }
    }
    if (alone) {
      A* const target = panels + columns * map_.width;
      for (std::int64_t j = 0; j < map_.width; ++j) {
        V vector{};
        vector[0] = results_[j];
        store(target + j * kLane, vector);
      }
    }
  }

  // target (channels, H, W) = the sum over positions [first, first + count) of map (channels, H, W) times weights, B(k =
  // position, column), for positions [first_column, first_column + columns).
  void apply(
      const T* map, std::int64_t channels, std::int64_t first, std::int64_t count, const P* weights,
      std::int64_t first_column, std::int64_t columns, T* target) const {
    const std::int64_t positions = map_.positions();
    // Results that need neither rounding nor a cut are written where they belong.
    const std::int64_t whole = kInPlace ? columns / panel_columns<P> * panel_columns<P> : 0;
    for_each_chunk(
        map, channels, first, count, [&](std::int64_t channel, std::int64_t depth, auto operand, auto& fetch) {
          T* const out = target + channel * positions + row_ + first_column;
          if constexpr (kInPlace) {
            tile_gemm<P>(
                operand, weights, COperand<A>::row_major(out, positions), depth, whole, k_steps<P>(count),
                GemmMode::store, nullptr, fetch);
          }
          const P* const rest = weights + whole * k_steps<P>(count);
          if constexpr (kInPlace) {
            if (is_alone(columns)) {
              sum_alone(map + channel * positions + row_ + first, depth, count, rest, out + whole);
              return;
            }
          }
          tile_gemm<P>(
              operand, rest, COperand<A>::panels(results_), depth, columns - whole, k_steps<P>(count), GemmMode::store,
              nullptr, fetch);
          store_panels(out + whole, positions, results_, depth, columns - whole);
        });
  }

  // Elements of `sums` for accumulate().
  std::int64_t sums_size(std::int64_t channels) const {
    return block_ < map_.width ? (channels + apply_channels_ - 1) / apply_channels_ * result_size() : 0;
  }

  // The same with positions [first, first + count) one block of several: the columns are all positions of the row, the
  // blocks' results are added up in `sums` and go to `target` after the last. A single block needs no `sums`.
  void accumulate(
      const T* map, std::int64_t channels, std::int64_t first, std::int64_t count, const P* weights, A* sums,
      T* target) const {
    if (block_ == map_.width) {
      apply(map, channels, first, count, weights, 0, map_.width, target);
      return;
    }
    for_each_chunk(
        map, channels, first, count, [&](std::int64_t channel, std::int64_t depth, auto operand, auto& fetch) {
          A* const chunk = sums + channel / apply_channels_ * result_size();
          tile_gemm<P>(
              operand, weights, COperand<A>::panels(chunk), depth, map_.width, k_steps<P>(count),
              first == 0 ? GemmMode::store : GemmMode::add, nullptr, fetch);
          if (first + count == map_.width) {
            store_panels(target + channel * map_.positions() + row_, map_.positions(), chunk, depth, map_.width);
          }
        });
  }

 private:
  // work(channel, depth, A operand of positions [first, first + count) of channels [channel, channel + depth), what to do
  // meanwhile)
  template <class Work>
  void for_each_chunk(
      const T* map, std::int64_t channels, std::int64_t first, std::int64_t count, const Work& work) const {
    const std::int64_t positions = map_.positions();
    for (std::int64_t channel = 0; channel < channels; channel += apply_channels_) {
      const std::int64_t depth = std::min(apply_channels_, channels - channel);
      const T* const chunk = map + channel * positions + row_ + first;
      const std::int64_t next = std::min(apply_channels_, channels - channel - depth);
      Prefetch fetch(chunk + depth * positions, next, positions, 1, 0, count);
      if constexpr (kInPlace) {
        work(channel, depth, AOperand<P>::strided(chunk, 1, positions), fetch);
      } else {
        pack_a_from_rows<P>(operands_, chunk, positions, depth, count);
        work(channel, depth, AOperand<P>::packed(operands_), fetch);
      }
    }
  }

  // The last of 97 columns (49, 145, 193, ...) would be padded to a vector of its own as a tile: 16% of the arithmetic. The
  // two functions below need 1/7 of that and less: rows forward 14.2 to 12.3 ms, backward 34.2 to 30.4.
  static bool is_alone(std::int64_t columns) { return columns % panel_columns<P> == 1; }

  // results_ [keys] = or, with `add`, += the dot products over channels of keys (channels, W), rows of a map, and one
  // query (channels), an element of a map.
  void score_alone(const T* keys, const T* query, std::int64_t channels, bool add) const {
    constexpr int most = 8;
    count_multiply_adds(channels * round_up(map_.width, kLane));
    for (std::int64_t first = 0; first < map_.width; first += most * kLane) {
      const std::int64_t vectors = std::min<std::int64_t>(most, (map_.width - first + kLane - 1) / kLane);
      V sums[most] = {};
      for (std::int64_t v = 0; add && v < vectors; ++v) {
        sums[v] = load<V>(results_ + first + v * kLane);
      }
      for (std::int64_t c = 0; c < channels; ++c) {
        const V factor = broadcast<V>(static_cast<A>(query[c * map_.positions()]));
        const T* const row = keys + c * map_.positions() + first;
#pragma GCC unroll 8
        for (int v = 0; v < most; ++v) {
          if (v < vectors) {
            sums[v] = fma(read_vector(row + v * kLane, map_.width - first - v * kLane), factor, sums[v]);
          }
        }
      }
      for (std::int64_t v = 0; v < vectors; ++v) {
        store(results_ + first + v * kLane, sums[v]);
      }
    }
  }

  // target [channels] = map (channels, count) times the only column of weights, B(k = position, column); channels of map
  // and target are a map's channel apart.
  void sum_alone(const T* map, std::int64_t channels, std::int64_t count, const A* weights, T* target) const {
    constexpr int most = kRows<P>;
    count_multiply_adds(channels * round_up(count, kLane));
    A* const column = results_;
    for (std::int64_t k = 0; k < count; ++k) {
      column[k] = weights[k * kLane];
    }
    for (std::int64_t channel = 0; channel < channels; channel += most) {
      const std::int64_t rows = std::min<std::int64_t>(most, channels - channel);
      const T* const first = map + channel * map_.positions();
      V sums[most] = {};
      for (std::int64_t k = 0; k < count; k += kLane) {
        const V factor = read_vector(column + k, count - k);
#pragma GCC unroll 16
        for (std::int64_t r = 0; r < most; ++r) {
          sums[r] = fma(read_vector(first + std::min(r, rows - 1) * map_.positions() + k, count - k), factor, sums[r]);
        }
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        A sum = 0;
        for (int lane = 0; lane < kLane; ++lane) {
          sum += sums[r][lane];
        }
        target[(channel + r) * map_.positions()] = sum;
      }
    }
  }

  std::int64_t operand_size() const {
    return std::max(
        packed_a_size<P>(map_.width, score_channels_) + packed_b_size<P>(block_, score_channels_),
        packed_a_size<P>(apply_channels_, map_.width));
  }
  std::int64_t result_size() const { return panels_size<P>(apply_channels_, map_.width); }

  MapSizes map_;
  std::int64_t block_, score_channels_, apply_channels_;
  std::int64_t row_ = 0;
  P* operands_ = nullptr;
  A* results_ = nullptr;
};

// work(sample, products of a row, scratch) for every row of every sample; `scratch_size` is of what work takes itself.
template <class T, class Work>
void for_each_row(
    MapSizes map, std::int64_t batch, const RowProducts<T>& products, std::size_t scratch_size, const Work& work) {
  parallel_units(batch * map.height, products.scratch() + scratch_size, [&](std::int64_t unit, Scratch& scratch) {
    work(unit / map.height, products.of_row(unit % map.height, scratch), scratch);
  });
}

}  // namespace segattn::cpu
