// Criss-cross attention, forward. The row pass writes each position's attention over its row alone, with the maximum
// and total of its exponentials; the column pass scales that and adds its own part, the position itself left out, by
// the total of both.
#pragma once

#include "criss_cross_products.h"
#include "exp.h"
#include "../checks/criss_cross.h"

#include <cmath>
#include <limits>

namespace segattn::cpu {

template <class T>
struct CrissCrossForwardArguments {
  const T* query;               // (B, E, H, W)
  const T* key;                 // (B, E, H, W)
  const T* value;               // (B, C, H, W)
  T* output;                    // (B, C, H, W)
  AccumulatorOf<T>* logsumexp;  // (B, H, W)
  CrissCrossSizes sizes;
  AccumulatorOf<T> scale;
};

template <class T>
class CrissCrossForward {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  using V = Vec<A>;
  static constexpr std::int64_t kLane = kLanes<A>;
  static constexpr A kInfinity = std::numeric_limits<A>::infinity();

 public:
  explicit CrissCrossForward(const CrissCrossForwardArguments<T>& arguments)
      : arguments_(arguments),
        map_{arguments.sizes.height, arguments.sizes.width},
        row_total_(arguments.sizes.batch * map_.positions()) {}

  void run() const {
    run_branch<RowLine<T>>();
    run_branch<ColumnLines<T>>();
  }

 private:
  template <class Lines>
  void run_branch() const {
    const CrissCrossSizes& sizes = arguments_.sizes;
    const std::int64_t lines = lines_in_group<Lines>(map_, sizes.batch);
    const std::int64_t length = Lines::length_of(map_);
    const LineProducts<T, Lines> products(length, lines, std::max(sizes.key_channels, sizes.value_channels));
    const std::int64_t score_stride = line_stride<A>(panels_size<P>(length, products.block()));
    const std::int64_t weight_stride = line_stride<P>(packed_b_size<P>(products.block(), length));
    const std::size_t scratch_size = products.scratch() + scratch_bytes<A>(lines * score_stride) +
                                     (kIsPair<P> ? scratch_bytes<P>(lines * weight_stride) : 0) +
                                     3 * scratch_bytes<A>(padded_columns<P>(products.block()));
    for_each_group<Lines>(map_, sizes.batch, lines, scratch_size,
                          [&](std::int64_t sample, const Lines& group, Scratch& scratch) {
                            LineProducts<T, Lines> unit_products = products;
                            unit_products.take(scratch);
                            A* const scores = scratch.take<A>(lines * score_stride);
                            P* const weights = kIsPair<P> ? scratch.take<P>(lines * weight_stride) : nullptr;
                            attend(sample, group, unit_products, scores, score_stride, weights, weight_stride, scratch);
                          });
  }

  template <class Lines>
  void attend(std::int64_t sample, const Lines& lines, const LineProducts<T, Lines>& products, A* scores,
              std::int64_t score_stride, P* weights, std::int64_t weight_stride, Scratch& scratch) const {
    const CrissCrossSizes& sizes = arguments_.sizes;
    const std::int64_t positions = map_.positions();
    const std::int64_t length = lines.length();
    const std::int64_t key_offset = sample * sizes.key_channels * positions;
    const std::int64_t value_offset = sample * sizes.value_channels * positions;
    A* const maximum = scratch.take<A>(padded_columns<P>(products.block()));
    A* const total = scratch.take<A>(padded_columns<P>(products.block()));
    A* const factor = scratch.take<A>(padded_columns<P>(products.block()));
    for (std::int64_t first = 0; first < length; first += products.block()) {
      const std::int64_t queries = std::min(products.block(), length - first);
      products.score(lines, arguments_.key + key_offset, arguments_.query + key_offset, sizes.key_channels, first,
                     queries, scores, score_stride);
      for (std::int64_t line = 0; line < lines.lines(); ++line) {
        A* const panels = scores + line * score_stride;
        if constexpr (Lines::kExcludesSelf) {
          for (std::int64_t i = 0; i < queries; ++i) {
            panels[panel_offset<A>(length, queries, first + i, i)] = -kInfinity;
          }
        }
        exponentials(panels, length, queries, maximum, total);
        if constexpr (Lines::kExcludesSelf) {
          merge_with_row(sample, lines, line, first, queries, maximum, total, factor);
        } else {
          keep_row(sample * positions + lines.offset(line, first), queries, maximum, total, factor);
        }
        scale_columns(panels, length, queries, factor);
        if constexpr (kIsPair<P>) {
          pack_b_from_panels<P>(weights + line * weight_stride, panels, length, queries);
        }
      }
      const P* operand;
      std::int64_t operand_stride;
      if constexpr (kIsPair<P>) {
        operand = weights;
        operand_stride = weight_stride;
      } else {
        operand = scores;
        operand_stride = score_stride;
      }
      T* const output = arguments_.output + value_offset;
      const A* const row_share = row_total_.data() + sample * positions;
      products.apply(lines, arguments_.value + value_offset, sizes.value_channels, 0, length, operand, operand_stride,
                     first, queries,
                     [&](std::int64_t channel, std::int64_t position, V vector, std::int64_t n) {
                       T* const target = output + channel * positions + position;
                       if constexpr (Lines::kExcludesSelf) {
                         vector = fma(read_vector(target, n), read_vector(row_share + position, n), vector);
                       }
                       write_vector(target, vector, n);
                     });
    }
  }

  // panels (keys x queries) become exp(scale * score - maximum), with the maximum and the total of every column.
  void exponentials(A* panels, std::int64_t keys, std::int64_t queries, A* maximum, A* total) const {
    const V scale = broadcast<V>(arguments_.scale);
    for_each_column_vector(panels, keys, queries, [&](std::int64_t column, A* scores, std::int64_t width) {
      V most = broadcast<V>(-kInfinity);
      for (std::int64_t j = 0; j < keys; ++j) {
        const V score = load<V>(scores + j * width);
        // The masked score is -inf whatever the scale: -inf times a scale of 0 or below would not be.
        const V scaled = select(score == -kInfinity, score, score * scale);
        store(scores + j * width, scaled);
        most = max(most, scaled);
      }
      // A column of nothing but -inf (H = 1) has weights of 0, not of exp(-inf - -inf) = NaN.
      const V offset = select(most == -kInfinity, V{}, most);
      V sum{};
      for (std::int64_t j = 0; j < keys; ++j) {
        const V weight = exp(load<V>(scores + j * width) - offset);
        store(scores + j * width, weight);
        sum += weight;
      }
      store(maximum + column, most);
      store(total + column, sum);
    });
  }

  static void scale_columns(A* panels, std::int64_t keys, std::int64_t queries, const A* factor) {
    for_each_column_vector(panels, keys, queries, [&](std::int64_t column, A* weights, std::int64_t width) {
      const V column_factor = load<V>(factor + column);
      for (std::int64_t j = 0; j < keys; ++j) {
        store(weights + j * width, load<V>(weights + j * width) * column_factor);
      }
    });
  }

  // work(column, first element of the vector of columns, distance to the next row)
  template <class Work>
  static void for_each_column_vector(A* panels, std::int64_t rows, std::int64_t columns, const Work& work) {
    for (std::int64_t first = 0; first < columns; first += panel_columns<A>) {
      const std::int64_t width = panel_width<A>(columns, first);
      for (std::int64_t i = 0; i < width; i += kLane) {
        work(first + i, panels + first * rows + i, width);
      }
    }
  }

  // The row's weights alone sum to 1; its maximum waits in logsumexp for the column pass.
  void keep_row(std::int64_t offset, std::int64_t queries, const A* maximum, const A* total, A* factor) const {
    for (std::int64_t i = 0; i < queries; ++i) {
      arguments_.logsumexp[offset + i] = maximum[i];
      row_total_.data()[offset + i] = total[i];
      factor[i] = A(1) / total[i];
    }
  }

  // factor: of the column's exponentials. row_total_ becomes the share of the row's attention in the result.
  template <class Lines>
  void merge_with_row(std::int64_t sample, const Lines& lines, std::int64_t line, std::int64_t first,
                      std::int64_t queries, const A* maximum, const A* total, A* factor) const {
    for (std::int64_t i = 0; i < queries; ++i) {
      const std::int64_t offset = sample * map_.positions() + lines.offset(line, first + i);
      A& row_total = row_total_.data()[offset];
      A& logsumexp = arguments_.logsumexp[offset];
      const A row_maximum = logsumexp;
      const A most = maximum[i] > row_maximum ? maximum[i] : row_maximum;
      const A row_sum = std::exp(row_maximum - most) * row_total;
      const A column_exponential = std::exp(maximum[i] - most);
      const A sum = row_sum + column_exponential * total[i];
      logsumexp = most + std::log(sum);
      row_total = row_sum / sum;
      factor[i] = column_exponential / sum;
    }
  }

  CrissCrossForwardArguments<T> arguments_;
  MapSizes map_;
  Buffer<A> row_total_;  // (B, H, W)
};

}  // namespace segattn::cpu
