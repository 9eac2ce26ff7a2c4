// Criss-cross attention, forward, the column pass: adds the columns' part, the position itself left out, to what the row
// pass has written, by the total of both.
//
// A unit takes a strip of adjacent columns, one in each lane, and a block of queries. Whatever it reads of a map is copied
// as vectors, (channel, position), and its products are lane_product's.
#pragma once

#include "criss_cross_products.h"
#include "exp.h"
#include "lane_product.h"
#include "../checks/criss_cross.h"

#include <cmath>
#include <limits>

namespace segattn::cpu {

template <class T>
struct ColumnForwardArguments {
  const T* query;               // (B, E, H, W)
  const T* key;                 // (B, E, H, W)
  const T* value;               // (B, C, H, W)
  T* output;                    // (B, C, H, W): of the rows alone, becomes that of both
  AccumulatorOf<T>* logsumexp;  // (B, H, W): the rows' maximum, becomes the log-sum-exp of both
  AccumulatorOf<T>* row_total;  // (B, H, W): the rows' total of exponentials; the query's own block reads it
  CrissCrossSizes sizes;
  AccumulatorOf<T> scale;
};

template <class T>
class ColumnForward {
  using A = AccumulatorOf<T>;
  using V = Vec<A>;
  static constexpr std::int64_t kLane = kLanes<A>;
  static constexpr std::int64_t kScoreChannels = 16;
  static constexpr std::int64_t kApplyChannels = 2 * kLaneRows;
  // Weights of a block, beside values and results in a second-level cache of 1 MB; 49 queries at 97 rows.
  static constexpr std::int64_t kWeightBytes = 400 << 10;

 public:
  explicit ColumnForward(const ColumnForwardArguments<T>& arguments)
      : arguments_(arguments),
        height_(arguments.sizes.height),
        width_(arguments.sizes.width),
        strips_((width_ + kLane - 1) / kLane),
        stride_(odd(height_) * kLane) {
    const std::int64_t most =
        std::clamp<std::int64_t>(kWeightBytes / (stride_ * static_cast<std::int64_t>(sizeof(A))), kLaneColumns, 64);
    // No result depends on the cut: a query's sums are its own.
    const auto threads = static_cast<std::int64_t>(torch::stable::get_num_threads());
    const std::int64_t units = std::max<std::int64_t>(1, strips_ * arguments.sizes.batch);
    blocks_ = std::max((height_ + most - 1) / most, std::min((2 * threads + units - 1) / units, height_));
    queries_ = (height_ + blocks_ - 1) / blocks_;
  }

  void run() const {
    const std::int64_t query_stride = odd(queries_) * kLane;
    const std::size_t scratch_size =
        scratch_bytes<A>(queries_ * stride_) + 2 * scratch_bytes<A>(queries_ * kLane) +
        scratch_bytes<A>(std::max(kScoreChannels, kApplyChannels) * (stride_ + query_stride));
    parallel_units(arguments_.sizes.batch * strips_ * blocks_, scratch_size, [&](std::int64_t unit, Scratch& scratch) {
      const std::int64_t block = unit % blocks_;
      const std::int64_t strip = unit / blocks_ % strips_;
      const std::int64_t first = height_ * block / blocks_;
      Strip(*this, unit / blocks_ / strips_, strip * kLane, first, height_ * (block + 1) / blocks_ - first, scratch).run();
    });
  }

 private:
  // Vectors between the rows of a matrix: as an even number of cache lines they would fall into few sets.
  static constexpr std::int64_t odd(std::int64_t count) { return count | 1; }

  // Columns [column, column + lanes) of a sample, as far as there are any, and queries [first, first + count).
  struct Strip {
    const ColumnForward& pass;
    std::int64_t sample, column, lanes, first, count, query_stride;
    A* weights;  // [queries][keys]
    A* share;    // [queries]: of the rows' result in that of both
    A* factor;   // [queries]: of the columns' exponentials
    A* memory;   // for staged operands and results

    Strip(const ColumnForward& pass_, std::int64_t sample_, std::int64_t column_, std::int64_t first_,
          std::int64_t count_, Scratch& scratch)
        : pass(pass_),
          sample(sample_),
          column(column_),
          lanes(std::min(kLane, pass.width_ - column_)),
          first(first_),
          count(count_),
          query_stride(odd(count_) * kLane) {
      weights = scratch.take<A>(count * pass.stride_);
      share = scratch.take<A>(count * kLane);
      factor = scratch.take<A>(count * kLane);
      memory = scratch.take<A>(std::max(kScoreChannels, kApplyChannels) * (pass.stride_ + query_stride));
    }

    void run() const {
      score();
      for (std::int64_t i = 0; i < count; ++i) {
        normalise(i);
      }
      apply();
    }

    std::int64_t positions() const { return pass.height_ * pass.width_; }

    // target [channels][positions], `stride` apart, of map (channels, H, W): positions [begin, begin + length)
    void stage(A* target, std::int64_t stride, const T* map, std::int64_t channels, std::int64_t begin,
               std::int64_t length) const {
      for (std::int64_t c = 0; c < channels; ++c) {
        const T* source = map + c * positions() + begin * pass.width_ + column;
        for (std::int64_t p = 0; p < length; ++p, source += pass.width_) {
          store(target + c * stride + p * kLane, read_vector(source, lanes));
        }
      }
    }

    void score() const {
      const std::int64_t channels = pass.arguments_.sizes.key_channels;
      const std::int64_t offset = sample * channels * positions();
      A* const keys = memory;
      A* const queries = memory + kScoreChannels * pass.stride_;
      for (std::int64_t channel = 0; channel < channels; channel += kScoreChannels) {
        const std::int64_t depth = std::min(kScoreChannels, channels - channel);
        stage(keys, pass.stride_, pass.arguments_.key + offset + channel * positions(), depth, 0, pass.height_);
        stage(queries, query_stride, pass.arguments_.query + offset + channel * positions(), depth, first, count);
        lane_product<A>({keys, kLane, pass.stride_}, pass.height_, {queries, kLane, query_stride}, count, depth,
                        {weights, kLane, pass.stride_}, channel > 0);
      }
    }

    // The scores of a query become exponentials; its maximum and total meet those of the row.
    void normalise(std::int64_t query) const {
      const V scale = broadcast<V>(pass.arguments_.scale);
      const V lowest = broadcast<V>(-std::numeric_limits<A>::infinity());
      A* const row = weights + query * pass.stride_;
      const std::int64_t self = first + query;
      V most = lowest;
      for (std::int64_t j = 0; j < pass.height_; ++j) {
        const V score = load<V>(row + j * kLane) * scale;
        store(row + j * kLane, score);
        most = j == self ? most : max(most, score);
      }
      // A column of nothing but -inf (H = 1) has weights of 0, not of exp(-inf - -inf) = NaN.
      const V offset = select(most == lowest, V{}, most);
      V total{};
      for (std::int64_t j = 0; j < pass.height_; ++j) {
        const V weight = j == self ? V{} : exp(load<V>(row + j * kLane) - offset);
        store(row + j * kLane, weight);
        total += weight;
      }
      const std::int64_t at = sample * positions() + self * pass.width_ + column;
      A* const logsumexp = pass.arguments_.logsumexp + at;
      const V row_maximum = read_vector(logsumexp, lanes);
      const V common = max(most, row_maximum);
      const V row_sum = exp(row_maximum - common) * read_vector(pass.arguments_.row_total + at, lanes);
      const V exponential = exp(most - common);
      const V sum = row_sum + exponential * total;
      for (std::int64_t lane = 0; lane < lanes; ++lane) {
        logsumexp[lane] = common[lane] + std::log(sum[lane]);
      }
      store(share + query * kLane, row_sum / sum);
      store(factor + query * kLane, exponential / sum);
    }

    void apply() const {
      const std::int64_t channels = pass.arguments_.sizes.value_channels;
      const std::int64_t offset = sample * channels * positions();
      A* const values = memory;
      A* const results = memory + kApplyChannels * pass.stride_;
      for (std::int64_t channel = 0; channel < channels; channel += kApplyChannels) {
        const std::int64_t depth = std::min(kApplyChannels, channels - channel);
        const std::int64_t at = offset + channel * positions();
        stage(values, pass.stride_, pass.arguments_.value + at, depth, 0, pass.height_);
        lane_product<A>({values, pass.stride_, kLane}, depth, {weights, pass.stride_, kLane}, count, pass.height_,
                        {results, query_stride, kLane}, false);
        for (std::int64_t c = 0; c < depth; ++c) {
          T* target = pass.arguments_.output + at + c * positions() + first * pass.width_ + column;
          for (std::int64_t i = 0; i < count; ++i, target += pass.width_) {
            const V sum = load<V>(results + c * query_stride + i * kLane) * load<V>(factor + i * kLane);
            write_vector(target, fma(read_vector(target, lanes), load<V>(share + i * kLane), sum), lanes);
          }
        }
      }
    }
  };

  ColumnForwardArguments<T> arguments_;
  std::int64_t height_, width_, strips_, stride_;
  std::int64_t blocks_, queries_;
};

}  // namespace segattn::cpu
