// Criss-cross attention, backward, the column pass: adds the columns' part to the gradients that the row pass has written.
#pragma once

#include "criss_cross_arguments.h"
#include "criss_cross_strip.h"
#include "exp.h"
#include "parallel.h"

namespace segattn::cpu {

template <class T>
class ColumnBackward {
  using A = AccumulatorOf<T>;

 public:
  // The gradients hold those of the rows alone; delta (B, H, W) is D.
  ColumnBackward(const CrissCrossBackwardArguments<T>& arguments, const A* delta)
      : arguments_(arguments), map_{arguments.sizes.height, arguments.sizes.width}, delta_(delta) {}

  void run() const { for_each_strip<A>(map_, arguments_.sizes.batch, *this); }

  template <int lanes>
  std::size_t scratch() const {
    using Strip = ColumnStrip<T, lanes>;
    const std::int64_t queries = QueryBlocks<A>(map_.height).most_queries();
    return scratch_bytes<A>(Strip::memory_size(map_.height, queries)) +
           2 * scratch_bytes<A>(queries * Strip::stride(map_.height)) +
           scratch_bytes<A>(Strip::sums_size(map_.height, arguments_.sizes.key_channels)) +
           scratch_bytes<A>(Strip::sums_size(map_.height, arguments_.sizes.value_channels));
  }

  template <int lanes>
  void work(std::int64_t sample, std::int64_t column, Scratch& scratch) const {
    using Strip = ColumnStrip<T, lanes>;
    const std::int64_t key_channels = arguments_.sizes.key_channels;
    const std::int64_t value_channels = arguments_.sizes.value_channels;
    const std::int64_t key_offset = sample * key_channels * map_.positions();
    const std::int64_t value_offset = sample * value_channels * map_.positions();
    const T* const query = arguments_.query + key_offset;
    const T* const key = arguments_.key + key_offset;
    const T* const grad_output = arguments_.grad_output + value_offset;
    const QueryBlocks<A> blocks(map_.height);
    const std::int64_t queries = blocks.most_queries();
    const Strip strip(map_, column, scratch.take<A>(Strip::memory_size(map_.height, queries)));
    A* const weights = scratch.take<A>(queries * Strip::stride(map_.height));  // P, [queries][keys]
    A* const grads = scratch.take<A>(queries * Strip::stride(map_.height));    // dP, then dS
    A* const key_sums = scratch.take<A>(Strip::sums_size(map_.height, key_channels));
    A* const value_sums = scratch.take<A>(Strip::sums_size(map_.height, value_channels));
    const auto add = strip.adder();
    for (std::int64_t index = 0; index < blocks.count(); ++index) {
      const Stretch block = blocks[index];
      strip.score(arguments_.value + value_offset, grad_output, value_channels, block, grads);
      strip.score(key, query, key_channels, block, weights);
      for (std::int64_t i = 0; i < block.count; ++i) {
        differentiate(strip, sample, block.first + i, strip.element(weights, i, 0), strip.element(grads, i, 0));
      }
      strip.sum_over_queries(grad_output, value_channels, weights, block, arguments_.grad_value + value_offset,
                             value_sums, add);
      strip.sum_over_keys(key, key_channels, grads, block, arguments_.grad_query + key_offset, add);
      strip.sum_over_queries(query, key_channels, grads, block, arguments_.grad_key + key_offset, key_sums, add);
    }
  }

 private:
  // Of one query: energies become P, the gradients dP become dS.
  template <class Strip>
  void differentiate(const Strip& strip, std::int64_t sample, std::int64_t query, A* weights, A* grads) const {
    using V = Strip::V;
    const std::int64_t at = sample * map_.positions() + strip.offset(query);
    const V scale = broadcast<V>(arguments_.scale);
    const V logsumexp = strip.read(arguments_.logsumexp + at);
    const V delta = strip.read(delta_ + at);
    for (std::int64_t j = 0; j < map_.height; ++j, weights += kWidthOf<V>, grads += kWidthOf<V>) {
      const V weight = j == query ? V{} : exp(fma(load<V>(weights), scale, -logsumexp));
      store(weights, weight);
      store(grads, j == query ? V{} : weight * (load<V>(grads) - delta) * scale);
    }
  }

  CrissCrossBackwardArguments<T> arguments_;
  MapSizes map_;
  const A* delta_;
};

}  // namespace segattn::cpu
