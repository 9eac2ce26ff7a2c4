// Criss-cross attention, backward. With the forward's logsumexp (softmax.h) and D = sum_c grad_output * output (delta):
//
//   P = exp(scale * key . query - logsumexp), dP = value . grad_output, dS = scale * P * (dP - D)
//   grad_value = grad_output P^T, grad_query = key dS, grad_key = query dS^T
//
// The row pass, here, writes the gradients of the rows; the column pass (column_backward.h) adds those of the columns.
// A gradient that is not wanted takes no product and no memory. The gradient of the logsumexp enters as D -
// grad_logsumexp in place of D. For rows or columns alone, one of the passes writes the gradients.
//
// D is computed from an output that is rounded to its dtype. An error of D is the same for all keys of a query, so it
// does not average out: it adds a multiple of the query's mean key, M = key P, to grad_query. In exact arithmetic the
// sum of a query's dS over its row and column is scale * grad_logsumexp. With s, what it is beyond that, grad_query - s
// M is the same gradient, and in it the error cancels. The row pass stores its parts of s and M; the column pass
// corrects with both parts. Where logsumexp and output are over further keys, the sum is another number, and nothing is
// corrected.
#pragma once

#include "cpu/common/attention_softmax.h"
#include "cpu/criss_cross/column_backward.h"
#include "cpu/criss_cross/row_products.h"

namespace segattn::cpu {

template <class T, class R, Keys kKeys>
class CrissCrossBackward {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  using V = Vec<A>;
  static constexpr std::int64_t kLane = kLanes<A>;

 public:
  explicit CrissCrossBackward(const CrissCrossBackwardArguments<T, R>& arguments)
      : arguments_(arguments),
        image_{arguments.sizes.height, arguments.sizes.width},
        delta_(
            kKeys == Keys::kRowAndColumn && arguments.differentiates_energies()
                ? arguments.sizes.batch * image_.positions()
                : 0),
        grad_sum_(corrects_sums() ? arguments.sizes.batch * image_.positions() : 0),
        mean_key_(keeps_mean_key() ? arguments.sizes.batch * arguments.sizes.key_channels * image_.positions() : 0) {}

  void run() const {
    if constexpr (kKeys != Keys::kColumn) {
      run_rows();
    }
    if constexpr (kKeys != Keys::kRow) {
      const A* const delta = kKeys == Keys::kColumn ? arguments_.delta : delta_.data();
      ColumnBackward<T, R, kKeys>(arguments_, {delta, grad_sum_.data(), mean_key_.data()}).run();
    }
  }

 private:
  bool corrects_sums() const { return kKeys == Keys::kRowAndColumn && arguments_.corrects_sums(); }
  bool keeps_mean_key() const { return corrects_sums() && arguments_.grad_query != nullptr; }

  // A row's scratch memory. `weights` and `grads` are two slots of `slot` elements each: the panels in the second,
  // their transposed or packed form in the first.
  struct Workspace {
    std::int64_t slot, columns;
    std::int64_t key_sums_size, value_sums_size;
    A* weights = nullptr;   // P and P^T
    A* grads = nullptr;     // dP, then dS, and dS^T
    A* delta = nullptr;     // of the row
    A* grad_sum = nullptr;  // of a block of queries
    A* key_sums = nullptr;
    A* value_sums = nullptr;

    Workspace(ImageSize image, const CrissCrossBackwardArguments<T, R>& arguments, const RowProducts<T>& products)
        : columns(padded_columns<P>(image.width)),
          key_sums_size(arguments.grad_key == nullptr ? 0 : products.sums_size(arguments.sizes.key_channels)),
          value_sums_size(arguments.grad_value == nullptr ? 0 : products.sums_size(arguments.sizes.value_channels)) {
      const std::int64_t transposed = packed_b_size<P>(image.width, products.block());
      slot = std::max(
          panels_size<P>(image.width, products.block()),
          kIsPair<P> ? packed_b_size<P>(products.block(), image.width) + transposed : transposed);
    }

    std::size_t scratch() const {
      return 2 * scratch_bytes<A>(2 * slot) + 2 * scratch_bytes<A>(columns) + scratch_bytes<A>(key_sums_size) +
          scratch_bytes<A>(value_sums_size);
    }

    void take(Scratch& from) {
      weights = from.take<A>(2 * slot);
      grads = from.take<A>(2 * slot);
      delta = from.take<A>(columns);
      grad_sum = from.take<A>(columns);
      key_sums = from.take<A>(key_sums_size);
      value_sums = from.take<A>(value_sums_size);
    }
  };

  void run_rows() const {
    const CrissCrossSizes& sizes = arguments_.sizes;
    const RowProducts<T> products(image_, std::max(sizes.key_channels, sizes.value_channels));
    const Workspace shared(image_, arguments_, products);
    for_each_row(
        image_, sizes.batch, products, shared.scratch(),
        [&](std::int64_t sample, const RowProducts<T>& row, Scratch& scratch) {
          Workspace workspace = shared;
          workspace.take(scratch);
          if constexpr (kKeys == Keys::kRow) {
            std::copy_n(arguments_.delta + sample * image_.positions() + row.offset(), image_.width, workspace.delta);
          } else if (arguments_.differentiates_energies()) {
            compute_delta(sample, row, workspace.delta);
          }
          differentiate(sample, row, workspace);
        });
  }

  // D - grad_logsumexp of the row's positions, stored for the column pass too.
  void compute_delta(std::int64_t sample, const RowProducts<T>& row, A* delta) const {
    constexpr std::int64_t kAhead = 4;
    const std::int64_t positions = image_.positions();
    const std::int64_t channels = arguments_.sizes.value_channels;
    std::fill_n(delta, padded_columns<P>(image_.width), A(0));
    for (std::int64_t c = 0; c < channels; ++c) {
      const std::int64_t offset = (sample * channels + c) * positions + row.offset();
      if (c + kAhead < channels) {
        Prefetch(arguments_.grad_output + offset + kAhead * positions, 1, 0, 1, 0, image_.width)(1);
        Prefetch(arguments_.output + offset + kAhead * positions, 1, 0, 1, 0, image_.width)(1);
      }
      for (std::int64_t x = 0; x < image_.width; x += kLane) {
        const std::int64_t n = std::min(kLane, image_.width - x);
        store(
            delta + x,
            fma(read_vector(arguments_.grad_output + offset + x, n), read_vector(arguments_.output + offset + x, n),
                load<V>(delta + x)));
      }
    }
    const std::int64_t first = sample * positions + row.offset();
    if (arguments_.grad_logsumexp != nullptr) {
      for (std::int64_t x = 0; x < image_.width; ++x) {
        delta[x] -= arguments_.grad_logsumexp[first + x];
      }
    }
    std::copy_n(delta, image_.width, delta_.data() + first);
  }

  void differentiate(std::int64_t sample, const RowProducts<T>& row, const Workspace& workspace) const {
    const CrissCrossSizes& sizes = arguments_.sizes;
    const std::int64_t width = image_.width;
    const std::int64_t key_offset = sample * sizes.key_channels * image_.positions();
    const std::int64_t value_offset = sample * sizes.value_channels * image_.positions();
    const T* const grad_output = arguments_.grad_output + value_offset;
    const std::int64_t first = sample * image_.positions() + row.offset();
    A* const weights = workspace.weights + workspace.slot;
    A* const grads = workspace.grads + workspace.slot;
    // Elements of P and A have the same size.
    P* const transposed_weights = reinterpret_cast<P*>(workspace.weights);
    P* const packed_grads = reinterpret_cast<P*>(workspace.grads);
    row.for_each_block([&](Range block) {
      const std::int64_t queries = block.size();
      row.dot_products(arguments_.key + key_offset, arguments_.query + key_offset, sizes.key_channels, block, weights);
      if (arguments_.differentiates_energies()) {
        row.dot_products(arguments_.value + value_offset, grad_output, sizes.value_channels, block, grads);
      }
      differentiate_softmax(
          weights, grads, width, queries, first + block.begin, workspace.delta + block.begin, workspace.grad_sum);
      if (corrects_sums()) {
        std::copy_n(workspace.grad_sum, queries, grad_sum_.data() + first + block.begin);
      }

      const auto sum_keys = [&](const A* panels, P* packed, R* target) {
        const P* const operand = b_operand_of_panels<P>(packed, panels, width, queries);
        row.weighted_sum(
            arguments_.key + key_offset, sizes.key_channels, {0, width}, operand, block, target + key_offset);
      };
      if (keeps_mean_key()) {
        sum_keys(weights, transposed_weights, mean_key_.data());
      }
      if (arguments_.grad_value != nullptr) {
        pack_b_from_transposed_panels<P>(transposed_weights, weights, width, queries);
        row.accumulate(
            grad_output, sizes.value_channels, block, transposed_weights, workspace.value_sums,
            arguments_.grad_value + value_offset);
      }
      if (arguments_.grad_query != nullptr) {
        sum_keys(grads, packed_grads, arguments_.grad_query);
      }
      if (arguments_.grad_key != nullptr) {
        const std::int64_t transposed = kIsPair<P> ? packed_b_size<P>(queries, width) : 0;
        pack_b_from_transposed_panels<P>(packed_grads + transposed, grads, width, queries);
        row.accumulate(
            arguments_.query + key_offset, sizes.key_channels, block, packed_grads + transposed, workspace.key_sums,
            arguments_.grad_key + key_offset);
      }
    });
  }

  // C panels (keys x queries): weights, from q.k to P; where a wanted gradient needs it, grads, from dP to dS.
  // first_query: index in (B, H, W). delta [queries]. grad_sum [queries]: the rows' part of s, rounded as the products
  // use it.
  void differentiate_softmax(
      A* weights, A* grads, std::int64_t keys, std::int64_t queries, std::int64_t first_query, const A* delta,
      A* grad_sum) const {
    const A* const logsumexp = arguments_.logsumexp + first_query;
    const A* const logsumexp_low = advance(arguments_.logsumexp_low, first_query);
    const A* const grad_logsumexp = advance(arguments_.grad_logsumexp, first_query);
    const V scale = broadcast<V>(arguments_.scale);
    for (std::int64_t first = 0; first < queries; first += panel_columns<A>) {
      const std::int64_t width = panel_width<A>(queries, first);
      for (std::int64_t i = 0; i < width; i += kLane) {
        const std::int64_t n = std::min(kLane, queries - first - i);
        const auto of_queries = [&](const A* numbers) {
          return numbers == nullptr ? V{} : read_vector(numbers + first + i, n);
        };
        const V query_logsumexp = of_queries(logsumexp);
        const V query_logsumexp_low = of_queries(logsumexp_low);
        const auto weight_at = [&](std::int64_t offset) {
          return backward_weight(load<V>(weights + offset), scale, query_logsumexp, query_logsumexp_low);
        };
        if (!arguments_.differentiates_energies()) {
          for (std::int64_t j = 0; j < keys; ++j) {
            const std::int64_t offset = first * keys + j * width + i;
            store(weights + offset, weight_at(offset));
          }
          continue;
        }
        const V query_delta = of_queries(delta);
        V sum = V{} - of_queries(grad_logsumexp) * scale;
        for (std::int64_t j = 0; j < keys; ++j) {
          const std::int64_t offset = first * keys + j * width + i;
          const V weight = weight_at(offset);
          store(weights + offset, weight);
          const V grad = weight * (load<V>(grads + offset) - query_delta) * scale;
          store(grads + offset, grad);
          sum += round_as_packed(grad);
        }
        store(grad_sum + first + i, sum);
      }
    }
  }

  static V round_as_packed(V vector) {
    if constexpr (kIsPair<P>) {
      return bit_cast_vector<V>(bfloat16_bits<kLane>(vector) << 16);
    } else {
      return vector;
    }
  }

  CrissCrossBackwardArguments<T, R> arguments_;
  ImageSize image_;
  Buffer<A> delta_;     // (B, H, W), D - grad_logsumexp
  Buffer<A> grad_sum_;  // (B, H, W), the rows' part of s
  Buffer<R> mean_key_;  // (B, E, H, W), the rows' part of M; its rounding only scales the correction
};

}  // namespace segattn::cpu
