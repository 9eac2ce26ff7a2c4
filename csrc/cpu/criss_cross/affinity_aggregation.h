// CCNet's Affinity and Aggregation, with the (H + W - 1, H, W) map in memory, and their gradients: the products of the
// fused kernels, each by itself.
#pragma once

#include "checks/criss_cross.h"
#include "cpu/criss_cross/column_strip.h"
#include "cpu/criss_cross/row_products.h"

namespace segattn::cpu {

template <class T>
class CrissCrossMaps {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;

 public:
  // channels: E of an affinity, C of an aggregation.
  CrissCrossMaps(const CrissCrossSizes& sizes, std::int64_t channels)
      : map_{sizes.height, sizes.width}, batch_(sizes.batch), channels_(channels), reach_(sizes.reach()) {}

  // keys, queries: (B, channels, H, W) -> weights (B, H + W - 1, H, W): dot products. The affinity is score(key, query),
  // the gradient of attention score(value, grad_output).
  void score(const T* keys, const T* queries, T* weights) const {
    score_rows(keys, queries, weights);
    for_each_block([&](const auto& strip, std::int64_t sample, Stretch block, A* made, A*) {
      strip.score(keys + map_offset(sample), queries + map_offset(sample), channels_, block, made);
      for_each_weight(strip, sample, block, weights, made, [&](T* weight, A* vector) {
        if (weight != nullptr) {
          strip.write(weight, load<typename std::remove_cvref_t<decltype(strip)>::V>(vector));
        }
      });
    });
  }

  // map (B, channels, H, W), weights (B, H + W - 1, H, W) -> result (B, channels, H, W): result of a query is the sum
  // of the map over its row and column, weighted. The aggregation is apply(value), the gradient of query apply(key).
  void apply(const T* map, const T* weights, T* result) const {
    apply_rows(map, weights, result);
    for_each_block([&](const auto& strip, std::int64_t sample, Stretch block, A* made, A*) {
      read_weights(strip, sample, block, weights, made);
      strip.sum_over_keys(map + map_offset(sample), channels_, made, block, result + map_offset(sample), strip.adder());
    });
  }

  // The same with the weights transposed: the sum runs over the queries that see a key. The gradient of value is
  // apply_transposed(grad_output), that of key apply_transposed(query).
  void apply_transposed(const T* map, const T* weights, T* result) const {
    apply_transposed_rows(map, weights, result);
    for_each_block([&](const auto& strip, std::int64_t sample, Stretch block, A* made, A* sums) {
      read_weights(strip, sample, block, weights, made);
      strip.sum_over_queries(
          map + map_offset(sample), channels_, made, block, result + map_offset(sample), sums, strip.adder());
    });
  }

 private:
  std::int64_t map_offset(std::int64_t sample) const { return sample * channels_ * map_.positions(); }
  std::int64_t weights_offset(std::int64_t sample) const { return sample * reach_ * map_.positions(); }

  void score_rows(const T* keys, const T* queries, T* weights) const {
    const RowProducts<T> products(map_, channels_);
    const std::int64_t size = panels_size<P>(map_.width, products.block());
    for_each_row(
        map_, batch_, products, scratch_bytes<A>(size),
        [&](std::int64_t sample, const RowProducts<T>& row, Scratch& scratch) {
          A* const panels = scratch.take<A>(size);
          for (std::int64_t first = 0; first < map_.width; first += row.block()) {
            const std::int64_t count = std::min(row.block(), map_.width - first);
            row.score(keys + map_offset(sample), queries + map_offset(sample), channels_, first, count, panels);
            store_panels(
                weights + weights_offset(sample) + row.offset() + first, map_.positions(), panels, map_.width, count);
          }
        });
  }

  void apply_rows(const T* map, const T* weights, T* result) const {
    const RowProducts<T> products(map_, channels_);
    const std::int64_t size = packed_b_size<P>(products.block(), map_.width);
    for_each_row(
        map_, batch_, products, scratch_bytes<P>(size),
        [&](std::int64_t sample, const RowProducts<T>& row, Scratch& scratch) {
          P* const packed = scratch.take<P>(size);
          for (std::int64_t first = 0; first < map_.width; first += row.block()) {
            const std::int64_t count = std::min(row.block(), map_.width - first);
            pack_b_from_steps<P>(
                packed, weights + weights_offset(sample) + row.offset() + first, map_.positions(), count, map_.width);
            row.apply(
                map + map_offset(sample), channels_, 0, map_.width, packed, first, count, result + map_offset(sample));
          }
        });
  }

  void apply_transposed_rows(const T* map, const T* weights, T* result) const {
    const RowProducts<T> products(map_, channels_);
    const std::int64_t size = packed_b_size<P>(map_.width, products.block());
    const std::int64_t sums_size = products.sums_size(channels_);
    for_each_row(
        map_, batch_, products, scratch_bytes<P>(size) + scratch_bytes<A>(sums_size),
        [&](std::int64_t sample, const RowProducts<T>& row, Scratch& scratch) {
          P* const packed = scratch.take<P>(size);
          A* const sums = scratch.take<A>(sums_size);
          for (std::int64_t first = 0; first < map_.width; first += row.block()) {
            const std::int64_t count = std::min(row.block(), map_.width - first);
            pack_b_from_columns<P>(
                packed, weights + weights_offset(sample) + row.offset() + first, map_.positions(), map_.width, count);
            row.accumulate(
                map + map_offset(sample), channels_, first, count, packed, sums, result + map_offset(sample));
          }
        });
  }

  // The column pass: work(strip, sample, block of queries, weights [queries][keys] to use, sums for sum_over_queries)
  // for every block of every strip.
  template <class Work>
  struct ColumnPass {
    const CrissCrossMaps& maps;
    const Work& each;

    template <int lanes>
    std::size_t scratch() const {
      using Strip = ColumnStrip<T, lanes>;
      const std::int64_t height = maps.map_.height;
      const std::int64_t queries = QueryBlocks<A>(height).most_queries();
      return scratch_bytes<A>(Strip::memory_size(height, queries)) + scratch_bytes<A>(queries * Strip::stride(height)) +
          scratch_bytes<A>(Strip::sums_size(height, maps.channels_));
    }

    template <int lanes>
    void work(std::int64_t sample, std::int64_t column, Scratch& scratch) const {
      using Strip = ColumnStrip<T, lanes>;
      const std::int64_t height = maps.map_.height;
      const QueryBlocks<A> blocks(height);
      const Strip strip(maps.map_, column, scratch.take<A>(Strip::memory_size(height, blocks.most_queries())));
      A* const weights = scratch.take<A>(blocks.most_queries() * Strip::stride(height));
      A* const sums = scratch.take<A>(Strip::sums_size(height, maps.channels_));
      for (std::int64_t block = 0; block < blocks.count(); ++block) {
        each(strip, sample, blocks[block], weights, sums);
      }
    }
  };

  template <class Work>
  void for_each_block(const Work& work) const {
    for_each_strip<A>(map_, batch_, ColumnPass<Work>{*this, work});
  }

  // use(weight in the map (B, H + W - 1, H, W) or null for the query itself, which the row has, its place in `made`)
  template <class Strip, class Map, class Use>
  void for_each_weight(
      const Strip& strip, std::int64_t sample, Stretch block, Map* weights, A* made, const Use& use) const {
    for (std::int64_t i = 0; i < block.count; ++i) {
      const std::int64_t query = block.first + i;
      Map* const first = weights + weights_offset(sample) + map_.width * map_.positions() + strip.offset(query);
      for (std::int64_t key = 0; key < map_.height; ++key) {
        Map* const weight = key == query ? nullptr : first + (key - (key > query ? 1 : 0)) * map_.positions();
        use(weight, strip.element(made, i, key));
      }
    }
  }

  template <class Strip>
  void read_weights(const Strip& strip, std::int64_t sample, Stretch block, const T* weights, A* made) const {
    for_each_weight(strip, sample, block, weights, made, [&](const T* weight, A* vector) {
      store(vector, weight == nullptr ? typename Strip::V{} : strip.read(weight));
    });
  }

  MapSizes map_;
  std::int64_t batch_, channels_, reach_;
};

}  // namespace segattn::cpu
