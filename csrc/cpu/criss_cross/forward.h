// Criss-cross attention, forward. The row pass, here, writes each position's attention over its row alone, and the
// maximum and total of its softmax. The column pass (column_forward.h) merges the attention over the column, without
// the position itself, into it. For one of the two alone, its pass writes the results.
#pragma once

#include "cpu/common/attention_softmax.h"
#include "cpu/criss_cross/column_forward.h"
#include "cpu/criss_cross/row_products.h"

namespace segattn::cpu {

template <class T, class R, Keys kKeys>
class CrissCrossForward {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  using V = Vec<A>;
  static constexpr std::int64_t kLane = kLanes<A>;

 public:
  explicit CrissCrossForward(const CrissCrossForwardArguments<T, R>& arguments)
      : arguments_(arguments),
        image_{arguments.sizes.height, arguments.sizes.width},
        row_total_(kKeys == Keys::kRowAndColumn ? arguments.sizes.batch * image_.positions() : 0) {}

  void run() const {
    if constexpr (kKeys != Keys::kColumn) {
      run_rows();
    }
    if constexpr (kKeys != Keys::kRow) {
      ColumnForward<T, R, kKeys>(arguments_, row_total_.data()).run();
    }
  }

 private:
  void run_rows() const {
    const CrissCrossSizes& sizes = arguments_.sizes;
    const RowProducts<T> products(image_, std::max(sizes.key_channels, sizes.value_channels));
    const std::int64_t block = products.block();
    const std::size_t scratch_size = scratch_bytes<A>(panels_size<P>(image_.width, block)) +
        (kIsPair<P> ? scratch_bytes<P>(packed_b_size<P>(block, image_.width)) : 0) +
        3 * scratch_bytes<A>(padded_columns<P>(block));
    for_each_row(
        image_, sizes.batch, products, scratch_size,
        [&](std::int64_t sample, const RowProducts<T>& row, Scratch& scratch) { attend(sample, row, scratch); });
  }

  void attend(std::int64_t sample, const RowProducts<T>& row, Scratch& scratch) const {
    const CrissCrossSizes& sizes = arguments_.sizes;
    const std::int64_t positions = image_.positions();
    const std::int64_t width = image_.width;
    const std::int64_t key_offset = sample * sizes.key_channels * positions;
    const std::int64_t value_offset = sample * sizes.value_channels * positions;
    A* const panels = scratch.take<A>(panels_size<P>(width, row.block()));
    P* const packed = kIsPair<P> ? scratch.take<P>(packed_b_size<P>(row.block(), width)) : nullptr;
    A* const maximum = scratch.take<A>(padded_columns<P>(row.block()));
    A* const total = scratch.take<A>(padded_columns<P>(row.block()));
    A* const factor = scratch.take<A>(padded_columns<P>(row.block()));
    row.for_each_block([&](Range block) {
      const std::int64_t queries = block.size();
      row.dot_products(arguments_.key + key_offset, arguments_.query + key_offset, sizes.key_channels, block, panels);
      exponentials(panels, width, queries, maximum, total);
      store_statistics(sample * positions + row.offset() + block.begin, queries, maximum, total, factor);
      scale_columns(panels, width, queries, factor);
      const P* const weights = b_operand_of_panels<P>(packed, panels, width, queries);
      row.weighted_sum(
          arguments_.value + value_offset, sizes.value_channels, {0, width}, weights, block,
          arguments_.output + value_offset);
    });
  }

  // C panels (keys x queries), from q.k to exp(energy - that of maximum), with every query's maximum and total.
  void exponentials(A* panels, std::int64_t keys, std::int64_t queries, A* maximum, A* total) const {
    const ForwardSoftmax<V> softmax(arguments_.scale);
    for_each_column_vector(panels, keys, queries, [&](std::int64_t column, A* products, std::int64_t width) {
      V most = softmax.lowest();
      for (std::int64_t j = 0; j < keys; ++j) {
        most = softmax.maximum(most, load<V>(products + j * width));
      }
      const V offset = softmax.offset(most);
      BlockedSum<V> sum;
      for (std::int64_t j = 0; j < keys; ++j) {
        const V weight = softmax.weight(load<V>(products + j * width), offset);
        store(products + j * width, weight);
        sum.add(weight, j);
      }
      store(maximum + column, most);
      store(total + column, sum.total());
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

  // Calls work(column, address of the first row, row stride) for every vector of columns.
  template <class Work>
  static void for_each_column_vector(A* panels, std::int64_t rows, std::int64_t columns, const Work& work) {
    for (std::int64_t first = 0; first < columns; first += panel_columns<A>) {
      const std::int64_t width = panel_width<A>(columns, first);
      for (std::int64_t i = 0; i < width; i += kLane) {
        work(first + i, panels + first * rows + i, width);
      }
    }
  }

  // Stores maximum and total for the column pass, the maximum in logsumexp, or the logsumexp of the row alone, and
  // computes the factor that normalizes the row's weights.
  void store_statistics(std::int64_t offset, std::int64_t queries, const A* maximum, const A* total, A* factor) const {
    for (std::int64_t i = 0; i < queries; ++i) {
      if constexpr (kKeys == Keys::kRow) {
        const A size = std::abs(arguments_.scale);
        const auto logsumexp = split_logsumexp(maximum[i], size, maximum[i] * size, total[i]);
        arguments_.logsumexp[offset + i] = logsumexp.value;
        arguments_.logsumexp_low[offset + i] = logsumexp.low;
      } else {
        arguments_.logsumexp[offset + i] = maximum[i];
        row_total_.data()[offset + i] = total[i];
      }
      factor[i] = total[i] == 0 ? A(0) : A(1) / total[i];  // 0: all energies of the row are -inf
    }
  }

  CrissCrossForwardArguments<T, R> arguments_;
  ImageSize image_;
  Buffer<A> row_total_;  // (B, H, W): sum over the row of exp(energy - that of maximum)
};

}  // namespace segattn::cpu
