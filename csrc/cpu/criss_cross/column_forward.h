// Criss-cross attention, forward, the column pass: merges the attention over a position's column, without the position
// itself, into the row pass's output, or writes it alone.
#pragma once

#include "cpu/common/attention_softmax.h"
#include "cpu/common/parallel.h"
#include "cpu/criss_cross/arguments.h"
#include "cpu/criss_cross/column_strip.h"

namespace segattn::cpu {

template <class T, class R, Keys kKeys>
class ColumnForward {
  using A = AccumulatorOf<T>;
  static constexpr std::int64_t kLane = kLanes<A>;

 public:
  // On entry output is the attention over rows alone, logsumexp the rows' maximum (attention_softmax.h), and row_total
  // (B, H, W) the rows' sum of exp(energy - that of maximum). With Keys::kColumn nothing is read of the three.
  ColumnForward(const CrissCrossForwardArguments<T, R>& arguments, const A* row_total)
      : arguments_(arguments), image_{arguments.sizes.height, arguments.sizes.width}, row_total_(row_total) {}

  void run() const {
    using Strip = ColumnStrip<T, kLane>;
    const std::int64_t strips = ceil_div(image_.width, kLane);
    const std::int64_t units = std::max<std::int64_t>(1, strips * arguments_.sizes.batch);
    // Results do not depend on the cut: each query has its own sums. Threads with blocks of the same strip share its
    // values in the cache.
    const QueryBlocks<A> blocks(image_.height, ceil_div(4 * thread_count(), units));
    const std::int64_t queries = blocks.most_queries();
    const std::size_t scratch_size = scratch_bytes<A>(Strip::memory_size(image_.height, queries)) +
        scratch_bytes<A>(queries * Strip::stride(image_.height)) + 2 * scratch_bytes<A>(queries * kLane);
    parallel_units(
        strips * arguments_.sizes.batch * blocks.count(), scratch_size, [&](std::int64_t unit, Scratch& scratch) {
          const std::int64_t block = unit % blocks.count();
          const std::int64_t column = unit / blocks.count() % strips * kLane;
          with_lanes<A>(std::min(kLane, image_.width - column), [&]<int lanes>() {
            Unit<lanes>(*this, unit / blocks.count() / strips, column, blocks[block], scratch).run();
          });
        });
  }

 private:
  // A block of queries of a strip.
  template <int lanes>
  struct Unit {
    using Strip = ColumnStrip<T, lanes>;
    using V = Strip::V;

    const ColumnForward& pass;
    std::int64_t sample;
    Range block;
    Strip strip;
    A* weights;        // [queries][keys]
    A* row_factor;     // [queries]: what the row pass's output is multiplied by
    A* column_factor;  // [queries]: what the column's sums are multiplied by

    Unit(const ColumnForward& pass_, std::int64_t sample_, std::int64_t column, Range block_, Scratch& scratch)
        : pass(pass_),
          sample(sample_),
          block(block_),
          strip(pass_.image_, column, scratch.take<A>(Strip::memory_size(pass_.image_.height, block_.size()))),
          weights(scratch.take<A>(block.size() * Strip::stride(pass_.image_.height))),
          row_factor(scratch.take<A>(block.size() * lanes)),
          column_factor(scratch.take<A>(block.size() * lanes)) {}

    void run() const {
      const CrissCrossForwardArguments<T, R>& arguments = pass.arguments_;
      const std::int64_t key_offset = sample * arguments.sizes.key_channels * pass.image_.positions();
      const std::int64_t value_offset = sample * arguments.sizes.value_channels * pass.image_.positions();
      strip.dot_products(
          arguments.key + key_offset, arguments.query + key_offset, arguments.sizes.key_channels, block, weights);
      for (std::int64_t i = 0; i < block.size(); ++i) {
        normalize(i);
      }
      if constexpr (kKeys == Keys::kColumn) {
        strip.sum_over_keys(
            arguments.value + value_offset, arguments.sizes.value_channels, weights, block,
            arguments.output + value_offset, strip.template writer<R>());
      } else {
        strip.sum_over_keys(
            arguments.value + value_offset, arguments.sizes.value_channels, weights, block,
            arguments.output + value_offset, [&](R* output, std::int64_t query, V sum) {
              const std::int64_t at = (query - block.begin) * lanes;
              const V columns = sum * load<V>(column_factor + at);
              strip.write(output, fma(strip.read(output), load<V>(row_factor + at), columns));
            });
      }
    }

    // The products of a query become exponentials of energies. Its maximum and total are merged with the row's. With
    // Keys::kColumn they become weights.
    void normalize(std::int64_t query) const {
      const ForwardSoftmax<V> softmax(pass.arguments_.scale);
      A* const row = strip.element(weights, query, 0);
      const std::int64_t self = block.begin + query;
      V most = softmax.lowest();  // stays so where H = 1
      for (std::int64_t j = 0; j < strip.height(); ++j) {
        most = j == self ? most : softmax.maximum(most, load<V>(row + j * lanes));
      }
      const V offset = softmax.offset(most);
      BlockedSum<V> sum;
      for (std::int64_t j = 0; j < strip.height(); ++j) {
        const V weight = j == self ? V{} : softmax.weight(load<V>(row + j * lanes), offset);
        store(row + j * lanes, weight);
        sum.add(weight, j);
      }
      const V total = sum.total();
      const std::int64_t at = sample * pass.image_.positions() + strip.offset(self);
      if constexpr (kKeys == Keys::kColumn) {
        store_logsumexp(at, softmax, most, total);
        const V factor = select(total == V{}, V{}, broadcast<V>(A(1)) / total);  // 0: all energies are -inf
        for (std::int64_t j = 0; j < strip.height(); ++j) {
          store(row + j * lanes, load<V>(row + j * lanes) * factor);
        }
      } else {
        const V row_maximum = strip.read(pass.arguments_.logsumexp + at);
        const V common = max(most, row_maximum);
        const V row_sum = softmax.factor(row_maximum, common) * strip.read(pass.row_total_ + at);
        const V exponential = softmax.factor(most, common);
        const V sum = row_sum + exponential * total;
        store_logsumexp(at, softmax, common, sum);
        store(row_factor + query * lanes, row_sum / sum);
        store(column_factor + query * lanes, exponential / sum);
      }
    }

    // at: index in (B, H, W) of the first lane's query
    void store_logsumexp(std::int64_t at, const ForwardSoftmax<V>& softmax, V maximum, V total) const {
      const V energy = maximum * softmax.size;
      strip.for_each_lane([&](std::int64_t lane) {
        const auto logsumexp = split_logsumexp(maximum[lane], softmax.size[lane], energy[lane], total[lane]);
        pass.arguments_.logsumexp[at + lane] = logsumexp.value;
        pass.arguments_.logsumexp_low[at + lane] = logsumexp.low;
      });
    }
  };

  CrissCrossForwardArguments<T, R> arguments_;
  ImageSize image_;
  const A* row_total_;
};

}  // namespace segattn::cpu
