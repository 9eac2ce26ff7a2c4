// Position attention, forward: online softmax over tiles of keys, nothing of size queries x keys is stored.
//
// Tiles are S^T = K^T Q: rows are keys, queries run along vector lanes, so the softmax runs down columns lane by lane,
// the result is at once the B operand of output += value P^T, and value needs no transpose in memory.
//
// keys and values are packed once (O(keys) memory); a work unit is a block of up to kBlockVectors vectors of queries,
// which passes over all keys with its output sums in the second-level cache. A query's result depends neither on the
// cut into blocks nor on the thread.
#pragma once

#include <cmath>

#include "checks/position.h"
#include "cpu/common/exp.h"
#include "cpu/common/pack.h"
#include "cpu/common/parallel.h"

namespace segattn::cpu {

template <class T>
struct PositionForwardArguments {
  const T* query;               // (B, E, N)
  const T* key;                 // (B, E, M)
  const T* value;               // (B, C, M)
  T* output;                    // (B, C, N)
  T* output_low;                // (B, C, N), what rounding took from the output; null: not wanted
  AccumulatorOf<T>* logsumexp;  // (B, N)
  PositionSizes sizes;
  AccumulatorOf<T> scale;
};

template <class T>
class PositionForward {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  using V = Vec<A>;
  static constexpr std::int64_t kLane = kLanes<A>;

  // A tile of keys: its scores for one column panel (kKeyTile x 48 floats) stay in the first-level cache.
  static constexpr std::int64_t kKeyTile = 128;
  // Channels of value that are packed at once: small maps have one or two tiles of keys for all threads.
  static constexpr std::int64_t kPackChannels = 128;
  // Output sums of a block: C x (12 vectors) float, 393 KB at C = 512 with AVX-512.
  static constexpr std::int64_t kBlockVectors = 4 * kColumnVectors<P>;
  // Samples are packed together up to this many elements, to bound the memory for large batches.
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
    const std::int64_t packed_sample = packed_key_size() + packed_value_size();
    const std::int64_t group = std::clamp<std::int64_t>(kPackedLimit / packed_sample, 1, batch);
    const Buffer<P> packed(packed_sample * group);
    for (std::int64_t first = 0; first < batch; first += group) {
      run_samples(first, std::min(group, batch - first), packed.data());
    }
  }

 private:
  std::int64_t key_tiles() const { return (m_ + kKeyTile - 1) / kKeyTile; }
  std::int64_t packed_key_size() const { return packed_a_size<P>(m_, e_); }
  // Every tile is an A operand of C rows; all but the last have the same number of steps.
  std::int64_t packed_value_size() const { return packed_a_size<P>(c_, m_); }

  void run_samples(std::int64_t first_sample, std::int64_t samples, P* packed) const {
    const std::int64_t tiles = key_tiles();
    const std::int64_t sample_size = packed_key_size() + packed_value_size();
    const std::int64_t parts = 1 + (c_ + kPackChannels - 1) / kPackChannels;
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
      const std::int64_t block = unit % blocks;
      const std::int64_t begin = block * vectors / blocks * kLane;
      const std::int64_t end = std::min(n_, (block + 1) * vectors / blocks * kLane);
      attend(first_sample + sample, begin, end - begin, packed + sample * sample_size, scratch);
    });
  }

  // Few enough vectors a block, and every thread the same number of blocks.
  static std::int64_t blocks_per_sample(std::int64_t vectors, std::int64_t samples) {
    const auto threads = static_cast<std::int64_t>(torch::stable::get_num_threads());
    const std::int64_t least = (vectors + kBlockVectors - 1) / kBlockVectors;
    const std::int64_t even = (round_up(least * samples, threads) + samples - 1) / samples;
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

  // Queries [first_query, first_query + queries) of one sample over all keys.
  void attend(
      std::int64_t sample, std::int64_t first_query, std::int64_t queries, const P* packed_key,
      Scratch& scratch) const {
    const P* const packed_value = packed_key + packed_key_size();
    const std::int64_t columns = padded_columns<P>(queries);
    P* const packed_query = scratch.take<P>(packed_b_size<P>(queries, e_));
    A* const sums = scratch.take<A>(c_ * columns);
    A* const scores = scratch.take<A>(kKeyTile * panel_columns<P>);
    P* const weights = kIsPair<P> ? scratch.take<P>(packed_b_size<P>(panel_columns<P>, kKeyTile)) : nullptr;
    A* const maximum = scratch.take<A>(columns);
    A* const total = scratch.take<A>(columns);
    A* const rescale = scratch.take<A>(columns);
    std::fill_n(maximum, columns, -std::numeric_limits<A>::infinity());
    std::fill_n(total, columns, A(0));
    pack_b_from_steps<P>(packed_query, arguments_.query + sample * e_ * n_ + first_query, n_, queries, e_);

    for (std::int64_t first_key = 0; first_key < m_; first_key += kKeyTile) {
      const std::int64_t keys = std::min(kKeyTile, m_ - first_key);
      const auto key_tile = AOperand<P>::packed(packed_key + first_key * k_steps<P>(e_));
      const auto value_tile = AOperand<P>::packed(packed_value + c_ * k_steps<P>(first_key));
      for (std::int64_t column = 0; column < queries; column += panel_columns<P>) {
        const std::int64_t width = panel_width<P>(queries, column);
        tile_gemm<P>(
            key_tile, packed_query + column * k_steps<P>(e_), COperand<A>::panels(scores), keys, width, k_steps<P>(e_),
            GemmMode::kStore);
        softmax_columns(scores, keys, width, maximum + column, total + column, rescale + column);
        const P* const panel = b_operand_of_panels<P>(weights, scores, keys, width);
        tile_gemm<P>(
            value_tile, panel, COperand<A>::panels(sums + column * c_), c_, width, k_steps<P>(keys),
            first_key == 0 ? GemmMode::kStore : GemmMode::kScaleAdd, rescale + column);
      }
    }
    finish(sample, first_query, queries, sums, maximum, total);
  }

  // scores (keys x width, one panel) become exp(scale * score - maximum), with the running maximum and total of each
  // column brought up to date; rescale is the factor for sums made with the old maximum.
  void softmax_columns(A* scores, std::int64_t keys, std::int64_t width, A* maximum, A* total, A* rescale) const {
    const V scale = broadcast<V>(arguments_.scale);
    for (std::int64_t i = 0; i < width; i += kLane) {
      const V old_maximum = load<V>(maximum + i);
      V new_maximum = old_maximum;
      for (std::int64_t j = 0; j < keys; ++j) {
        new_maximum = max(new_maximum, load<V>(scores + j * width + i) * scale);
      }
      // While all scores are -inf the maximum is -inf, and -inf - -inf would be NaN for ever: 0 gives weights of 0.
      const V offset = select(new_maximum == -std::numeric_limits<A>::infinity(), V{}, new_maximum);
      V sum{};
      for (std::int64_t j = 0; j < keys; ++j) {
        A* const score = scores + j * width + i;
        const V weight = exp(fma(load<V>(score), scale, -offset));
        store(score, weight);
        sum += weight;
      }
      const V factor = exp(old_maximum - offset);
      store(total + i, fma(load<V>(total + i), factor, sum));
      store(maximum + i, new_maximum);
      store(rescale + i, factor);
    }
  }

  void finish(
      std::int64_t sample, std::int64_t first_query, std::int64_t queries, A* sums, const A* maximum, A* total) const {
    A* const logsumexp = arguments_.logsumexp + sample * n_ + first_query;
    for (std::int64_t i = 0; i < queries; ++i) {
      logsumexp[i] = maximum[i] + std::log(total[i]);
      total[i] = A(1) / total[i];
    }
    const std::int64_t first = sample * c_ * n_ + first_query;
    const auto write = [](T* target, V vector, std::int64_t count) {
      if (count == kLane) {
        narrow<kLane>(target, vector);
      } else {
        narrow_partial<kLane>(target, vector, count);
      }
    };
    detail::for_each_panel_vector(
        sums, c_, queries, [&](std::int64_t row, std::int64_t column, V vector, std::int64_t count) {
          const std::int64_t at = first + row * n_ + column;
          vector *= load<V>(total + column);
          write(arguments_.output + at, vector, count);
          if (arguments_.output_low != nullptr) {
            vector -= read_vector(arguments_.output + at, count);
            write(arguments_.output_low + at, vector, count);
          }
        });
  }

  PositionForwardArguments<T> arguments_;
  std::int64_t e_, c_, n_, m_;
};

}  // namespace segattn::cpu
