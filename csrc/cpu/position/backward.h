// Position attention, backward. With P the attention weights, computed again from the logsumexp,
//   grad_value = grad_output P,  D_i = sum_c grad_output_ci output_ci,  dS^T = P^T * (value^T grad_output - D) * scale,
//   grad_query = key dS^T,       grad_key = query dS:
// three products over E and two over C. Tiles are transposed as in the forward pass (rows are keys, lanes are queries);
// packed_operands.h lists the products' operands.
//
// A unit packs what it needs. Small maps (kSharedLimit) are packed once for all units instead: their units are so small
// that packing for each was an eighth of the time (1024 positions, bfloat16).
//
// An error of D is the same for all keys of a query, so it does not average out in grad_query (docs/decisions.md).
// Therefore D comes
//   where one tile has all keys: from the tile's own P and dP;
//   else, for 16-bit types: from the output and output_low, what rounding took from it;
//   else, for float32: from the output. The sum of dS over the keys, 0 but for errors of D, is taken off afterwards
//   with the query's mean key, sum_j P_ij key_j.
// float64 takes D from the output alone: its errors are far below what any use of it resolves.
//
// The logsumexp is stored rounded: where it is large, exp(score - logsumexp) would be off by eps * logsumexp / 2, which
// a nearly one-hot softmax shows (eager divides by the sum, so its error cancels). There the sum of the weights is
// computed once more and its logarithm, a number near 0, is taken off too.
//
// backward_schedule.h says which tiles a unit has and why the sums need no atomics.
#pragma once

#include <cmath>
#include <limits>

#include "checks/position.h"
#include "cpu/common/exp.h"
#include "cpu/common/parallel.h"
#include "cpu/position/backward_schedule.h"
#include "cpu/position/packed_operands.h"

namespace segattn::cpu {

template <class T>
struct PositionBackwardArguments {
  const T* grad_output;               // (B, C, N)
  const T* query;                     // (B, E, N)
  const T* key;                       // (B, E, M)
  const T* value;                     // (B, C, M)
  const T* output;                    // (B, C, N)
  const T* output_low;                // (B, C, N), what rounding took from the output; null: unknown
  const AccumulatorOf<T>* logsumexp;  // (B, N)
  T* grad_query;                      // (B, E, N)
  T* grad_key;                        // (B, E, M)
  T* grad_value;                      // (B, C, M)
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
  // Samples are worked on together up to this many elements, to bound the memory for large batches.
  static constexpr std::int64_t kSumsLimit = std::int64_t{1} << 23;
  // A sample whose packed operands are this many elements at most (8 MB of float; C = 512, E = 64: 1170 positions) is
  // packed once.
  static constexpr std::int64_t kSharedLimit = std::int64_t{1} << 21;
  // Whether the sum of dS is taken off grad_query with the mean keys.
  static constexpr bool kCentres = std::is_same_v<T, float>;
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
    const PositionSchedule one(1, n_, m_, shares_operands());
    const std::int64_t sample_size = (keeps_query_sums(one) ? kQuerySums * query_sums_size() : 0) +
        one.replicas * key_sums_size() + (shares_operands() ? operands_size() : 0);
    const std::int64_t together = std::clamp<std::int64_t>(kSumsLimit / sample_size, 1, batch);
    for (std::int64_t first = 0; first < batch; first += together) {
      run_samples(first, std::min(together, batch - first));
    }
  }

 private:
  // What the units of some samples share. Sums are in accumulator precision: grad_query in panels of tiles of columns,
  // grad_key and grad_value transposed, in panels of tiles of keys: what belongs to position i starts at element
  // i * channels of its sample (and replica).
  struct Shared {
    std::int64_t first_sample;
    A *delta, *correction;  // (samples, N), from a query group's first unit on
    A* query_sums;          // null where a query group has one unit, like the next
    A* mean_keys;           // sum_j P_ij key_j, laid out like query_sums
    A* grad_sum;            // (samples, N), sum_j dS_ij
    A *key_sums, *value_sums;
    P* operands;  // null where every unit packs its own
  };

  // A unit's memory.
  struct Workspace {
    KeyOperands<T> keys;
    QueryOperands<T> queries;            // of one tile
    A *scores, *weight_grads;            // one column panel of a tile
    P *weights_rows, *score_grads_rows;  // tile, row-major: strided A
    P* score_grads;                      // tile in panels: B
    A *logsumexp, *correction, *delta;   // of one tile of queries
    A *query_sums, *mean_keys;           // of one tile, over the unit's keys
    A* grad_sum;                         // of one tile of queries
    P* correction_keys;                  // a tile of keys
    A* correction_scores;                // tile, row-major
  };

  // grad_query and, to centre it, the mean keys.
  static constexpr std::int64_t kQuerySums = kCentres ? 2 : 1;
  std::int64_t query_sums_size() const { return panels_size<P>(e_, n_); }
  std::int64_t key_sums_size() const { return m_ * (padded_columns<P>(e_) + padded_columns<P>(c_)); }
  std::int64_t operands_size() const { return KeyOperands<T>::size(m_, e_, c_) + QueryOperands<T>::size(n_, e_, c_); }
  bool shares_operands() const { return operands_size() <= kSharedLimit; }
  // All keys are in every tile, which then has what D is the sum of: D_i = sum_j P_ij (value^T grad_output)_ji.
  bool has_one_key_tile() const {
    static_assert(PositionSchedule::kOneGroup <= kKeyTile);
    return m_ <= PositionSchedule::kOneGroup;
  }
  // A query group that meets one key group has its gradient finished, and stored, by one unit.
  static bool keeps_query_sums(const PositionSchedule& schedule) { return schedule.key_groups > 1; }

  void run_samples(std::int64_t first_sample, std::int64_t samples) const {
    const PositionSchedule schedule(samples, n_, m_, shares_operands());
    const std::int64_t copies = samples * schedule.replicas;
    const std::int64_t query_sums = keeps_query_sums(schedule) ? samples * query_sums_size() : 0;
    const Buffer<A> memory(3 * samples * n_ + kQuerySums * query_sums + copies * key_sums_size());
    A* const shared_query_sums = memory.data() + 3 * samples * n_;
    A* const key_sums = shared_query_sums + kQuerySums * query_sums;
    const Buffer<P> operands(shares_operands() ? samples * operands_size() : 0);
    const Shared shared{
        first_sample,
        memory.data(),
        memory.data() + samples * n_,
        keeps_query_sums(schedule) ? shared_query_sums : nullptr,
        shared_query_sums + (kQuerySums - 1) * query_sums,
        memory.data() + 2 * samples * n_,
        key_sums,
        key_sums + copies * m_ * padded_columns<P>(e_),
        shares_operands() ? operands.data() : nullptr};
    if (shares_operands()) {
      const std::int64_t groups = schedule.key_groups + schedule.query_groups;
      parallel_units(samples * groups, 0, [&](std::int64_t index, Scratch&) {
        pack_group(schedule, shared, index / groups, index % groups);
      });
    }
    parallel_units(schedule.units(), unit_scratch(), [&](std::int64_t index, Scratch& scratch) {
      const PositionSchedule::Unit unit = schedule.unit(index);
      if (!unit.idle) {
        add_unit(schedule, unit, shared, scratch);
        schedule.finish(unit);
      }
    });
    if (schedule.replicas > 1) {
      parallel_units(samples * schedule.key_groups, 0, [&](std::int64_t index, Scratch&) {
        store_key_group(schedule, shared, index / schedule.key_groups, index % schedule.key_groups);
      });
    }
  }

  KeyOperands<T> shared_keys(const Shared& shared, std::int64_t sample) const {
    return KeyOperands<T>::in(shared.operands + sample * operands_size(), m_, e_, c_);
  }
  QueryOperands<T> shared_queries(const Shared& shared, std::int64_t sample) const {
    return QueryOperands<T>::in(
        shared.operands + sample * operands_size() + KeyOperands<T>::size(m_, e_, c_), n_, e_, c_);
  }

  // Packs the operands of a group for all units: first the key groups, then the query groups.
  void pack_group(
      const PositionSchedule& schedule, const Shared& shared, std::int64_t sample, std::int64_t group) const {
    if (group < schedule.key_groups) {
      const KeyOperands<T> operands = shared_keys(shared, sample);
      for_each_tile(keys_of(schedule, group), kKeyUnit, kKeyTile, [&](std::int64_t first, std::int64_t count) {
        pack_keys(shared.first_sample + sample, first, count, operands.from(first, e_, c_));
      });
      return;
    }
    const QueryOperands<T> operands = shared_queries(shared, sample);
    for_each_tile(
        queries_of(schedule, group - schedule.key_groups), kLane, kQueryTile,
        [&](std::int64_t first, std::int64_t count) {
          pack_queries(shared.first_sample + sample, first, count, operands.from(first, e_, c_));
        });
  }

  void pack_keys(std::int64_t sample, std::int64_t first, std::int64_t count, const KeyOperands<T>& target) const {
    target.pack(
        arguments_.key + sample * e_ * m_ + first, arguments_.value + sample * c_ * m_ + first, m_, count, e_, c_);
  }

  void pack_queries(std::int64_t sample, std::int64_t first, std::int64_t count, const QueryOperands<T>& target) const {
    target.pack(
        arguments_.query + sample * e_ * n_ + first, arguments_.grad_output + sample * c_ * n_ + first, n_, count, e_,
        c_);
  }

  // The output as it was before rounding, as far as that is known.
  V output_at(std::int64_t offset, std::int64_t count) const {
    const V output = read_vector(arguments_.output + offset, count);
    return arguments_.output_low == nullptr ? output : output + read_vector(arguments_.output_low + offset, count);
  }

  // delta = scale * sum over channels of grad_output * output, (N) from query `first` on
  void compute_delta(std::int64_t sample, std::int64_t first, std::int64_t count, A* delta) const {
    const V scale = broadcast<V>(arguments_.scale);
    for (std::int64_t i = 0; i < count; i += kLane) {
      const std::int64_t present = std::min(kLane, count - i);
      std::int64_t offset = sample * c_ * n_ + first + i;
      V sum{};
      if (present == kLane) {
        for (std::int64_t c = 0; c < c_; ++c, offset += n_) {
          sum = fma(widen<kLane>(arguments_.grad_output + offset), output_at(offset, kLane), sum);
        }
        store(delta + i, sum * scale);
      } else {
        for (std::int64_t c = 0; c < c_; ++c, offset += n_) {
          sum = fma(widen_partial<kLane>(arguments_.grad_output + offset, present), output_at(offset, present), sum);
        }
        store_partial(delta + i, sum * scale, present);
      }
    }
  }

  // w.correction = log(sum over keys of exp(score - logsumexp)) where the logsumexp is large, else 0, of a tile's
  // queries, which are packed in w.
  void compute_correction(std::int64_t sample, std::int64_t count, const Workspace& w) const {
    const std::int64_t columns = padded_columns<P>(count);
    std::fill_n(w.correction, columns, A(0));
    const auto is_large = [](A value) { return std::abs(value) > kLargeLogsumexp && std::isfinite(value); };
    if (std::none_of(w.logsumexp, w.logsumexp + count, is_large)) {
      return;
    }
    for (std::int64_t first_key = 0; first_key < m_; first_key += kKeyTile) {
      const std::int64_t keys = std::min(kKeyTile, m_ - first_key);
      pack_a_from_steps<P>(w.correction_keys, arguments_.key + sample * e_ * m_ + first_key, m_, keys, e_);
      tile_gemm<P>(
          AOperand<P>::packed(w.correction_keys), w.queries.query, COperand<A>::row_major(w.correction_scores, columns),
          keys, count, k_steps<P>(e_), GemmMode::kStore);
      for (std::int64_t row = 0; row < keys; ++row) {
        for (std::int64_t i = 0; i < columns; i += kLane) {
          const V score = load<V>(w.correction_scores + row * columns + i);
          store(
              w.correction + i,
              load<V>(w.correction + i) + exp(fma(score, broadcast<V>(arguments_.scale), -load<V>(w.logsumexp + i))));
        }
      }
    }
    for (std::int64_t i = 0; i < columns; ++i) {
      w.correction[i] = std::isfinite(w.logsumexp[i]) ? std::log(w.correction[i]) : A(0);
    }
  }

  std::int64_t largest_key_group() const {
    return std::min(round_up(m_, kKeyUnit), PositionSchedule::kGroup + kKeyUnit);
  }
  std::int64_t largest_query_tile() const { return std::min(kQueryTile, padded_columns<P>(n_)); }

  std::size_t unit_scratch() const {
    const std::int64_t keys = largest_key_group();
    const std::int64_t queries = largest_query_tile();
    const std::int64_t key_tile = std::min(kKeyTile, keys);
    const std::size_t own = shares_operands() ? 0
                                              : scratch_bytes<P>(KeyOperands<T>::size(keys, e_, c_)) +
            scratch_bytes<P>(QueryOperands<T>::size(queries, e_, c_));
    return own + 2 * scratch_bytes<A>(key_tile * panel_columns<P>) +
        3 * scratch_bytes<P>(k_steps<P>(key_tile * queries)) + 4 * scratch_bytes<A>(queries) +
        kQuerySums * scratch_bytes<A>(e_ * queries) + scratch_bytes<P>(packed_a_size<P>(kKeyTile, e_)) +
        scratch_bytes<A>(kKeyTile * queries);
  }

  Workspace take_workspace(Scratch& scratch) const {
    const std::int64_t keys = largest_key_group();
    const std::int64_t queries = largest_query_tile();
    const std::int64_t key_tile = std::min(kKeyTile, keys);
    Workspace w{};
    if (!shares_operands()) {
      w.keys = KeyOperands<T>::in(scratch.take<P>(KeyOperands<T>::size(keys, e_, c_)), keys, e_, c_);
      w.queries = QueryOperands<T>::in(scratch.take<P>(QueryOperands<T>::size(queries, e_, c_)), queries, e_, c_);
    }
    w.scores = scratch.take<A>(key_tile * panel_columns<P>);
    w.weight_grads = scratch.take<A>(key_tile * panel_columns<P>);
    w.weights_rows = scratch.take<P>(k_steps<P>(key_tile * queries));
    w.score_grads_rows = scratch.take<P>(k_steps<P>(key_tile * queries));
    w.score_grads = scratch.take<P>(k_steps<P>(key_tile * queries));
    w.logsumexp = scratch.take<A>(queries);
    w.correction = scratch.take<A>(queries);
    w.delta = scratch.take<A>(queries);
    w.grad_sum = scratch.take<A>(queries);
    w.query_sums = scratch.take<A>(e_ * queries);
    if constexpr (kCentres) {
      w.mean_keys = scratch.take<A>(e_ * queries);
    }
    w.correction_keys = scratch.take<P>(packed_a_size<P>(kKeyTile, e_));
    w.correction_scores = scratch.take<A>(kKeyTile * queries);
    return w;
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

  void add_unit(
      const PositionSchedule& schedule, const PositionSchedule::Unit& unit, const Shared& shared,
      Scratch& scratch) const {
    const std::int64_t sample = shared.first_sample + unit.sample;
    const Range keys = keys_of(schedule, unit.key_group);
    const Range queries = queries_of(schedule, unit.query_group);
    Workspace w = take_workspace(scratch);
    if (shares_operands()) {
      w.keys = shared_keys(shared, unit.sample).from(keys.begin, e_, c_);
    } else {
      for_each_tile({0, keys.size()}, kKeyUnit, kKeyTile, [&](std::int64_t first, std::int64_t count) {
        pack_keys(sample, keys.begin + first, count, w.keys.from(first, e_, c_));
      });
    }
    const QueryOperands<T> own_queries = w.queries;
    const std::int64_t copy = unit.sample * schedule.replicas + unit.replica;
    A* const key_sums = shared.key_sums + copy * m_ * padded_columns<P>(e_);
    A* const value_sums = shared.value_sums + copy * m_ * padded_columns<P>(c_);
    const PositionSchedule::Place place = schedule.wait(unit);
    bool keys_started = !place.first_of_keys;
    for_each_tile(queries, kLane, kQueryTile, [&](std::int64_t first_query, std::int64_t query_count) {
      if (shares_operands()) {
        w.queries = shared_queries(shared, unit.sample).from(first_query, e_, c_);
      } else {
        w.queries = own_queries;
        pack_queries(sample, first_query, query_count, w.queries);
      }
      const bool delta_from_tile = has_one_key_tile();
      take_statistics(shared, unit.sample, first_query, query_count, place.first_of_queries, !delta_from_tile, w);
      // One tile's own D leaves nothing common to its keys.
      const bool centres = kCentres && !delta_from_tile;
      bool query_started = false;
      for_each_tile(keys, kKeyUnit, kKeyTile, [&](std::int64_t first_key, std::int64_t key_count) {
        const KeyOperands<T> tile_keys = w.keys.from(first_key - keys.begin, e_, c_);
        const auto query_mode = query_started ? GemmMode::kAdd : GemmMode::kStore;
        compute_tile(
            w, tile_keys, key_count, query_count, delta_from_tile, centres ? w.mean_keys : nullptr, query_mode);
        const auto key_mode = keys_started ? GemmMode::kAdd : GemmMode::kStore;
        const std::int64_t row_stride = k_steps<P>(padded_columns<P>(query_count));
        tile_gemm<P>(
            AOperand<P>::strided(w.weights_rows, 1, row_stride), w.queries.grad_transposed,
            COperand<A>::panels(value_sums + first_key * padded_columns<P>(c_)), key_count, c_, k_steps<P>(query_count),
            key_mode);
        tile_gemm<P>(
            AOperand<P>::strided(w.score_grads_rows, 1, row_stride), w.queries.query_transposed,
            COperand<A>::panels(key_sums + first_key * padded_columns<P>(e_)), key_count, e_, k_steps<P>(query_count),
            key_mode);
        tile_gemm<P>(
            AOperand<P>::packed(tile_keys.key_transposed), w.score_grads, COperand<A>::panels(w.query_sums), e_,
            query_count, k_steps<P>(key_count), query_mode);
        query_started = true;
      });
      // A group's sums first, then the groups': the rounding of large partial sums, in which dS is of either sign, is
      // that of the number of additions.
      if (shared.query_sums != nullptr) {
        const std::int64_t first_sum = unit.sample * query_sums_size() + first_query * e_;
        const std::int64_t size = e_ * padded_columns<P>(query_count);
        join(w.query_sums, shared.query_sums + first_sum, size, place.first_of_queries);
        if (centres) {
          join(w.mean_keys, shared.mean_keys + first_sum, size, place.first_of_queries);
          join(w.grad_sum, shared.grad_sum + unit.sample * n_ + first_query, query_count, place.first_of_queries);
        }
      }
      keys_started = true;
      if (place.last_of_queries) {
        if (centres) {
          centre(w.query_sums, w.mean_keys, w.grad_sum, query_count);
        }
        store_panels(arguments_.grad_query + sample * e_ * n_ + first_query, n_, w.query_sums, e_, query_count);
      }
    });
    if (place.last_of_keys && schedule.replicas == 1) {
      store_key_group(schedule, shared, unit.sample, unit.key_group);
    }
  }

  // Logsumexp, delta and correction of a tile of queries, padded; the query group's first unit computes the last two.
  // grad_sum is zero.
  void take_statistics(
      const Shared& shared, std::int64_t sample, std::int64_t first, std::int64_t count, bool first_unit,
      bool with_delta, const Workspace& w) const {
    A* const delta = shared.delta + sample * n_ + first;
    A* const correction = shared.correction + sample * n_ + first;
    const std::int64_t columns = padded_columns<P>(count);
    // exp(score - inf) = 0: the lanes of padding weigh nothing
    std::fill_n(w.logsumexp, columns, std::numeric_limits<A>::infinity());
    std::copy_n(arguments_.logsumexp + (shared.first_sample + sample) * n_ + first, count, w.logsumexp);
    if (first_unit) {
      if (with_delta) {
        compute_delta(shared.first_sample + sample, first, count, delta);
      }
      compute_correction(shared.first_sample + sample, count, w);
      std::copy_n(w.correction, count, correction);
    } else {
      std::fill_n(w.correction, columns, A(0));
      std::copy_n(correction, count, w.correction);
    }
    if (with_delta) {
      std::fill_n(w.delta, columns, A(0));
      std::copy_n(delta, count, w.delta);
    }
    std::fill_n(w.grad_sum, columns, A(0));
  }

  // Weights and score gradients of a tile, in the layouts the products need; delta_from_tile: w.delta as well. With
  // mean_keys (panels of E x queries) the tile's part of it, and w.grad_sum.
  void compute_tile(
      const Workspace& w, const KeyOperands<T>& operands, std::int64_t keys, std::int64_t queries, bool delta_from_tile,
      A* mean_keys, GemmMode mean_mode) const {
    const std::int64_t columns = padded_columns<P>(queries);
    for (std::int64_t column = 0; column < queries; column += panel_columns<P>) {
      const std::int64_t width = panel_width<P>(queries, column);
      tile_gemm<P>(
          AOperand<P>::packed(operands.key), w.queries.query + column * k_steps<P>(e_), COperand<A>::panels(w.scores),
          keys, width, k_steps<P>(e_), GemmMode::kStore);
      tile_gemm<P>(
          AOperand<P>::packed(operands.value), w.queries.grad + column * k_steps<P>(c_),
          COperand<A>::panels(w.weight_grads), keys, width, k_steps<P>(c_), GemmMode::kStore);
      P* const score_grads = w.score_grads + column * k_steps<P>(keys);
      const V scale = broadcast<V>(arguments_.scale);
      for (std::int64_t row = 0; row < keys; ++row) {
        for (std::int64_t i = 0; i < width; i += kLane) {
          A* const score = w.scores + row * width + i;
          store(
              score,
              exp(fma(load<V>(score), scale, -load<V>(w.logsumexp + column + i)) - load<V>(w.correction + column + i)));
        }
      }
      if (delta_from_tile) {
        sum_delta(w.scores, w.weight_grads, keys, width, w.delta + column);
      }
      if constexpr (kCentres) {
        if (mean_keys != nullptr) {
          tile_gemm<P>(
              AOperand<P>::packed(operands.key_transposed), w.scores, COperand<A>::panels(mean_keys + column * e_), e_,
              width, k_steps<P>(keys), mean_mode);
        }
      }
      for (std::int64_t row = 0; row < keys; ++row) {
        for (std::int64_t i = 0; i < width; i += kLane) {
          const std::int64_t at = row * width + i;
          const V weight = load<V>(w.scores + at);
          const V score_grad = weight * fma(load<V>(w.weight_grads + at), scale, -load<V>(w.delta + column + i));
          const std::int64_t row_at = row * columns + column + i;
          if constexpr (kIsPair<P>) {
            narrow<kLane>(reinterpret_cast<T*>(w.weights_rows) + row_at, weight);
            narrow<kLane>(reinterpret_cast<T*>(w.score_grads_rows) + row_at, score_grad);
            store(w.weight_grads + at, score_grad);
          } else {
            store(w.weights_rows + row_at, weight);
            store(w.score_grads_rows + row_at, score_grad);
            store(score_grads + at, score_grad);
          }
        }
      }
      if constexpr (kIsPair<P>) {
        pack_b_from_panels<P>(score_grads, w.weight_grads, keys, width);
        if (queries % 2 != 0 && column + width > queries) {
          clear_padding_query(w, keys, queries, columns);
        }
      }
      if constexpr (kCentres) {
        if (mean_keys != nullptr) {
          add_rows(score_grads, keys, width, w.grad_sum + column);
        }
      }
    }
  }

  // The second query of an odd last pair, over which the products sum: its weights are 0, but NaN for a key of -inf.
  static void clear_padding_query(const Workspace& w, std::int64_t keys, std::int64_t queries, std::int64_t columns) {
    for (std::int64_t row = 0; row < keys; ++row) {
      reinterpret_cast<T*>(w.weights_rows)[row * columns + queries] = T{};
      reinterpret_cast<T*>(w.score_grads_rows)[row * columns + queries] = T{};
    }
  }

  // delta = scale * mean of weight_grads by weights, over the rows of one column panel of `width`. The weights' sum is 1
  // but for the rounding of the logsumexp, which would leave a sum of score gradients. float32 takes the mean off
  // weight_grads, and delta is of what is left: rounding the whole mean would leave as much.
  void sum_delta(const A* weights, A* weight_grads, std::int64_t rows, std::int64_t width, A* delta) const {
    for (std::int64_t i = 0; i < width; i += kLane) {
      V sum{}, total{};
      for (std::int64_t row = 0; row < rows; ++row) {
        const V weight = load<V>(weights + row * width + i);
        sum = fma(weight, load<V>(weight_grads + row * width + i), sum);
        total += weight;
      }
      const auto mean_of = [&](V weighted) { return select(total > V{}, weighted / total, V{}); };
      V mean = mean_of(sum);
      if constexpr (kCentres) {
        V rest{};
        for (std::int64_t row = 0; row < rows; ++row) {
          A* const grad = weight_grads + row * width + i;
          const V centred = load<V>(grad) - mean;
          store(grad, centred);
          rest = fma(load<V>(weights + row * width + i), centred, rest);
        }
        mean = mean_of(rest);
      }
      store(delta + i, mean * broadcast<V>(arguments_.scale));
    }
  }

  // sums += the rows of one column panel of `width`
  static void add_rows(const A* panel, std::int64_t rows, std::int64_t width, A* sums) {
    for (std::int64_t i = 0; i < width; i += kLane) {
      V sum = load<V>(sums + i);
      for (std::int64_t row = 0; row < rows; ++row) {
        sum += load<V>(panel + row * width + i);
      }
      store(sums + i, sum);
    }
  }

  // own (+)= shared, unless it is the first share; shared = own
  static void join(A* own, A* shared, std::int64_t size, bool first) {
    for (std::int64_t i = 0; i < size; ++i) {
      own[i] = shared[i] = first ? own[i] : own[i] + shared[i];
    }
  }

  // query_sums -= mean_keys * grad_sum, panels of E x queries
  void centre(A* query_sums, const A* mean_keys, const A* grad_sum, std::int64_t queries) const {
    for (std::int64_t first = 0; first < queries; first += panel_columns<P>) {
      const std::int64_t width = panel_width<P>(queries, first);
      for (std::int64_t row = 0; row < e_; ++row) {
        for (std::int64_t i = 0; i < width; i += kLane) {
          const std::int64_t at = first * e_ + row * width + i;
          store(query_sums + at, load<V>(query_sums + at) - load<V>(mean_keys + at) * load<V>(grad_sum + first + i));
        }
      }
    }
  }

  // Adds up the replicas' sums of a key group and rounds them to T.
  void store_key_group(
      const PositionSchedule& schedule, const Shared& shared, std::int64_t sample, std::int64_t group) const {
    const std::int64_t target = shared.first_sample + sample;
    for_each_tile(keys_of(schedule, group), kKeyUnit, kKeyTile, [&](std::int64_t first, std::int64_t count) {
      store_key_tile(schedule, arguments_.grad_key + target * e_ * m_, shared.key_sums, sample, first, count, e_);
      store_key_tile(schedule, arguments_.grad_value + target * c_ * m_, shared.value_sums, sample, first, count, c_);
    });
  }

  void store_key_tile(
      const PositionSchedule& schedule, T* target, A* sums, std::int64_t sample, std::int64_t first, std::int64_t count,
      std::int64_t channels) const {
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
