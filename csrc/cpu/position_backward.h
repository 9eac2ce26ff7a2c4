// Position attention, backward. With P the attention weights, computed again from the logsumexp,
//   grad_value = grad_output P,  D_i = sum_c grad_output_ci output_ci,  dS^T = P^T * (value^T grad_output - D) * scale,
//   grad_query = key dS^T,       grad_key = query dS:
// three products over E and two over C. Tiles are transposed as in the forward pass (rows are keys, lanes are queries).
//   scores  = key^T query             A: key (copied),      B: query (copied)
//   weight gradients = value^T grad   A: value (copied),    B: grad_output (copied)
//   grad_value^T += P^T grad^T        A: the tile, strided, B: grad_output (transposed)
//   grad_key^T   += dS^T query^T      A: the tile, strided, B: query (transposed)
//   grad_query   += key dS^T          A: key (transposed),  B: the tile
// The logsumexp is stored rounded: where it is large, exp(score - logsumexp) would be off by eps * logsumexp / 2, which
// a nearly one-hot softmax shows (eager divides by the sum, so its error cancels). There the sum of the weights is
// computed once more and its logarithm, a number near 0, is taken off too.
//
// position_schedule.h says which tiles a unit has and why the sums need no atomics.
#pragma once

#include "exp.h"
#include "pack.h"
#include "parallel.h"
#include "position_schedule.h"
#include "../checks/position.h"

#include <cmath>
#include <limits>

namespace segattn::cpu {

template <class T>
struct PositionBackwardArguments {
  const T* grad_output;                // (B, C, N)
  const T* query;                      // (B, E, N)
  const T* key;                        // (B, E, M)
  const T* value;                      // (B, C, M)
  const T* output;                     // (B, C, N)
  const AccumulatorOf<T>* logsumexp;   // (B, N)
  T* grad_query;                       // (B, E, N)
  T* grad_key;                         // (B, E, M)
  T* grad_value;                       // (B, C, M)
  PositionSizes sizes;
  AccumulatorOf<T> scale;
};

template <class T>
class PositionBackward {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  using V = Vec<A>;
  static constexpr std::int64_t kLane = kLanes<A>;
  static constexpr std::int64_t kKeyTile = 128;
  static constexpr std::int64_t kQueryTile = 4 * panel_columns<P>;
  static constexpr std::int64_t kKeyUnit = 16;  // whole row panels and whole BFloat16Pairs
  // Samples are worked on together up to this many accumulators, to bound the memory for large batches.
  static constexpr std::int64_t kSumsLimit = std::int64_t{1} << 23;
  // Largest logsumexp whose rounding is left alone: 16 eps of the accumulator. The rounding of weights to 16 bits is
  // coarser than any.
  static constexpr A kLargeLogsumexp = sizeof(T) == 2 ? std::numeric_limits<A>::infinity() : A(32);

 public:
  explicit PositionBackward(const PositionBackwardArguments<T>& arguments)
      : arguments_(arguments),
        e_(arguments.sizes.key_channels),
        c_(arguments.sizes.value_channels),
        n_(arguments.sizes.queries),
        m_(arguments.sizes.keys) {}

  void run() const {
    const std::int64_t batch = arguments_.sizes.batch;
    if (batch == 0) {
      return;
    }
    if (n_ == 0) {
      std::fill_n(arguments_.grad_key, batch * e_ * m_, T(0));
      std::fill_n(arguments_.grad_value, batch * c_ * m_, T(0));
      return;
    }
    const std::int64_t sample_size = query_sums_size() + key_sums_size() * PositionSchedule(1, n_, m_).replicas;
    const std::int64_t together = std::clamp<std::int64_t>(kSumsLimit / sample_size, 1, batch);
    for (std::int64_t first = 0; first < batch; first += together) {
      run_samples(first, std::min(together, batch - first));
    }
  }

 private:
  // Sums in accumulator precision. grad_query in panels of tiles of columns, grad_key and grad_value transposed, in
  // panels of tiles of keys: what belongs to position i starts at element i * channels of its sample (and replica).
  struct Sums {
    A* query;
    A* key;
    A* value;
  };

  // A unit's operands.
  struct Operands {
    P *key, *value, *key_transposed;                                   // A: (keys, E), (keys, C), E x keys by tiles
    P *query, *grad, *query_transposed, *grad_transposed;              // B: of one tile of queries
    A *scores, *weight_grads;                                          // one column panel of a tile
    P *weights_rows, *score_grads_rows;                                // tile, row-major: strided A
    P *score_grads;                                                    // tile in panels: B
    A *logsumexp, *correction, *delta;                                 // of one tile of queries
  };

  std::int64_t query_sums_size() const { return panels_size<P>(e_, n_); }
  std::int64_t key_sums_size() const { return m_ * (padded_columns<P>(e_) + padded_columns<P>(c_)); }

  void run_samples(std::int64_t first_sample, std::int64_t samples) const {
    const PositionSchedule schedule(samples, n_, m_);
    const Buffer<A> delta(samples * n_);
    compute_delta(first_sample, samples, delta.data());
    const Buffer<A> correction(samples * n_);
    compute_correction(first_sample, samples, correction.data());

    const std::int64_t copies = samples * schedule.replicas;
    const Buffer<A> memory(samples * query_sums_size() + copies * key_sums_size());
    const Sums sums{memory.data(), memory.data() + samples * query_sums_size(),
                    memory.data() + samples * query_sums_size() + copies * m_ * padded_columns<P>(e_)};
    parallel_units(schedule.units(), unit_scratch(), [&](std::int64_t index, Scratch& scratch) {
      const PositionSchedule::Unit unit = schedule.unit(index);
      if (!unit.idle) {
        add_unit(schedule, unit, first_sample, delta.data(), correction.data(), sums, scratch);
        schedule.finish(unit);
      }
    });
    parallel_units(samples * (schedule.key_groups + schedule.query_groups), 0, [&](std::int64_t index, Scratch&) {
      const std::int64_t groups = schedule.key_groups + schedule.query_groups;
      store_gradients(schedule, first_sample, index / groups, index % groups, sums);
    });
  }

  // delta = scale * sum over channels of grad_output * output, (samples, N)
  void compute_delta(std::int64_t first_sample, std::int64_t samples, A* delta) const {
    constexpr std::int64_t chunk = 512;
    const std::int64_t chunks = divide_up(n_, chunk);
    parallel_units(samples * chunks, scratch_bytes<A>(chunk), [&](std::int64_t unit, Scratch& scratch) {
      const std::int64_t sample = unit / chunks;
      const std::int64_t begin = unit % chunks * chunk;
      const std::int64_t count = std::min(chunk, n_ - begin);
      A* const sum = scratch.take<A>(chunk);
      std::fill_n(sum, chunk, A(0));
      for (std::int64_t c = 0; c < c_; ++c) {
        const std::int64_t offset = ((first_sample + sample) * c_ + c) * n_ + begin;
        const T* const grad = arguments_.grad_output + offset;
        const T* const output = arguments_.output + offset;
        std::int64_t i = 0;
        for (; i + kLane <= count; i += kLane) {
          store(sum + i, fma(widen<kLane>(grad + i), widen<kLane>(output + i), load<V>(sum + i)));
        }
        if (i < count) {
          store(sum + i, fma(widen_partial<kLane>(grad + i, count - i), widen_partial<kLane>(output + i, count - i),
                             load<V>(sum + i)));
        }
      }
      for (std::int64_t i = 0; i < count; ++i) {
        delta[sample * n_ + begin + i] = sum[i] * arguments_.scale;
      }
    });
  }

  // correction = log(sum over keys of exp(score - logsumexp)) where the logsumexp is large, else 0, (samples, N)
  void compute_correction(std::int64_t first_sample, std::int64_t samples, A* correction) const {
    const std::int64_t tiles = divide_up(n_, kQueryTile);
    const std::size_t scratch_size = scratch_bytes<P>(packed_b_size<P>(kQueryTile, e_)) +
                                     scratch_bytes<P>(packed_a_size<P>(kKeyTile, e_)) +
                                     scratch_bytes<A>(kKeyTile * kQueryTile) + 2 * scratch_bytes<A>(kQueryTile);
    parallel_units(samples * tiles, scratch_size, [&](std::int64_t unit, Scratch& scratch) {
      const std::int64_t sample = first_sample + unit / tiles;
      const std::int64_t first = unit % tiles * kQueryTile;
      const std::int64_t count = std::min(kQueryTile, n_ - first);
      const A* const logsumexp = arguments_.logsumexp + sample * n_ + first;
      A* const target = correction + unit / tiles * n_ + first;
      std::fill_n(target, count, A(0));
      if (std::none_of(logsumexp, logsumexp + count, [](A value) { return std::abs(value) > kLargeLogsumexp; })) {
        return;
      }
      P* const query = scratch.take<P>(packed_b_size<P>(kQueryTile, e_));
      P* const key = scratch.take<P>(packed_a_size<P>(kKeyTile, e_));
      A* const scores = scratch.take<A>(kKeyTile * kQueryTile);
      A* const padded_logsumexp = scratch.take<A>(kQueryTile);
      A* const sum = scratch.take<A>(kQueryTile);
      std::fill_n(padded_logsumexp, kQueryTile, A(0));
      std::copy_n(logsumexp, count, padded_logsumexp);
      std::fill_n(sum, kQueryTile, A(0));
      const std::int64_t columns = padded_columns<P>(count);
      pack_b_from_steps<P>(query, arguments_.query + sample * e_ * n_ + first, n_, count, e_);
      for (std::int64_t first_key = 0; first_key < m_; first_key += kKeyTile) {
        const std::int64_t keys = std::min(kKeyTile, m_ - first_key);
        pack_a_from_steps<P>(key, arguments_.key + sample * e_ * m_ + first_key, m_, keys, e_);
        tile_gemm<P>(AOperand<P>::packed(key), query, COperand<A>::row_major(scores, columns), keys, count,
                     k_steps<P>(e_), GemmMode::store);
        for (std::int64_t row = 0; row < keys; ++row) {
          for (std::int64_t i = 0; i < columns; i += kLane) {
            const V score = load<V>(scores + row * columns + i);
            store(sum + i, load<V>(sum + i) + exp(fma(score, broadcast<V>(arguments_.scale),
                                                      -load<V>(padded_logsumexp + i))));
          }
        }
      }
      for (std::int64_t i = 0; i < count; ++i) {
        if (std::isfinite(logsumexp[i])) {
          target[i] = std::log(sum[i]);
        }
      }
    });
  }

  std::int64_t largest_key_group() const { return std::min(round_up(m_, kKeyUnit), PositionSchedule::kGroup + kKeyUnit); }

  std::size_t unit_scratch() const {
    const std::int64_t keys = largest_key_group();
    const std::int64_t key_tile = std::min(kKeyTile, keys);
    const std::int64_t tile = key_tile * kQueryTile;
    return 2 * scratch_bytes<P>(packed_a_size<P>(keys, e_)) + scratch_bytes<P>(packed_a_size<P>(keys, c_)) +
           scratch_bytes<P>(packed_b_size<P>(kQueryTile, e_)) + scratch_bytes<P>(packed_b_size<P>(kQueryTile, c_)) +
           scratch_bytes<P>(packed_b_size<P>(e_, kQueryTile)) + scratch_bytes<P>(packed_b_size<P>(c_, kQueryTile)) +
           2 * scratch_bytes<A>(key_tile * panel_columns<P>) + 3 * scratch_bytes<P>(k_steps<P>(tile)) +
           3 * scratch_bytes<A>(kQueryTile);
  }

  Operands take_operands(Scratch& scratch) const {
    const std::int64_t keys = largest_key_group();
    const std::int64_t key_tile = std::min(kKeyTile, keys);
    const std::int64_t tile = key_tile * kQueryTile;
    Operands o{};
    o.key = scratch.take<P>(packed_a_size<P>(keys, e_));
    o.key_transposed = scratch.take<P>(packed_a_size<P>(keys, e_));
    o.value = scratch.take<P>(packed_a_size<P>(keys, c_));
    o.query = scratch.take<P>(packed_b_size<P>(kQueryTile, e_));
    o.grad = scratch.take<P>(packed_b_size<P>(kQueryTile, c_));
    o.query_transposed = scratch.take<P>(packed_b_size<P>(e_, kQueryTile));
    o.grad_transposed = scratch.take<P>(packed_b_size<P>(c_, kQueryTile));
    o.scores = scratch.take<A>(key_tile * panel_columns<P>);
    o.weight_grads = scratch.take<A>(key_tile * panel_columns<P>);
    o.weights_rows = scratch.take<P>(k_steps<P>(tile));
    o.score_grads_rows = scratch.take<P>(k_steps<P>(tile));
    o.score_grads = scratch.take<P>(k_steps<P>(tile));
    o.logsumexp = scratch.take<A>(kQueryTile);
    o.correction = scratch.take<A>(kQueryTile);
    o.delta = scratch.take<A>(kQueryTile);
    return o;
  }

  Range keys_of(const PositionSchedule& schedule, std::int64_t group) const {
    return part_of(m_, kKeyUnit, group, schedule.key_groups);
  }
  Range queries_of(const PositionSchedule& schedule, std::int64_t group) const {
    return part_of(n_, kLane, group, schedule.query_groups);
  }

  // Calls use(first, count) for nearly equal tiles of at most `largest` of a group's positions.
  template <class Use>
  static void for_each_tile(Range group, std::int64_t unit, std::int64_t largest, const Use& use) {
    const std::int64_t tiles = divide_up(group.size(), largest);
    for (std::int64_t i = 0; i < tiles; ++i) {
      const Range tile = part_of(group.size(), unit, i, tiles);
      use(group.begin + tile.begin, tile.size());
    }
  }

  void add_unit(const PositionSchedule& schedule, const PositionSchedule::Unit& unit, std::int64_t first_sample,
                const A* delta, const A* correction, const Sums& sums, Scratch& scratch) const {
    const std::int64_t sample = first_sample + unit.sample;
    const Range keys = keys_of(schedule, unit.key_group);
    const Range queries = queries_of(schedule, unit.query_group);
    const Operands o = take_operands(scratch);
    pack_keys(sample, keys, o);

    const std::int64_t copy = unit.sample * schedule.replicas + unit.replica;
    A* const query_sums = sums.query + unit.sample * query_sums_size();
    A* const key_sums = sums.key + copy * m_ * padded_columns<P>(e_);
    A* const value_sums = sums.value + copy * m_ * padded_columns<P>(c_);
    PositionSchedule::Started started = schedule.wait(unit);
    for_each_tile(queries, kLane, kQueryTile, [&](std::int64_t first_query, std::int64_t query_count) {
      pack_queries(sample, first_query, query_count, o);
      const std::int64_t position = unit.sample * n_ + first_query;
      std::fill_n(o.delta, padded_columns<P>(query_count), A(0));
      std::fill_n(o.correction, padded_columns<P>(query_count), A(0));
      std::copy_n(delta + position, query_count, o.delta);
      std::copy_n(correction + position, query_count, o.correction);
      bool query_started = started.queries;
      for_each_tile(keys, kKeyUnit, kKeyTile, [&](std::int64_t first_key, std::int64_t key_count) {
        const std::int64_t offset = first_key - keys.begin;
        compute_tile(o, offset, key_count, query_count);
        const auto key_mode = started.keys ? GemmMode::add : GemmMode::store;
        const std::int64_t row_stride = k_steps<P>(padded_columns<P>(query_count));
        tile_gemm<P>(AOperand<P>::strided(o.weights_rows, 1, row_stride), o.grad_transposed,
                     COperand<A>::panels(value_sums + first_key * padded_columns<P>(c_)), key_count, c_,
                     k_steps<P>(query_count), key_mode);
        tile_gemm<P>(AOperand<P>::strided(o.score_grads_rows, 1, row_stride), o.query_transposed,
                     COperand<A>::panels(key_sums + first_key * padded_columns<P>(e_)), key_count, e_,
                     k_steps<P>(query_count), key_mode);
        tile_gemm<P>(AOperand<P>::packed(o.key_transposed + e_ * k_steps<P>(offset)), o.score_grads,
                     COperand<A>::panels(query_sums + first_query * e_), e_, query_count, k_steps<P>(key_count),
                     query_started ? GemmMode::add : GemmMode::store);
        query_started = true;
      });
      started.keys = true;
    });
  }

  void pack_keys(std::int64_t sample, Range keys, const Operands& o) const {
    const T* const key = arguments_.key + sample * e_ * m_ + keys.begin;
    pack_a_from_steps<P>(o.key, key, m_, keys.size(), e_);
    pack_a_from_steps<P>(o.value, arguments_.value + sample * c_ * m_ + keys.begin, m_, keys.size(), c_);
    for_each_tile({0, keys.size()}, kKeyUnit, kKeyTile, [&](std::int64_t first, std::int64_t count) {
      pack_a_from_rows<P>(o.key_transposed + e_ * k_steps<P>(first), key + first, m_, e_, count);
    });
  }

  void pack_queries(std::int64_t sample, std::int64_t first, std::int64_t count, const Operands& o) const {
    const T* const query = arguments_.query + sample * e_ * n_ + first;
    const T* const grad = arguments_.grad_output + sample * c_ * n_ + first;
    pack_b_from_steps<P>(o.query, query, n_, count, e_);
    pack_b_from_steps<P>(o.grad, grad, n_, count, c_);
    pack_b_from_columns<P>(o.query_transposed, query, n_, e_, count);
    pack_b_from_columns<P>(o.grad_transposed, grad, n_, c_, count);
    // exp(score - inf) = 0: the lanes of padding weigh nothing
    std::fill_n(o.logsumexp, padded_columns<P>(count), std::numeric_limits<A>::infinity());
    std::copy_n(arguments_.logsumexp + sample * n_ + first, count, o.logsumexp);
  }

  // Weights and score gradients of the keys from `offset` in the unit's group, in the layouts the products need.
  void compute_tile(const Operands& o, std::int64_t offset, std::int64_t keys, std::int64_t queries) const {
    const std::int64_t columns = padded_columns<P>(queries);
    for (std::int64_t column = 0; column < queries; column += panel_columns<P>) {
      const std::int64_t width = panel_width<P>(queries, column);
      tile_gemm<P>(AOperand<P>::packed(o.key + offset * k_steps<P>(e_)), o.query + column * k_steps<P>(e_),
                   COperand<A>::panels(o.scores), keys, width, k_steps<P>(e_), GemmMode::store);
      tile_gemm<P>(AOperand<P>::packed(o.value + offset * k_steps<P>(c_)), o.grad + column * k_steps<P>(c_),
                   COperand<A>::panels(o.weight_grads), keys, width, k_steps<P>(c_), GemmMode::store);
      P* const score_grads = o.score_grads + column * k_steps<P>(keys);
      const V scale = broadcast<V>(arguments_.scale);
      for (std::int64_t row = 0; row < keys; ++row) {
        for (std::int64_t i = 0; i < width; i += kLane) {
          const std::int64_t at = row * width + i;
          const V weight = exp(fma(load<V>(o.scores + at), scale, -load<V>(o.logsumexp + column + i)) -
                               load<V>(o.correction + column + i));
          const V score_grad = weight * fma(load<V>(o.weight_grads + at), scale, -load<V>(o.delta + column + i));
          const std::int64_t row_at = row * columns + column + i;
          if constexpr (kIsPair<P>) {
            narrow<kLane>(reinterpret_cast<T*>(o.weights_rows) + row_at, weight);
            narrow<kLane>(reinterpret_cast<T*>(o.score_grads_rows) + row_at, score_grad);
            store(o.weight_grads + at, score_grad);
          } else {
            store(o.weights_rows + row_at, weight);
            store(o.score_grads_rows + row_at, score_grad);
            store(score_grads + at, score_grad);
          }
        }
      }
      if constexpr (kIsPair<P>) {
        pack_b_from_panels<P>(score_grads, o.weight_grads, keys, width);
      }
    }
  }

  // Rounds a group's sums to T: first the key groups, then the query groups.
  void store_gradients(const PositionSchedule& schedule, std::int64_t first_sample, std::int64_t sample,
                       std::int64_t group, const Sums& sums) const {
    const std::int64_t target = first_sample + sample;
    if (group < schedule.key_groups) {
      for_each_tile(keys_of(schedule, group), kKeyUnit, kKeyTile, [&](std::int64_t first, std::int64_t count) {
        store_key_tile(schedule, arguments_.grad_key + target * e_ * m_, sums.key, sample, first, count, e_);
        store_key_tile(schedule, arguments_.grad_value + target * c_ * m_, sums.value, sample, first, count, c_);
      });
      return;
    }
    for_each_tile(queries_of(schedule, group - schedule.key_groups), kLane, kQueryTile,
                  [&](std::int64_t first, std::int64_t count) {
                    store_panels(arguments_.grad_query + target * e_ * n_ + first, n_,
                                 sums.query + sample * query_sums_size() + first * e_, e_, count);
                  });
  }

  void store_key_tile(const PositionSchedule& schedule, T* target, A* sums, std::int64_t sample, std::int64_t first,
                      std::int64_t count, std::int64_t channels) const {
    const std::int64_t copy_size = m_ * padded_columns<P>(channels);
    A* const total = sums + sample * schedule.replicas * copy_size + first * padded_columns<P>(channels);
    for (std::int64_t replica = 1; replica < schedule.replicas; ++replica) {
      const A* const other = total + replica * copy_size;
      for (std::int64_t i = 0; i < count * padded_columns<P>(channels); ++i) {
        total[i] += other[i];
      }
    }
    store_panels_transposed(target + first, m_, total, count, channels);
  }

  PositionBackwardArguments<T> arguments_;
  std::int64_t e_, c_, n_, m_;
};

}  // namespace segattn::cpu
