// The products of criss-cross attention along a group of lines (criss_cross_lines.h), in chunks of channels, so that
// the packed operands of all lines of the group stay in the second-level cache.
#pragma once

#include "criss_cross_lines.h"
#include "parallel.h"

namespace segattn::cpu {

template <class T>
void write_vector(T* target, Vec<AccumulatorOf<T>> vector, std::int64_t n) {
  constexpr int lanes = kLanes<AccumulatorOf<T>>;
  if (n == lanes) {
    narrow<lanes>(target, vector);
  } else {
    narrow_partial<lanes>(target, vector, n);
  }
}

template <class T>
Vec<AccumulatorOf<T>> read_vector(const T* source, std::int64_t n) {
  constexpr int lanes = kLanes<AccumulatorOf<T>>;
  return n == lanes ? widen<lanes>(source) : widen_partial<lanes>(source, n);
}

// What a gradient or result gets from one branch: the row pass writes it, the column pass, later, adds.
template <class Lines, class T>
void put_vector(T* target, Vec<AccumulatorOf<T>> vector, std::int64_t n) {
  if constexpr (Lines::kMostLines > 1) {
    vector += read_vector(target, n);
  }
  write_vector(target, vector, n);
}

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

template <class T, class Lines>
class LineProducts {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;

 public:
  // Queries of a line that are worked on at once: all of them while the weights (16 lines of 128 x 128 float: 1 MB)
  // fit, then a strip that keeps the scratch memory linear in the length. It depends on nothing but the length:
  // gradients are summed over blocks.
  static std::int64_t query_block(std::int64_t length) {
    constexpr std::int64_t whole = Lines::kMostLines > 1 ? 128 : 256;
    constexpr std::int64_t panel = panel_columns<P>;
    return length <= whole ? length : std::max(panel, whole * whole / length / panel * panel);
  }

  // Products of at most `channels` channels on groups of at most `lines` lines of `length` positions.
  LineProducts(std::int64_t length, std::int64_t lines, std::int64_t channels)
      : length_(length),
        lines_(lines),
        block_(query_block(length)),
        score_channels_(std::min(channels, Lines::kScoreChannels)),
        apply_channels_(std::min(channels, Lines::kApplyChannels)) {}

  std::int64_t block() const { return block_; }

  std::size_t scratch() const { return scratch_bytes<P>(operand_size()) + scratch_bytes<A>(result_size()); }

  void take(Scratch& scratch) {
    operands_ = scratch.take<P>(operand_size());
    results_ = scratch.take<A>(result_size());
  }

  // C panels (keys x queries) of every line, `stride` apart: the dot products over channels of `keys`' and `queries`'
  // columns. Both maps: (channels, H, W). Queries [first, first + count).
  void score(const Lines& lines, const T* keys, const T* queries, std::int64_t channels, std::int64_t first,
             std::int64_t count, A* panels, std::int64_t stride) const {
    const std::int64_t positions = lines.positions();
    for (std::int64_t channel = 0; channel < channels; channel += score_channels_) {
      const std::int64_t depth = std::min(score_channels_, channels - channel);
      const std::int64_t key_stride = line_stride<P>(packed_a_size<P>(length_, depth));
      const std::int64_t query_stride = line_stride<P>(packed_b_size<P>(count, depth));
      P* const packed_keys = operands_;
      P* const packed_queries = operands_ + lines_ * key_stride;
      lines.pack_positions_a(packed_keys, key_stride, keys + channel * positions, 0, length_, depth);
      lines.pack_positions_b(packed_queries, query_stride, queries + channel * positions, first, count, depth);
      for (std::int64_t line = 0; line < lines.lines(); ++line) {
        tile_gemm<P>(AOperand<P>::packed(packed_keys + line * key_stride), packed_queries + line * query_stride,
                     COperand<A>::panels(panels + line * stride), length_, count, k_steps<P>(depth),
                     channel == 0 ? GemmMode::store : GemmMode::add);
      }
    }
  }

  // use(channel, position, vector, n) for sum over positions [first, first + count) of map (channels, H, W) times
  // weights, B(k = position, column), of `columns` columns; those stand for positions [first_column, first_column +
  // columns).
  template <class Use>
  void apply(const Lines& lines, const T* map, std::int64_t channels, std::int64_t first, std::int64_t count,
             const P* weights, std::int64_t weights_stride, std::int64_t first_column, std::int64_t columns,
             const Use& use) const {
    const std::int64_t stride = line_stride<A>(panels_size<P>(apply_channels_, columns));
    for_each_chunk(lines, map, channels, first, count, [&](std::int64_t channel, std::int64_t depth, auto operand) {
      for (std::int64_t line = 0; line < lines.lines(); ++line) {
        tile_gemm<P>(operand(line), weights + line * weights_stride, COperand<A>::panels(results_ + line * stride),
                     depth, columns, k_steps<P>(count), GemmMode::store);
      }
      lines.for_each_vector(results_, stride, depth, first_column, columns,
                            [&](std::int64_t row, std::int64_t position, Vec<A> vector, std::int64_t n) {
                              use(channel + row, position, vector, n);
                            });
    });
  }

  // Elements of `sums` for accumulate().
  std::int64_t sums_size(std::int64_t channels) const {
    return (channels + apply_channels_ - 1) / apply_channels_ * lines_ * sums_stride();
  }

  // The same with positions [first, first + count) one block of several: the columns are all positions of the line,
  // the blocks' results are added up in `sums` and go to `use` after the last. A single block needs no `sums`.
  template <class Use>
  void accumulate(const Lines& lines, const T* map, std::int64_t channels, std::int64_t first, std::int64_t count,
                  const P* weights, std::int64_t weights_stride, A* sums, const Use& use) const {
    if (block_ == length_) {
      apply(lines, map, channels, first, count, weights, weights_stride, 0, length_, use);
      return;
    }
    for_each_chunk(lines, map, channels, first, count, [&](std::int64_t channel, std::int64_t depth, auto operand) {
      A* const chunk = sums + channel / apply_channels_ * lines_ * sums_stride();
      for (std::int64_t line = 0; line < lines.lines(); ++line) {
        tile_gemm<P>(operand(line), weights + line * weights_stride,
                     COperand<A>::panels(chunk + line * sums_stride()), depth, length_, k_steps<P>(count),
                     first == 0 ? GemmMode::store : GemmMode::add);
      }
      if (first + count == length_) {
        lines.for_each_vector(chunk, sums_stride(), depth, 0, length_,
                              [&](std::int64_t row, std::int64_t position, Vec<A> vector, std::int64_t n) {
                                use(channel + row, position, vector, n);
                              });
      }
    });
  }

 private:
  template <class Work>
  void for_each_chunk(const Lines& lines, const T* map, std::int64_t channels, std::int64_t first, std::int64_t count,
                      const Work& work) const {
    for (std::int64_t channel = 0; channel < channels; channel += apply_channels_) {
      const std::int64_t depth = std::min(apply_channels_, channels - channel);
      const std::int64_t stride = line_stride<P>(packed_a_size<P>(depth, count));
      lines.pack_channels_a(operands_, stride, map + channel * lines.positions(), first, count, depth);
      work(channel, depth,
           [&](std::int64_t line) { return AOperand<P>::packed(operands_ + line * stride); });
    }
  }

  std::int64_t operand_size() const {
    return lines_ * std::max(line_stride<P>(packed_a_size<P>(length_, score_channels_)) +
                                 line_stride<P>(packed_b_size<P>(block_, score_channels_)),
                             line_stride<P>(packed_a_size<P>(apply_channels_, length_)));
  }
  std::int64_t result_size() const {
    return lines_ * line_stride<A>(panels_size<P>(apply_channels_, length_));
  }
  std::int64_t sums_stride() const { return line_stride<A>(panels_size<P>(apply_channels_, length_)); }

  std::int64_t length_, lines_, block_, score_channels_, apply_channels_;
  P* operands_ = nullptr;
  A* results_ = nullptr;
};

// Lines of a group: whole tiles, or fewer where that would leave threads idle. No result depends on it.
template <class Lines>
std::int64_t lines_in_group(MapSizes sizes, std::int64_t batch) {
  const auto threads = static_cast<std::int64_t>(torch::stable::get_num_threads());
  std::int64_t lines = Lines::kMostLines;
  while (lines > 4 && Lines::groups(sizes, lines) * batch < 2 * threads) {
    lines /= 2;
  }
  return lines;
}

// work(sample, lines, scratch) for every group of lines of every sample.
template <class Lines, class Work>
void for_each_group(MapSizes sizes, std::int64_t batch, std::int64_t lines, std::size_t scratch_size,
                    const Work& work) {
  const std::int64_t groups = Lines::groups(sizes, lines);
  parallel_units(batch * groups, scratch_size, [&](std::int64_t unit, Scratch& scratch) {
    work(unit / groups, Lines(sizes, unit % groups, lines), scratch);
  });
}

}  // namespace segattn::cpu
