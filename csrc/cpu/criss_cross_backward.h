// Criss-cross attention, backward, with the forward's log-sum-exp and D = sum_c grad_output * output for both branches:
//
//   P = exp(scale * key . query - logsumexp), dP = value . grad_output, dS = scale * P * (dP - D)
//   grad_value = grad_output P^T, grad_query = key dS, grad_key = query dS^T
//
// along rows, which write the gradients, then along columns, which add to them.
#pragma once

#include "criss_cross_products.h"
#include "exp.h"
#include "../checks/criss_cross.h"

namespace segattn::cpu {

template <class T>
struct CrissCrossBackwardArguments {
  const T* grad_output;               // (B, C, H, W)
  const T* query;                     // (B, E, H, W)
  const T* key;                       // (B, E, H, W)
  const T* value;                     // (B, C, H, W)
  const T* output;                    // (B, C, H, W)
  const AccumulatorOf<T>* logsumexp;  // (B, H, W)
  T* grad_query;                      // (B, E, H, W)
  T* grad_key;                        // (B, E, H, W)
  T* grad_value;                      // (B, C, H, W)
  CrissCrossSizes sizes;
  AccumulatorOf<T> scale;
};

template <class T>
class CrissCrossBackward {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  using V = Vec<A>;
  static constexpr std::int64_t kLane = kLanes<A>;

 public:
  explicit CrissCrossBackward(const CrissCrossBackwardArguments<T>& arguments)
      : arguments_(arguments),
        map_{arguments.sizes.height, arguments.sizes.width},
        delta_(arguments.sizes.batch * map_.positions()) {}

  void run() const {
    run_branch<RowLine<T>>();
    run_branch<ColumnLines<T>>();
  }

 private:
  // A unit's memory. A line's weights take a slot of `slot` elements; there is a slot more than there are lines, so
  // that each line's transposed weights can go to the slot before its own, which is free by then.
  template <class Lines>
  struct Workspace {
    LineProducts<T, Lines> products;
    std::int64_t lines, slot, columns;
    std::int64_t key_sums_size, value_sums_size;
    A* weights = nullptr;    // P, then P^T
    A* grads = nullptr;      // dP, dS, dS^T
    A* logsumexp = nullptr;  // of a block of queries
    A* delta = nullptr;
    A* key_sums = nullptr;
    A* value_sums = nullptr;

    Workspace(MapSizes map, const CrissCrossSizes& sizes)
        : products(Lines::length_of(map), lines_in_group<Lines>(map, sizes.batch),
                   std::max(sizes.key_channels, sizes.value_channels)),
          lines(lines_in_group<Lines>(map, sizes.batch)) {
      const std::int64_t length = Lines::length_of(map);
      const std::int64_t block = products.block();
      const std::int64_t transposed = packed_b_size<P>(length, block);
      slot = line_stride<A>(std::max(panels_size<P>(length, block),
                                     kIsPair<P> ? packed_b_size<P>(block, length) + transposed : transposed));
      columns = padded_columns<P>(block);
      key_sums_size = block < length ? products.sums_size(sizes.key_channels) : 0;
      value_sums_size = block < length ? products.sums_size(sizes.value_channels) : 0;
    }

    std::size_t scratch() const {
      return products.scratch() + 2 * scratch_bytes<A>((lines + 1) * slot) + 2 * scratch_bytes<A>(columns) +
             scratch_bytes<A>(key_sums_size) + scratch_bytes<A>(value_sums_size);
    }

    void take(Scratch& from) {
      products.take(from);
      weights = from.take<A>((lines + 1) * slot);
      grads = from.take<A>((lines + 1) * slot);
      logsumexp = from.take<A>(columns);
      delta = from.take<A>(columns);
      key_sums = from.take<A>(key_sums_size);
      value_sums = from.take<A>(value_sums_size);
    }
  };

  template <class Lines>
  void run_branch() const {
    const Workspace<Lines> shared(map_, arguments_.sizes);
    for_each_group<Lines>(map_, arguments_.sizes.batch, shared.lines, shared.scratch(),
                          [&](std::int64_t sample, const Lines& lines, Scratch& scratch) {
                            Workspace<Lines> workspace = shared;
                            workspace.take(scratch);
                            if constexpr (!Lines::kExcludesSelf) {
                              compute_delta(sample, lines);
                            }
                            differentiate(sample, lines, workspace);
                          });
  }

  // D of the row's positions; the column pass comes after all rows.
  void compute_delta(std::int64_t sample, const RowLine<T>& row) const {
    const std::int64_t positions = map_.positions();
    const std::int64_t channels = arguments_.sizes.value_channels;
    for (std::int64_t x = 0; x < map_.width; x += kLane) {
      const std::int64_t n = std::min(kLane, map_.width - x);
      std::int64_t offset = sample * channels * positions + row.offset(0, x);
      V sum{};
      for (std::int64_t c = 0; c < channels; ++c, offset += positions) {
        sum = fma(read_vector(arguments_.grad_output + offset, n), read_vector(arguments_.output + offset, n), sum);
      }
      write_vector(delta_.data() + sample * positions + row.offset(0, x), sum, n);
    }
  }

  template <class Lines>
  void differentiate(std::int64_t sample, const Lines& lines, const Workspace<Lines>& workspace) const {
    const CrissCrossSizes& sizes = arguments_.sizes;
    const LineProducts<T, Lines>& products = workspace.products;
    const std::int64_t length = lines.length();
    const std::int64_t slot = workspace.slot;
    const std::int64_t key_offset = sample * sizes.key_channels * map_.positions();
    const std::int64_t value_offset = sample * sizes.value_channels * map_.positions();
    const T* const grad_output = arguments_.grad_output + value_offset;
    // Elements of P and A have the same size.
    P* const transposed_weights = reinterpret_cast<P*>(workspace.weights);
    P* const packed_grads = reinterpret_cast<P*>(workspace.grads);
    const auto put = [positions = map_.positions()](T* map) {
      return [map, positions](std::int64_t channel, std::int64_t position, V vector, std::int64_t n) {
        put_vector<Lines>(map + channel * positions + position, vector, n);
      };
    };
    for (std::int64_t first = 0; first < length; first += products.block()) {
      const std::int64_t queries = std::min(products.block(), length - first);
      products.score(lines, arguments_.key + key_offset, arguments_.query + key_offset, sizes.key_channels, first,
                     queries, workspace.weights + slot, slot);
      products.score(lines, arguments_.value + value_offset, grad_output, sizes.value_channels, first, queries,
                     workspace.grads + slot, slot);
      for (std::int64_t line = 0; line < lines.lines(); ++line) {
        A* const weights = workspace.weights + (line + 1) * slot;
        A* const grads = workspace.grads + (line + 1) * slot;
        for (std::int64_t i = 0; i < queries; ++i) {
          const std::int64_t offset = sample * map_.positions() + lines.offset(line, first + i);
          workspace.logsumexp[i] = arguments_.logsumexp[offset];
          workspace.delta[i] = delta_.data()[offset];
        }
        differentiate_softmax(weights, grads, length, queries, workspace.logsumexp, workspace.delta);
        if constexpr (Lines::kExcludesSelf) {
          for (std::int64_t i = 0; i < queries; ++i) {
            const std::int64_t self = panel_offset<A>(length, queries, first + i, i);
            weights[self] = grads[self] = A(0);
          }
        }
        pack_b_from_transposed_panels<P>(transposed_weights + line * slot, weights, length, queries);
      }
      products.accumulate(lines, grad_output, sizes.value_channels, first, queries, transposed_weights, slot,
                          workspace.value_sums, put(arguments_.grad_value + value_offset));

      const std::int64_t transposed = kIsPair<P> ? packed_b_size<P>(queries, length) : 0;
      const auto transpose_grads = [&] {
        for (std::int64_t line = 0; line < lines.lines(); ++line) {
          A* const grads = workspace.grads + (line + 1) * slot;
          if constexpr (kIsPair<P>) {
            pack_b_from_panels<P>(packed_grads + line * slot, grads, length, queries);
          }
          pack_b_from_transposed_panels<P>(packed_grads + line * slot + transposed, grads, length, queries);
        }
      };
      const auto find_grad_query = [&](const P* grads) {
        products.apply(lines, arguments_.key + key_offset, sizes.key_channels, 0, length, grads, slot, first, queries,
                       put(arguments_.grad_query + key_offset));
      };
      if constexpr (kIsPair<P>) {
        transpose_grads();
        find_grad_query(packed_grads);
      } else {
        find_grad_query(packed_grads + slot);
        transpose_grads();
      }
      products.accumulate(lines, arguments_.query + key_offset, sizes.key_channels, first, queries,
                          packed_grads + transposed, slot, workspace.key_sums, put(arguments_.grad_key + key_offset));
    }
  }

  // weights (keys x queries): energies to P; grads: dP to dS.
  void differentiate_softmax(A* weights, A* grads, std::int64_t keys, std::int64_t queries, const A* logsumexp,
                             const A* delta) const {
    const V scale = broadcast<V>(arguments_.scale);
    for (std::int64_t first = 0; first < queries; first += panel_columns<A>) {
      const std::int64_t width = panel_width<A>(queries, first);
      for (std::int64_t j = 0; j < keys; ++j) {
        for (std::int64_t i = 0; i < width; i += kLane) {
          const std::int64_t offset = first * keys + j * width + i;
          const V weight = exp(fma(load<V>(weights + offset), scale, -load<V>(logsumexp + first + i)));
          store(weights + offset, weight);
          store(grads + offset, weight * (load<V>(grads + offset) - load<V>(delta + first + i)) * scale);
        }
      }
    }
  }

  CrissCrossBackwardArguments<T> arguments_;
  MapSizes map_;
  Buffer<A> delta_;  // (B, H, W)
};

}  // namespace segattn::cpu
