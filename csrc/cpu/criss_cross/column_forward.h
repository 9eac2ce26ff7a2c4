// Criss-cross attention, forward, the column pass: adds the columns' part, the position itself left out, to what the row
// pass has written, by the total of both.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/common/exp.h"
#include "cpu/common/parallel.h"
#include "cpu/criss_cross/arguments.h"
#include "cpu/criss_cross/column_strip.h"

namespace segattn::cpu {

template <class T>
class ColumnForward {
  using A = AccumulatorOf<T>;
  static constexpr std::int64_t kLane = kLanes<A>;

 public:
  // The output holds that of the rows alone, logsumexp the rows' maximum, row_total (B, H, W) the rows' total of
  // exponentials.
  ColumnForward(const CrissCrossForwardArguments<T>& arguments, const A* row_total)
      : arguments_(arguments), map_{arguments.sizes.height, arguments.sizes.width}, row_total_(row_total) {}

  void run() const {
    using Strip = ColumnStrip<T, kLane>;
    const std::int64_t strips = (map_.width + kLane - 1) / kLane;
    const std::int64_t units = std::max<std::int64_t>(1, strips * arguments_.sizes.batch);
    // No result depends on the cut: a query's sums are its own. Threads that work on blocks of one strip share its values.
    const auto threads = static_cast<std::int64_t>(torch::stable::get_num_threads());
    const QueryBlocks<A> blocks(map_.height, (4 * threads + units - 1) / units);
    const std::int64_t queries = blocks.most_queries();
    const std::size_t scratch_size = scratch_bytes<A>(Strip::memory_size(map_.height, queries)) +
        scratch_bytes<A>(queries * Strip::stride(map_.height)) + 2 * scratch_bytes<A>(queries * kLane);
    parallel_units(
        strips * arguments_.sizes.batch * blocks.count(), scratch_size, [&](std::int64_t unit, Scratch& scratch) {
          const std::int64_t block = unit % blocks.count();
          const std::int64_t column = unit / blocks.count() % strips * kLane;
          with_lanes<A>(std::min(kLane, map_.width - column), [&]<int lanes>() {
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
    Stretch block;
    Strip strip;
    A* weights;  // [queries][keys]
    A* share;    // [queries]: of the rows' result in that of both
    A* factor;   // [queries]: of the columns' exponentials

    Unit(const ColumnForward& pass_, std::int64_t sample_, std::int64_t column, Stretch block_, Scratch& scratch)
        : pass(pass_),
          sample(sample_),
          block(block_),
          strip(pass_.map_, column, scratch.take<A>(Strip::memory_size(pass_.map_.height, block_.count))),
          weights(scratch.take<A>(block.count * Strip::stride(pass_.map_.height))),
          share(scratch.take<A>(block.count * lanes)),
          factor(scratch.take<A>(block.count * lanes)) {}

    void run() const {
      const CrissCrossForwardArguments<T>& arguments = pass.arguments_;
      const std::int64_t key_offset = sample * arguments.sizes.key_channels * pass.map_.positions();
      const std::int64_t value_offset = sample * arguments.sizes.value_channels * pass.map_.positions();
      strip.score(
          arguments.key + key_offset, arguments.query + key_offset, arguments.sizes.key_channels, block, weights);
      for (std::int64_t i = 0; i < block.count; ++i) {
        normalise(i);
      }
      strip.sum_over_keys(
          arguments.value + value_offset, arguments.sizes.value_channels, weights, block,
          arguments.output + value_offset, [&](T* output, std::int64_t query, V sum) {
            const std::int64_t at = (query - block.first) * lanes;
            const V columns = sum * load<V>(factor + at);
            strip.write(output, fma(strip.read(output), load<V>(share + at), columns));
          });
    }

    // The scores of a query become exponentials; its maximum and total meet those of the row.
    void normalise(std::int64_t query) const {
      const V scale = broadcast<V>(pass.arguments_.scale);
      const V lowest = broadcast<V>(-std::numeric_limits<A>::infinity());
      A* const row = strip.element(weights, query, 0);
      const std::int64_t self = block.first + query;
      V most = lowest;
      for (std::int64_t j = 0; j < strip.height(); ++j) {
        const V score = load<V>(row + j * lanes) * scale;
        store(row + j * lanes, score);
        most = j == self ? most : max(most, score);
      }
      // A column of nothing but -inf (H = 1) has weights of 0, not of exp(-inf - -inf) = NaN.
      const V offset = select(most == lowest, V{}, most);
      V total{};
      for (std::int64_t j = 0; j < strip.height(); ++j) {
        const V weight = j == self ? V{} : exp(load<V>(row + j * lanes) - offset);
        store(row + j * lanes, weight);
        total += weight;
      }
      const std::int64_t at = sample * pass.map_.positions() + strip.offset(self);
      A* const logsumexp = pass.arguments_.logsumexp + at;
      const V row_maximum = strip.read(logsumexp);
      const V common = max(most, row_maximum);
      const V row_sum = exp(row_maximum - common) * strip.read(pass.row_total_ + at);
      const V exponential = exp(most - common);
      const V sum = row_sum + exponential * total;
      strip.for_each_lane([&](std::int64_t lane) { logsumexp[lane] = common[lane] + std::log(sum[lane]); });
      store(share + query * lanes, row_sum / sum);
      store(factor + query * lanes, exponential / sum);
    }
  };

  CrissCrossForwardArguments<T> arguments_;
  MapSizes map_;
  const A* row_total_;
};

}  // namespace segattn::cpu
