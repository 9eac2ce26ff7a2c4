// CCNet's Affinity and Aggregation and their gradients: the products of the fused kernels, with the weights of all
// positions, (B, H + W - 1, H, W), in memory. A position's weights are those of its row, then those of its column
// without the position itself.
#pragma once

#include <type_traits>

#include "checks/criss_cross.h"
#include "cpu/criss_cross/column_strip.h"
#include "cpu/criss_cross/row_products.h"

namespace segattn::cpu {

template <class T>
class AffinityAggregation {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;

 public:
  // channels: E of an affinity, C of an aggregation.
  AffinityAggregation(const CrissCrossSizes& sizes, std::int64_t channels)
      : image_{sizes.height, sizes.width}, batch_(sizes.batch), channels_(channels), reach_(sizes.reach()) {}

  // keys, queries (B, channels, H, W) -> weights (B, H + W - 1, H, W), the dot products of each query with the keys of
  // its row and column. Affinity: (key, query); gradient of the attention: (value, grad_output).
  void dot_products(const T* keys, const T* queries, T* weights) const {
    row_dot_products(keys, queries, weights);
    for_each_block([&](const auto& strip, std::int64_t sample, Range block, A* block_weights, A*) {
      strip.dot_products(keys + offset(sample), queries + offset(sample), channels_, block, block_weights);
      for_each_weight(strip, sample, block, weights, block_weights, [&](T* weight, A* vector) {
        if (weight != nullptr) {
          strip.write(weight, load<typename std::remove_cvref_t<decltype(strip)>::V>(vector));
        }
      });
    });
  }

  // features (B, channels, H, W), weights (B, H + W - 1, H, W) -> result (B, channels, H, W), for each query the
  // weighted sum of the features of its row and column. Aggregation: value; gradient of query: key.
  void sum_over_keys(const T* features, const T* weights, T* result) const {
    row_sum_over_keys(features, weights, result);
    for_each_block([&](const auto& strip, std::int64_t sample, Range block, A* block_weights, A*) {
      read_weights(strip, sample, block, weights, block_weights);
      strip.sum_over_keys(
          features + offset(sample), channels_, block_weights, block, result + offset(sample),
          strip.template adder<T>());
    });
  }

  // The same for each key, over the queries of its row and column. Gradient of value: grad_output; of key: query.
  void sum_over_queries(const T* features, const T* weights, T* result) const {
    row_sum_over_queries(features, weights, result);
    for_each_block([&](const auto& strip, std::int64_t sample, Range block, A* block_weights, A* sums) {
      read_weights(strip, sample, block, weights, block_weights);
      strip.sum_over_queries(
          features + offset(sample), channels_, block_weights, block, result + offset(sample), sums,
          strip.template adder<T>());
    });
  }

 private:
  // Offsets of a sample's features and weights.
  std::int64_t offset(std::int64_t sample) const { return sample * channels_ * image_.positions(); }
  std::int64_t weights_offset(std::int64_t sample) const { return sample * reach_ * image_.positions(); }

  void row_dot_products(const T* keys, const T* queries, T* weights) const {
    const RowProducts<T> products(image_, channels_);
    const std::int64_t size = panels_size<P>(image_.width, products.block());
    for_each_row(
        image_, batch_, products, scratch_bytes<A>(size),
        [&](std::int64_t sample, const RowProducts<T>& row, Scratch& scratch) {
          A* const panels = scratch.take<A>(size);
          row.for_each_block([&](Range block) {
            row.dot_products(keys + offset(sample), queries + offset(sample), channels_, block, panels);
            store_panels(
                weights + weights_offset(sample) + row.offset() + block.begin, image_.positions(), panels, image_.width,
                block.size());
          });
        });
  }

  void row_sum_over_keys(const T* features, const T* weights, T* result) const {
    const RowProducts<T> products(image_, channels_);
    const std::int64_t size = packed_b_size<P>(products.block(), image_.width);
    for_each_row(
        image_, batch_, products, scratch_bytes<P>(size),
        [&](std::int64_t sample, const RowProducts<T>& row, Scratch& scratch) {
          P* const packed = scratch.take<P>(size);
          row.for_each_block([&](Range block) {
            pack_b_from_steps<P>(
                packed, weights + weights_offset(sample) + row.offset() + block.begin, image_.positions(), block.size(),
                image_.width);
            row.weighted_sum(
                features + offset(sample), channels_, {0, image_.width}, packed, block, result + offset(sample));
          });
        });
  }

  void row_sum_over_queries(const T* features, const T* weights, T* result) const {
    const RowProducts<T> products(image_, channels_);
    const std::int64_t size = packed_b_size<P>(image_.width, products.block());
    const std::int64_t sums_size = products.sums_size(channels_);
    for_each_row(
        image_, batch_, products, scratch_bytes<P>(size) + scratch_bytes<A>(sums_size),
        [&](std::int64_t sample, const RowProducts<T>& row, Scratch& scratch) {
          P* const packed = scratch.take<P>(size);
          A* const sums = scratch.take<A>(sums_size);
          row.for_each_block([&](Range block) {
            pack_b_from_columns<P>(
                packed, weights + weights_offset(sample) + row.offset() + block.begin, image_.positions(), image_.width,
                block.size());
            row.accumulate(features + offset(sample), channels_, block, packed, sums, result + offset(sample));
          });
        });
  }

  // The column pass: calls each(strip, sample, block of queries, room for the block's weights [queries][keys], sums for
  // sum_over_queries) for every block of every strip.
  template <class Work>
  struct ColumnPass {
    const AffinityAggregation& op;
    const Work& each;

    template <int lanes>
    std::size_t scratch() const {
      using Strip = ColumnStrip<T, lanes>;
      const std::int64_t height = op.image_.height;
      const std::int64_t queries = QueryBlocks<A>(height).most_queries();
      return scratch_bytes<A>(Strip::memory_size(height, queries)) + scratch_bytes<A>(queries * Strip::stride(height)) +
          scratch_bytes<A>(Strip::template sums_size<T>(height, op.channels_));
    }

    template <int lanes>
    void work(std::int64_t sample, std::int64_t column, Scratch& scratch) const {
      using Strip = ColumnStrip<T, lanes>;
      const std::int64_t height = op.image_.height;
      const QueryBlocks<A> blocks(height);
      const Strip strip(op.image_, column, scratch.take<A>(Strip::memory_size(height, blocks.most_queries())));
      A* const block_weights = scratch.take<A>(blocks.most_queries() * Strip::stride(height));
      A* const sums = scratch.take<A>(Strip::template sums_size<T>(height, op.channels_));
      for (std::int64_t block = 0; block < blocks.count(); ++block) {
        each(strip, sample, blocks[block], block_weights, sums);
      }
    }
  };

  template <class Work>
  void for_each_block(const Work& work) const {
    for_each_strip<A>(image_, batch_, ColumnPass<Work>{*this, work});
  }

  // Calls use(address in `weights` (B, H + W - 1, H, W), vector in block_weights) for every weight of a block. The
  // address of a query's weight of itself is null: it belongs to the row.
  template <class Strip, class Weight, class Use>
  void for_each_weight(
      const Strip& strip, std::int64_t sample, Range block, Weight* weights, A* block_weights, const Use& use) const {
    for (std::int64_t query = block.begin; query < block.end; ++query) {
      Weight* const first = weights + weights_offset(sample) + image_.width * image_.positions() + strip.offset(query);
      for (std::int64_t key = 0; key < image_.height; ++key) {
        Weight* const weight = key == query ? nullptr : first + (key - (key > query ? 1 : 0)) * image_.positions();
        use(weight, strip.element(block_weights, query - block.begin, key));
      }
    }
  }

  template <class Strip>
  void read_weights(const Strip& strip, std::int64_t sample, Range block, const T* weights, A* block_weights) const {
    for_each_weight(strip, sample, block, weights, block_weights, [&](const T* weight, A* vector) {
      store(vector, weight == nullptr ? typename Strip::V{} : strip.read(weight));
    });
  }

  ImageSize image_;
  std::int64_t batch_, channels_, reach_;
};

}  // namespace segattn::cpu
