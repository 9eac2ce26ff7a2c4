// CCNet's Affinity and Aggregation, with the (H + W - 1, H, W) map in memory, and their gradients: the products of the
// fused kernels, each by itself.
#pragma once

#include "criss_cross_products.h"
#include "../checks/criss_cross.h"

namespace segattn::cpu {

template <class T>
class CrissCrossMaps {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  using V = Vec<A>;

 public:
  // channels: E of an affinity, C of an aggregation.
  CrissCrossMaps(const CrissCrossSizes& sizes, std::int64_t channels)
      : map_{sizes.height, sizes.width},
        batch_(sizes.batch),
        channels_(channels),
        reach_(sizes.reach()) {}

  // keys, queries: (B, channels, H, W) -> weights (B, H + W - 1, H, W): dot products. The affinity is score(key, query),
  // the gradient of attention score(value, grad_output).
  void score(const T* keys, const T* queries, T* weights) const {
    score_along<RowLine<T>>(keys, queries, weights);
    score_along<ColumnLines<T>>(keys, queries, weights);
  }

  // map (B, channels, H, W), weights (B, H + W - 1, H, W) -> result (B, channels, H, W): result of a query is the sum
  // of the map over its row and column, weighted. The aggregation is apply(value), the gradient of query apply(key).
  void apply(const T* map, const T* weights, T* result) const {
    apply_along<RowLine<T>>(map, weights, result);
    apply_along<ColumnLines<T>>(map, weights, result);
  }

  // The same with the weights transposed: the sum runs over the queries that see a key. The gradient of value is
  // apply_transposed(grad_output), that of key apply_transposed(query).
  void apply_transposed(const T* map, const T* weights, T* result) const {
    apply_transposed_along<RowLine<T>>(map, weights, result);
    apply_transposed_along<ColumnLines<T>>(map, weights, result);
  }

 private:
  template <class Lines>
  void score_along(const T* keys, const T* queries, T* weights) const {
    run<Lines>([&](std::int64_t length, std::int64_t block) { return panels_size<P>(length, block); }, 0,
               [&](std::int64_t sample, const Lines& lines, const auto& products, A* panels, std::int64_t stride, A*) {
                 const std::int64_t offset = sample * channels_ * map_.positions();
                 T* const sample_weights = weights + sample * reach_ * map_.positions();
                 for (std::int64_t first = 0; first < lines.length(); first += products.block()) {
                   const std::int64_t count = std::min(products.block(), lines.length() - first);
                   products.score(lines, keys + offset, queries + offset, channels_, first, count, panels, stride);
                   lines.store_weights(sample_weights, panels, stride, first, count);
                 }
               });
  }

  template <class Lines>
  void apply_along(const T* map, const T* weights, T* result) const {
    run<Lines>([&](std::int64_t length, std::int64_t block) { return packed_b_size<P>(block, length); }, 0,
               [&](std::int64_t sample, const Lines& lines, const auto& products, A* memory, std::int64_t stride, A*) {
                 P* const packed = reinterpret_cast<P*>(memory);  // elements of P and A have the same size
                 const std::int64_t offset = sample * channels_ * map_.positions();
                 const T* const sample_weights = weights + sample * reach_ * map_.positions();
                 for (std::int64_t first = 0; first < lines.length(); first += products.block()) {
                   const std::int64_t count = std::min(products.block(), lines.length() - first);
                   lines.pack_weights(packed, stride, sample_weights, first, count);
                   products.apply(lines, map + offset, channels_, 0, lines.length(), packed, stride, first, count,
                                  [&](std::int64_t channel, std::int64_t position, V vector, std::int64_t n) {
                                    put_vector<Lines>(result + offset + channel * map_.positions() + position, vector, n);
                                  });
                 }
               });
  }

  template <class Lines>
  void apply_transposed_along(const T* map, const T* weights, T* result) const {
    run<Lines>([&](std::int64_t length, std::int64_t block) { return packed_b_size<P>(length, block); }, channels_,
               [&](std::int64_t sample, const Lines& lines, const auto& products, A* memory, std::int64_t stride,
                   A* sums) {
                 P* const packed = reinterpret_cast<P*>(memory);
                 const std::int64_t offset = sample * channels_ * map_.positions();
                 const T* const sample_weights = weights + sample * reach_ * map_.positions();
                 for (std::int64_t first = 0; first < lines.length(); first += products.block()) {
                   const std::int64_t count = std::min(products.block(), lines.length() - first);
                   lines.pack_weights_transposed(packed, stride, sample_weights, first, count);
                   products.accumulate(lines, map + offset, channels_, first, count, packed, stride, sums,
                                       [&](std::int64_t channel, std::int64_t position, V vector, std::int64_t n) {
                                         put_vector<Lines>(result + offset + channel * map_.positions() + position, vector, n);
                                       });
                 }
               });
  }

  // weights_size(length, block): elements of a line's weights; sum_channels: of the sums over blocks of queries.
  template <class Lines, class Size, class Work>
  void run(const Size& weights_size, std::int64_t sum_channels, const Work& work) const {
    const std::int64_t lines = lines_in_group<Lines>(map_, batch_);
    const std::int64_t length = Lines::length_of(map_);
    const LineProducts<T, Lines> products(length, lines, channels_);
    const std::int64_t stride = line_stride<A>(weights_size(length, products.block()));
    const std::int64_t sums_size = products.block() < length ? products.sums_size(sum_channels) : 0;
    for_each_group<Lines>(map_, batch_, lines,
                          products.scratch() + scratch_bytes<A>(lines * stride) + scratch_bytes<A>(sums_size),
                          [&](std::int64_t sample, const Lines& group, Scratch& scratch) {
                            LineProducts<T, Lines> unit_products = products;
                            unit_products.take(scratch);
                            A* const weights = scratch.take<A>(lines * stride);
                            work(sample, group, unit_products, weights, stride, scratch.take<A>(sums_size));
                          });
  }

  MapSizes map_;
  std::int64_t batch_, channels_, reach_;
};

}  // namespace segattn::cpu
