// Position attention, forward: online softmax over tiles of keys. Nothing of size queries x keys is stored.
//
// Tiles are transposed, key^T query: rows are keys, and queries are along vector lanes. The softmax then runs down the
// columns, each in its lane. Its result is the B operand of output += value P^T, so value needs no transpose in memory.
//
// Keys and values are packed once, O(keys) memory. A work unit is a block of up to kBlockVectors vectors of queries,
// which passes over all keys with its output sums in L2. A query's result depends neither on the cut into blocks nor on
// the thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/common/attention_softmax.h"
#include "cpu/common/pack.h"
#include "cpu/common/parallel.h"
#include "cpu/common/range.h"
#include "cpu/position/arguments.h"

namespace segattn::cpu {

template <class T>
class PositionForward {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  using V = Vec<A>;
  static constexpr std::int64_t kLane = kLanes<A>;

  // Keys of a tile, whose energies for one column panel (kKeyTile x 48 floats) stay in L1.
  static constexpr std::int64_t kKeyTile = 128;
  // Channels of value that a unit packs: small feature maps have only one or two tiles of keys for all threads.
  static constexpr std::int64_t kPackChannels = 128;
  // Vectors of queries of a block; its output sums take 393 KB at C = 512 with AVX-512.
  static constexpr std::int64_t kBlockVectors = 4 * kColumnVectors<P>;
  // Samples are processed together up to this number of packed elements, which bounds the memory for large batches.
  static constexpr std::int64_t kPackedLimit = std::int64_t{1} << 23;

 public:
  explicit PositionForward(const PositionForwardArguments<T>& arguments)
      : arguments_(arguments),
        e_(arguments.sizes.key_channels),
        c_(arguments.sizes.value_channels),
        n_(arguments.sizes.queries),
        m_(arguments.sizes.keys) {}

  void run() const {
    const std::int64_t batch = arguments_.sizes.batch;
    if (batch == 0 || n_ == 0) {
      return;
    }
    if (m_ == 0) {
      store_without_keys();
      return;
    }
    const std::int64_t packed_sample = packed_key_size() + packed_value_size();
    const std::int64_t group = std::clamp<std::int64_t>(kPackedLimit / packed_sample, 1, batch);
    const Buffer<P> packed(packed_sample * group);
    for (std::int64_t first = 0; first < batch; first += group) {
      run_samples(first, std::min(group, batch - first), packed.data());
    }
  }

 private:
  std::int64_t key_tiles() const { return ceil_div(m_, kKeyTile); }
  std::int64_t packed_key_size() const { return packed_a_size<P>(m_, e_); }
  // An A operand of C rows per tile.
  std::int64_t packed_value_size() const { return packed_a_size<P>(c_, m_); }

  void run_samples(std::int64_t first_sample, std::int64_t samples, P* packed) const {
    const std::int64_t tiles = key_tiles();
    const std::int64_t sample_size = packed_key_size() + packed_value_size();
    const std::int64_t parts = 1 + ceil_div(c_, kPackChannels);
    parallel_units(samples * tiles * parts, 0, [&](std::int64_t unit, Scratch&) {
      const std::int64_t sample = unit / parts / tiles;
      const std::int64_t first_key = unit / parts % tiles * kKeyTile;
      P* const target = packed + sample * sample_size;
      if (unit % parts == 0) {
        pack_keys(first_sample + sample, first_key, target);
      } else {
        pack_values(first_sample + sample, first_key, (unit % parts - 1) * kPackChannels, target + packed_key_size());
      }
    });

    const std::int64_t vectors = padded_columns<P>(n_) / kLane;
    const std::int64_t blocks = blocks_per_sample(vectors, samples);
    parallel_units(samples * blocks, block_scratch(), [&](std::int64_t unit, Scratch& scratch) {
      const std::int64_t sample = unit / blocks;
      const Range queries = part_of(n_, kLane, unit % blocks, blocks);
      attend(first_sample + sample, queries, packed + sample * sample_size, scratch);
    });
  }

  // At most kBlockVectors vectors per block, and the same number of blocks for every thread.
  static std::int64_t blocks_per_sample(std::int64_t vectors, std::int64_t samples) {
    const std::int64_t least = ceil_div(vectors, kBlockVectors);
    const std::int64_t even = ceil_div(round_up(least * samples, thread_count()), samples);
    return std::min(vectors, even);
  }

  void pack_keys(std::int64_t sample, std::int64_t first_key, P* packed_key) const {
    pack_a_from_steps<P>(
        packed_key + first_key * k_steps<P>(e_), arguments_.key + sample * e_ * m_ + first_key, m_,
        std::min(kKeyTile, m_ - first_key), e_);
  }

  void pack_values(std::int64_t sample, std::int64_t first_key, std::int64_t first_channel, P* packed_value) const {
    const std::int64_t keys = std::min(kKeyTile, m_ - first_key);
    pack_a_from_rows<P>(
        packed_value + c_ * k_steps<P>(first_key) + first_channel * k_steps<P>(keys),
        arguments_.value + (sample * c_ + first_channel) * m_ + first_key, m_,
        std::min(kPackChannels, c_ - first_channel), keys);
  }

  std::size_t block_scratch() const {
    constexpr std::int64_t columns = kBlockVectors * kLane;
    return scratch_bytes<P>(packed_b_size<P>(columns, e_)) + scratch_bytes<A>(c_ * columns) +
        scratch_bytes<A>(kKeyTile * panel_columns<P>) + scratch_bytes<P>(packed_b_size<P>(panel_columns<P>, kKeyTile)) +
        3 * scratch_bytes<A>(columns);
  }

  // The output and the logsumexp of a block of queries.
  void attend(std::int64_t sample, Range block, const P* packed_key, Scratch& scratch) const {
    const std::int64_t queries = block.size();
    const P* const packed_value = packed_key + packed_key_size();
    const std::int64_t columns = padded_columns<P>(queries);
    P* const packed_query = scratch.take<P>(packed_b_size<P>(queries, e_));
    A* const sums = scratch.take<A>(c_ * columns);
    A* const energy = scratch.take<A>(kKeyTile * panel_columns<P>);
    P* const weights = kIsPair<P> ? scratch.take<P>(packed_b_size<P>(panel_columns<P>, kKeyTile)) : nullptr;
    A* const maximum = scratch.take<A>(columns);
    A* const total = scratch.take<A>(columns);
    A* const rescale = scratch.take<A>(columns);
    std::fill_n(maximum, columns, -std::numeric_limits<A>::infinity());
    std::fill_n(total, columns, A(0));
    pack_b_from_steps<P>(packed_query, arguments_.query + sample * e_ * n_ + block.begin, n_, queries, e_);

    for (std::int64_t first_key = 0; first_key < m_; first_key += kKeyTile) {
      const std::int64_t keys = std::min(kKeyTile, m_ - first_key);
      const auto key_tile = AOperand<P>::packed(packed_key + first_key * k_steps<P>(e_));
      const auto value_tile = AOperand<P>::packed(packed_value + c_ * k_steps<P>(first_key));
      for (std::int64_t column = 0; column < queries; column += panel_columns<P>) {
        const std::int64_t width = panel_width<P>(queries, column);
        tile_gemm<P>(
            key_tile, packed_query + column * k_steps<P>(e_), COperand<A>::panels(energy), keys, width, k_steps<P>(e_),
            GemmMode::kStore);
        softmax_columns(energy, keys, width, maximum + column, total + column, rescale + column);
        const P* const panel = b_operand_of_panels<P>(weights, energy, keys, width);
        tile_gemm<P>(
            value_tile, panel, COperand<A>::panels(sums + column * c_), c_, width, k_steps<P>(keys),
            first_key == 0 ? GemmMode::kStore : GemmMode::kScaleAdd, rescale + column);
      }
    }
    store_results(sample, block, sums, maximum, total);
  }

  // Overwrites q.k in `products` (keys x width, one panel) with exp(energy - largest energy). Updates the running
  // maximum (of ForwardSoftmax) and total of each column. `rescale` becomes the factor for sums that were computed with
  // the old maximum.
  void softmax_columns(A* products, std::int64_t keys, std::int64_t width, A* maximum, A* total, A* rescale) const {
    const ForwardSoftmax<V> softmax(arguments_.scale);
    for (std::int64_t i = 0; i < width; i += kLane) {
      const V old_maximum = load<V>(maximum + i);
      V new_maximum = old_maximum;
      for (std::int64_t j = 0; j < keys; ++j) {
        new_maximum = softmax.maximum(new_maximum, load<V>(products + j * width + i));
      }
      const V offset = softmax.offset(new_maximum);
      V sum{};
      for (std::int64_t j = 0; j < keys; ++j) {
        A* const element = products + j * width + i;
        const V weight = softmax.weight(load<V>(element), offset);
        store(element, weight);
        sum += weight;
      }
      const V factor = softmax.factor(old_maximum, new_maximum);
      store(total + i, fma(load<V>(total + i), factor, sum));
      store(maximum + i, new_maximum);
      store(rescale + i, factor);
    }
  }

  // total becomes its inverse.
  void store_results(std::int64_t sample, Range block, const A* sums, const A* maximum, A* total) const {
    A* const logsumexp = arguments_.logsumexp + sample * n_ + block.begin;
    A* const logsumexp_low = advance(arguments_.logsumexp_low, sample * n_ + block.begin);
    const A size = std::abs(arguments_.scale);
    for (std::int64_t i = 0; i < block.size(); ++i) {
      const auto [value, low] = split_logsumexp(maximum[i], size, maximum[i] * size, total[i]);
      logsumexp[i] = value;
      if (logsumexp_low != nullptr) {
        logsumexp_low[i] = low;
      }
      total[i] = arguments_.is_part && total[i] == A(0) ? A(0) : A(1) / total[i];
    }
    const std::int64_t first = sample * c_ * n_ + block.begin;
    arguments_.output.visit([&](auto* output) {
      for_each_panel_vector(
          sums, c_, block.size(), [&](std::int64_t row, std::int64_t column, V vector, std::int64_t count) {
            const std::int64_t at = first + row * n_ + column;
            vector *= load<V>(total + column);
            write_vector(output + at, vector, count);
            if (arguments_.output_low != nullptr) {
              vector -= read_vector(output + at, count);
              write_vector(arguments_.output_low + at, vector, count);
            }
          });
    });
  }

  // The results where there are no keys.
  void store_without_keys() const {
    const std::int64_t queries = arguments_.sizes.batch * n_;
    arguments_.output.fill(queries * c_);
    if (arguments_.output_low != nullptr) {
      std::fill_n(arguments_.output_low, queries * c_, T(0));
    }
    std::fill_n(arguments_.logsumexp, queries, -std::numeric_limits<A>::infinity());
    if (arguments_.logsumexp_low != nullptr) {
      std::fill_n(arguments_.logsumexp_low, queries, A(0));
    }
  }

  PositionForwardArguments<T> arguments_;
  std::int64_t e_, c_, n_, m_;  // E, C, N, M of the shapes above
};

}  // namespace segattn::cpu
