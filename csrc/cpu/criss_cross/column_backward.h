// Criss-cross attention, backward, the column pass: adds the columns' part to the gradients that the row pass wrote, or
// writes it alone.
#pragma once

#include <utility>

#include "cpu/common/attention_softmax.h"
#include "cpu/common/parallel.h"
#include "cpu/criss_cross/arguments.h"
#include "cpu/criss_cross/column_strip.h"

namespace segattn::cpu {

// Statistics of the row pass, symbols as in backward.h; those that it does not compute are not read.
template <class R>
struct RowBackwardResults {
  const AccumulatorOf<R>* delta;     // (B, H, W), D - grad_logsumexp
  const AccumulatorOf<R>* grad_sum;  // (B, H, W), the rows' part of s
  const R* mean_key;                 // (B, E, H, W), the rows' part of M
};

template <class T, class R, Keys kKeys>
class ColumnBackward {
  using A = AccumulatorOf<T>;

 public:
  // On entry the gradients are those of the rows alone. With Keys::kColumn they are not read.
  ColumnBackward(const CrissCrossBackwardArguments<T, R>& arguments, const RowBackwardResults<R>& rows)
      : arguments_(arguments), image_{arguments.sizes.height, arguments.sizes.width}, rows_(rows) {}

  void run() const { for_each_strip<A>(image_, arguments_.sizes.batch, *this); }

  template <int lanes>
  std::size_t scratch() const {
    using Strip = ColumnStrip<T, lanes>;
    const std::int64_t queries = QueryBlocks<A>(image_.height).most_queries();
    return scratch_bytes<A>(Strip::memory_size(image_.height, queries)) +
        2 * scratch_bytes<A>(queries * Strip::stride(image_.height)) + scratch_bytes<A>(queries * lanes) +
        scratch_bytes<A>(key_sums_size<Strip>()) + scratch_bytes<A>(value_sums_size<Strip>());
  }

  template <int lanes>
  void work(std::int64_t sample, std::int64_t column, Scratch& scratch) const {
    using Strip = ColumnStrip<T, lanes>;
    const std::int64_t key_channels = arguments_.sizes.key_channels;
    const std::int64_t value_channels = arguments_.sizes.value_channels;
    const std::int64_t key_offset = sample * key_channels * image_.positions();
    const std::int64_t value_offset = sample * value_channels * image_.positions();
    const T* const query = arguments_.query + key_offset;
    const T* const key = arguments_.key + key_offset;
    const T* const grad_output = arguments_.grad_output + value_offset;
    const QueryBlocks<A> blocks(image_.height);
    const std::int64_t queries = blocks.most_queries();
    const Strip strip(image_, column, scratch.take<A>(Strip::memory_size(image_.height, queries)));
    A* const weights = scratch.take<A>(queries * Strip::stride(image_.height));  // P, [queries][keys]
    A* const grads = scratch.take<A>(queries * Strip::stride(image_.height));    // dP, then dS - s P or dS
    A* const grad_sums = scratch.take<A>(queries * lanes);                       // s
    A* const key_sums = scratch.take<A>(key_sums_size<Strip>());
    A* const value_sums = scratch.take<A>(value_sums_size<Strip>());
    for (std::int64_t index = 0; index < blocks.count(); ++index) {
      const Range block = blocks[index];
      // What stores the sums of queries, of which a block has its own, and those of keys.
      const auto [add, add_block] = [&] {
        if constexpr (kKeys == Keys::kColumn) {
          return std::pair(strip.template writer<R>(), strip.template writer<R>(index > 0));
        } else {
          return std::pair(strip.template adder<R>(), strip.template adder<R>());
        }
      }();
      if (arguments_.differentiates_energies()) {
        strip.dot_products(arguments_.value + value_offset, grad_output, value_channels, block, grads);
      }
      strip.dot_products(key, query, key_channels, block, weights);
      for (std::int64_t i = 0; i < block.size(); ++i) {
        const auto sum =
            differentiate(strip, sample, block.begin + i, strip.element(weights, i, 0), strip.element(grads, i, 0));
        store(grad_sums + i * lanes, sum);
      }
      if (arguments_.grad_value != nullptr) {
        strip.sum_over_queries(
            grad_output, value_channels, weights, block, arguments_.grad_value + value_offset, value_sums, add_block);
      }
      if (arguments_.grad_query != nullptr) {
        const auto add_corrected = [&](R* grad_query, std::int64_t position, typename Strip::V sum) {
          const auto mean_key = strip.read(rows_.mean_key + (grad_query - arguments_.grad_query));
          const auto grad_sum = load<typename Strip::V>(grad_sums + (position - block.begin) * lanes);
          strip.write(grad_query, fma(-grad_sum, mean_key, strip.read(grad_query) + sum));
        };
        R* const grad_query = arguments_.grad_query + key_offset;
        if (corrects_sums()) {
          strip.sum_over_keys(key, key_channels, grads, block, grad_query, add_corrected);
        } else {
          strip.sum_over_keys(key, key_channels, grads, block, grad_query, add);
        }
      }
      if (arguments_.grad_key != nullptr) {
        strip.sum_over_queries(
            query, key_channels, grads, block, arguments_.grad_key + key_offset, key_sums, add_block);
      }
    }
  }

 private:
  bool corrects_sums() const { return kKeys == Keys::kRowAndColumn && arguments_.corrects_sums(); }

  template <class Strip>
  std::int64_t key_sums_size() const {
    return arguments_.grad_key == nullptr ? 0
                                          : Strip::template sums_size<R>(image_.height, arguments_.sizes.key_channels);
  }
  template <class Strip>
  std::int64_t value_sums_size() const {
    return arguments_.grad_value == nullptr
        ? 0
        : Strip::template sums_size<R>(image_.height, arguments_.sizes.value_channels);
  }

  // One query: weights, from q.k to P. Where a wanted gradient needs them, grads, from dP to dS, and where sums are
  // corrected to dS - s P, which times the keys is the column's part of grad_query - s M. Returns s.
  template <class Strip>
  Strip::V differentiate(const Strip& strip, std::int64_t sample, std::int64_t query, A* weights, A* grads) const {
    using V = Strip::V;
    const std::int64_t at = sample * image_.positions() + strip.offset(query);
    const V scale = broadcast<V>(arguments_.scale);
    const V logsumexp = strip.read(arguments_.logsumexp + at);
    const V logsumexp_low = arguments_.logsumexp_low == nullptr ? V{} : strip.read(arguments_.logsumexp_low + at);
    const auto weight_of = [&](std::int64_t key) {
      A* const weight_at = weights + key * kWidthOf<V>;
      const V weight = key == query ? V{} : backward_weight(load<V>(weight_at), scale, logsumexp, logsumexp_low);
      store(weight_at, weight);
      return weight;
    };
    if (!arguments_.differentiates_energies()) {
      for (std::int64_t j = 0; j < image_.height; ++j) {
        weight_of(j);
      }
      return V{};
    }
    const V delta = strip.read(rows_.delta + at);
    V sum = corrects_sums() ? strip.read(rows_.grad_sum + at) : V{};
    for (std::int64_t j = 0; j < image_.height; ++j) {
      A* const grad_at = grads + j * kWidthOf<V>;
      const V weight = weight_of(j);
      const V grad = j == query ? V{} : weight * (load<V>(grad_at) - delta) * scale;
      store(grad_at, grad);
      sum += grad;
    }
    if (!corrects_sums()) {
      return V{};
    }
    for (std::int64_t j = 0; j < image_.height; ++j) {
      A* const grad_at = grads + j * kWidthOf<V>;
      store(grad_at, fma(-sum, load<V>(weights + j * kWidthOf<V>), load<V>(grad_at)));
    }
    return sum;
  }

  CrissCrossBackwardArguments<T, R> arguments_;
  ImageSize image_;
  RowBackwardResults<R> rows_;
};

}  // namespace segattn::cpu
