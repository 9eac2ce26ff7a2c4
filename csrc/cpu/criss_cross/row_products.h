// The products of criss-cross attention along a row of a feature map (channels, H, W), whose positions are contiguous:
// by tile_gemm, in chunks of channels, so that the operands stay in L2.
//
// A row's weights are C panels (keys x queries), or B operands of tile_gemm, for a block of queries.
#pragma once

#include "cpu/common/pack.h"
#include "cpu/common/parallel.h"
#include "cpu/common/range.h"
#include "cpu/criss_cross/arguments.h"

namespace segattn::cpu {

// The offset of C(row, column) in C panels (rows x columns).
template <class A>
constexpr std::int64_t panel_offset(std::int64_t rows, std::int64_t columns, std::int64_t row, std::int64_t column) {
  const std::int64_t first = column / panel_columns<A> * panel_columns<A>;
  return first * rows + row * panel_width<A>(columns, first) + column - first;
}

// Packs the transpose of C panels (m x n) as a B operand: B(k, column) = C(column, k).
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
          if (c + 1 < columns) {  // the padding columns are not zero
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
  // Whether a feature map needs no packing as an A operand.
  static constexpr bool kInPlace = std::is_same_v<T, P>;
  // One block of k of tile_gemm, during which the sums stay in registers.
  static constexpr std::int64_t kDotChannels = kBlockSteps;
  // At a width of 97, 64 channels of features take 25 KB and of results 29 KB.
  static constexpr std::int64_t kSumChannels = 64;

 public:
  // Queries whose weights are held at once: a whole row up to a width of 256 (256 x 256 float: 256 KB), fewer beyond
  // it, which keeps the scratch memory linear in the width. Gradients are summed over blocks, so the size depends on
  // the width alone.
  static std::int64_t query_block(std::int64_t width) {
    constexpr std::int64_t whole = 256;
    constexpr std::int64_t panel = panel_columns<P>;
    return width <= whole ? width : std::max(panel, whole * whole / width / panel * panel);
  }

  // `channels`: the maximum number of channels of any product.
  RowProducts(ImageSize image, std::int64_t channels)
      : image_(image),
        block_(query_block(image.width)),
        dot_channels_(std::min(channels, kDotChannels)),
        sum_channels_(std::min(channels, kSumChannels)) {}

  // The largest block of queries.
  std::int64_t block() const { return block_; }

  // Calls use(range) for every block of the row's queries.
  template <class Use>
  void for_each_block(const Use& use) const {
    for (std::int64_t first = 0; first < image_.width; first += block_) {
      use(Range{first, std::min(image_.width, first + block_)});
    }
  }

  std::size_t scratch() const { return scratch_bytes<P>(operand_size()) + scratch_bytes<A>(result_size()); }

  // The same for one row, with memory from `scratch`.
  RowProducts of_row(std::int64_t row, Scratch& scratch) const {
    RowProducts products = *this;
    products.row_ = row * image_.width;
    products.operands_ = scratch.take<P>(operand_size());
    products.results_ = scratch.take<A>(result_size());
    return products;
  }

  // The offset of the row within a channel.
  std::int64_t offset() const { return row_; }

  // C panels (keys x queries) = sum over channels of keys * queries, for a block of queries.
  // keys, queries: (channels, H, W).
  void dot_products(const T* keys, const T* queries, std::int64_t channels, Range block, A* panels) const {
    const std::int64_t positions = image_.positions();
    const bool lone_last = has_lone_last_column(block.size());
    const std::int64_t columns = block.size() - (lone_last ? 1 : 0);
    for (std::int64_t channel = 0; channel < channels; channel += dot_channels_) {
      const std::int64_t depth = std::min(dot_channels_, channels - channel);
      const T* const key_chunk = keys + channel * positions + row_;
      const T* const query_chunk = queries + channel * positions + row_ + block.begin;
      P* const packed_keys = operands_;
      P* const packed_queries = operands_ + packed_a_size<P>(image_.width, depth);
      pack_a_from_steps<P>(packed_keys, key_chunk, positions, image_.width, depth);
      pack_b_from_steps<P>(packed_queries, query_chunk, positions, columns, depth);
      const std::int64_t next = std::min(dot_channels_, channels - channel - depth);
      Prefetch next_keys(key_chunk + depth * positions, next, positions, 1, 0, image_.width);
      Prefetch next_queries(query_chunk + depth * positions, next, positions, 1, 0, block.size());
      tile_gemm<P>(
          AOperand<P>::packed(packed_keys), packed_queries, COperand<A>::panels(panels), image_.width, columns,
          k_steps<P>(depth), channel == 0 ? GemmMode::kStore : GemmMode::kAdd, nullptr, [&](std::int64_t parts) {
            next_keys(parts);
            next_queries(parts);
          });
      if (lone_last) {
        dot_products_with_last_query(
            key_chunk, query_chunk + columns, depth, channel == 0 ? GemmMode::kStore : GemmMode::kAdd);
      }
    }
    if (lone_last) {
      A* const target = panels + columns * image_.width;
      for (std::int64_t j = 0; j < image_.width; ++j) {
        V vector{};
        vector[0] = results_[j];
        store(target + j * kLane, vector);
      }
    }
  }

  // target (channels, H, W) at `results` = sum over `terms` of features (channels, H, W) * weights. Both ranges are
  // positions of the row; weights is the B operand, B(k = term, column = result). R: T or A
  template <class R>
  void weighted_sum(
      const T* features, std::int64_t channels, Range terms, const P* weights, Range results, R* target) const {
    const std::int64_t columns = results.size();
    const std::int64_t positions = image_.positions();
    // Whole panels of results that need no rounding are written to target directly.
    const std::int64_t whole = kInPlace ? columns / panel_columns<P> * panel_columns<P> : 0;
    for_each_chunk(features, channels, terms, [&](std::int64_t channel, std::int64_t depth, auto operand, auto& fetch) {
      R* const out = target + channel * positions + row_ + results.begin;
      if constexpr (kInPlace) {
        tile_gemm<P>(
            operand, weights, COperand<A>::row_major(out, positions), depth, whole, k_steps<P>(terms.size()),
            GemmMode::kStore, nullptr, fetch);
      }
      const P* const rest = weights + whole * k_steps<P>(terms.size());
      if constexpr (kInPlace) {
        if (has_lone_last_column(columns)) {
          weighted_sum_of_last_column(
              features + channel * positions + row_ + terms.begin, depth, terms.size(), rest, out + whole);
          return;
        }
      }
      tile_gemm<P>(
          operand, rest, COperand<A>::panels(results_), depth, columns - whole, k_steps<P>(terms.size()),
          GemmMode::kStore, nullptr, fetch);
      store_panels(out + whole, positions, results_, depth, columns - whole);
    });
  }

  // Elements of `sums` for accumulate().
  std::int64_t sums_size(std::int64_t channels) const {
    return block_ < image_.width ? ceil_div(channels, sum_channels_) * result_size() : 0;
  }

  // The same with a block of the row as terms and the whole row as results. Call it for every block in order: they are
  // added up in `sums`, and the last writes `target`. A single block does not use `sums`.
  template <class R>
  void accumulate(const T* features, std::int64_t channels, Range block, const P* weights, A* sums, R* target) const {
    if (block_ == image_.width) {
      weighted_sum(features, channels, block, weights, {0, image_.width}, target);
      return;
    }
    for_each_chunk(features, channels, block, [&](std::int64_t channel, std::int64_t depth, auto operand, auto& fetch) {
      A* const chunk = sums + channel / sum_channels_ * result_size();
      tile_gemm<P>(
          operand, weights, COperand<A>::panels(chunk), depth, image_.width, k_steps<P>(block.size()),
          block.begin == 0 ? GemmMode::kStore : GemmMode::kAdd, nullptr, fetch);
      if (block.end == image_.width) {
        store_panels(target + channel * image_.positions() + row_, image_.positions(), chunk, depth, image_.width);
      }
    });
  }

 private:
  // Calls work(first channel, channels, A operand, prefetch of the next chunk) for every chunk of channels of
  // `features` at the positions `terms`.
  template <class Work>
  void for_each_chunk(const T* features, std::int64_t channels, Range terms, const Work& work) const {
    const std::int64_t positions = image_.positions();
    for (std::int64_t channel = 0; channel < channels; channel += sum_channels_) {
      const std::int64_t depth = std::min(sum_channels_, channels - channel);
      const T* const chunk = features + channel * positions + row_ + terms.begin;
      const std::int64_t next = std::min(sum_channels_, channels - channel - depth);
      Prefetch fetch(chunk + depth * positions, next, positions, 1, 0, terms.size());
      if constexpr (kInPlace) {
        work(channel, depth, AOperand<P>::strided(chunk, 1, positions), fetch);
      } else {
        pack_a_from_rows<P>(operands_, chunk, positions, depth, terms.size());
        work(channel, depth, AOperand<P>::packed(operands_), fetch);
      }
    }
  }

  // As a tile, the last of 97 columns (49, 145, 193, ...) would be padded to a vector: 16% of the arithmetic. The two
  // functions below need a seventh of that (row pass forward 14.2 to 12.3 ms, backward 34.2 to 30.4).
  static bool has_lone_last_column(std::int64_t columns) { return columns % panel_columns<P> == 1; }

  // results_ [keys] (+)= sum over channels of keys (channels, W) * query (channels); consecutive channels are a feature
  // map's channel apart.
  void dot_products_with_last_query(const T* keys, const T* query, std::int64_t channels, GemmMode mode) const {
    constexpr int most = 8;
    count_multiply_adds(channels * round_up(image_.width, kLane));
    for (std::int64_t first = 0; first < image_.width; first += most * kLane) {
      const std::int64_t vectors = std::min<std::int64_t>(most, ceil_div(image_.width - first, kLane));
      V sums[most] = {};
      for (std::int64_t v = 0; mode == GemmMode::kAdd && v < vectors; ++v) {
        sums[v] = load<V>(results_ + first + v * kLane);
      }
      for (std::int64_t c = 0; c < channels; ++c) {
        const V factor = broadcast<V>(static_cast<A>(query[c * image_.positions()]));
        const T* const row = keys + c * image_.positions() + first;
#pragma GCC unroll 8
        for (int v = 0; v < most; ++v) {
          if (v < vectors) {
            sums[v] = fma(read_vector(row + v * kLane, image_.width - first - v * kLane), factor, sums[v]);
          }
        }
      }
      for (std::int64_t v = 0; v < vectors; ++v) {
        store(results_ + first + v * kLane, sums[v]);
      }
    }
  }

  // target (channels) = sum over k of features (channels, count) * weights, a B operand of one column; consecutive
  // channels are a feature map's channel apart.
  void weighted_sum_of_last_column(
      const T* features, std::int64_t channels, std::int64_t count, const A* weights, T* target) const {
    constexpr int most = kRows<P>;
    count_multiply_adds(channels * round_up(count, kLane));
    A* const column = results_;
    for (std::int64_t k = 0; k < count; ++k) {
      column[k] = weights[k * kLane];
    }
    for (std::int64_t channel = 0; channel < channels; channel += most) {
      const std::int64_t rows = std::min<std::int64_t>(most, channels - channel);
      const T* const first = features + channel * image_.positions();
      V sums[most] = {};
      for (std::int64_t k = 0; k < count; k += kLane) {
        const V factor = read_vector(column + k, count - k);
#pragma GCC unroll 16
        for (std::int64_t r = 0; r < most; ++r) {
          sums[r] =
              fma(read_vector(first + std::min(r, rows - 1) * image_.positions() + k, count - k), factor, sums[r]);
        }
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        A sum = 0;
        for (int lane = 0; lane < kLane; ++lane) {
          sum += sums[r][lane];
        }
        target[(channel + r) * image_.positions()] = sum;
      }
    }
  }

  std::int64_t operand_size() const {
    return std::max(
        packed_a_size<P>(image_.width, dot_channels_) + packed_b_size<P>(block_, dot_channels_),
        packed_a_size<P>(sum_channels_, image_.width));
  }
  std::int64_t result_size() const { return panels_size<P>(sum_channels_, image_.width); }

  ImageSize image_;
  std::int64_t block_, dot_channels_, sum_channels_;
  std::int64_t row_ = 0;
  P* operands_ = nullptr;
  A* results_ = nullptr;
};

// Calls work(sample, products of a row, scratch) for every row of every sample; scratch_size: what work takes itself.
template <class T, class Work>
void for_each_row(
    ImageSize image, std::int64_t batch, const RowProducts<T>& products, std::size_t scratch_size, const Work& work) {
  parallel_units(batch * image.height, products.scratch() + scratch_size, [&](std::int64_t unit, Scratch& scratch) {
    work(unit / image.height, products.of_row(unit % image.height, scratch), scratch);
  });
}

}  // namespace segattn::cpu
