// Position attention, backward. With S = query^T key, the weights P, recomputed from the logsumexp, and delta D:
//   grad_value = grad_output P,  D_i = sum_c grad_output_ci output_ci,  dS^T = P^T * (value^T grad_output - D) * scale,
//   grad_query = key dS^T,       grad_key = query dS:
// three products over E and two over C. backward_tile.h computes one tile of P^T and dS^T, packed_operands.h lists the
// products' operands, and backward_schedule.h cuts the work into units and needs no atomic sums.
//
// A unit packs its operands, unless a sample is small (kSharedLimit): then they are packed once for all units. Units of
// small feature maps are so small that packing in each took an eighth of the time (1024 positions, bfloat16).
//
// The gradient of the logsumexp enters as D_i = sum_c grad_output_ci output_ci - grad_logsumexp_i.
//
// An error of D is the same for all keys of a query, so it does not average out in grad_query (docs/decisions.md).
// Where the keys are complete, D is therefore computed
//   * from the tile's own P and dP, where one tile has all keys;
//   * from output + output_low, where output_low is the rounding error of output, for 16-bit types;
//   * from output, for float32. Afterwards s M is subtracted from grad_query, where s is the sum of dS over the keys
//     less scale * grad_logsumexp, 0 except for errors of D, and M = sum_j P_ij key_j is the query's mean key;
//   * from output, for float64, whose rounding error has no effect in practice.
//
// The logsumexp is rounded. Where it is large, exp(energy - logsumexp) has an error of eps * logsumexp / 2, which shows
// in a nearly one-hot softmax (eager divides by the sum, so its error cancels). The forward pass therefore returns its
// rounding error, and the weights are exp((energy - logsumexp) - logsumexp_low).
//
// Logsumexp and output over more keys than those of the call make the sums over its keys other numbers. D then comes
// from the output, or is given, and nothing is corrected.
//
// A gradient that is not wanted takes no product, operand, sum or store. The cut into units does not depend on that, so
// the others are the same to the bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/common/exp.h"
#include "cpu/common/parallel.h"
#include "cpu/common/range.h"
#include "cpu/position/arguments.h"
#include "cpu/position/backward_schedule.h"
#include "cpu/position/backward_tile.h"
#include "cpu/position/packed_operands.h"

namespace segattn::cpu {

template <class T>
class PositionBackward {
  using P = PackedOf<T>;
  using A = AccumulatorOf<T>;
  using V = Vec<A>;
  using Tile = PositionBackwardTile<T>;
  using Unit = PositionSchedule::Unit;
  using UnitOrder = PositionSchedule::UnitOrder;
  static constexpr std::int64_t kLane = kLanes<A>;
  static constexpr std::int64_t kKeyUnit = 16;  // whole row panels and whole BFloat16Pairs
  // Samples are processed together up to this number of elements, which bounds the memory for large batches.
  static constexpr std::int64_t kSumsLimit = std::int64_t{1} << 23;
  // The most elements of the packed operands of a sample that is packed once (8 MB of float; C = 512, E = 64: 1170
  // positions).
  static constexpr std::int64_t kSharedLimit = std::int64_t{1} << 21;

 public:
  explicit PositionBackward(const PositionBackwardArguments<T>& arguments)
      : arguments_(arguments),
        sizes_(arguments.sizes),
        wanted_(arguments.wanted()),
        e_(arguments.sizes.key_channels),
        c_(arguments.sizes.value_channels),
        n_(arguments.sizes.queries),
        m_(arguments.sizes.keys) {}

  void run() const {
    const std::int64_t batch = sizes_.batch;
    if (batch == 0) {
      return;
    }
    if (n_ == 0) {
      // No queries: the gradients of key and value are zero.
      arguments_.grad_key.fill(batch * e_ * m_);
      arguments_.grad_value.fill(batch * c_ * m_);
      return;
    }
    if (m_ == 0) {
      arguments_.grad_query.fill(batch * e_ * n_);
      return;
    }
    // With all gradients and mean keys, so that the cut does not depend on what is wanted.
    const PositionSchedule one(1, n_, m_, packing());
    const std::int64_t sample_size = (keeps_query_sums(one) ? (Tile::kIsFloat ? 2 : 1) * panels_size<P>(e_, n_) : 0) +
        one.replicas * m_ * (padded_columns<P>(e_) + padded_columns<P>(c_)) +
        (shares_operands() ? operands_size(kAllGradients) : 0);
    const std::int64_t together = std::clamp<std::int64_t>(kSumsLimit / sample_size, 1, batch);
    for (std::int64_t first = 0; first < batch; first += together) {
      run_samples(first, std::min(together, batch - first));
    }
  }

 private:
  // Memory that the units of some samples share. Sums are in accumulator precision: grad_query in panels of tiles of
  // columns, grad_key and grad_value transposed, in panels of tiles of keys. The sums of position i start at element
  // i * channels of its sample (and replica). Sums that nothing needs have no memory.
  struct Shared {
    std::int64_t first_sample;
    A* delta;       // (samples, N), written by the first unit of a query group
    A* grad_query;  // of query groups with several units
    A* mean_keys;   // M, laid out like grad_query
    A* grad_sum;    // (samples, N), s
    A *grad_key, *grad_value;
    P* operands;  // where a unit does not pack its own
  };

  // Memory of a unit.
  struct Workspace {
    KeyOperands<T> keys;       // of the unit's keys
    QueryOperands<T> queries;  // of one tile
  };

  static constexpr PositionGradients kAllGradients{true, true, true};

  std::int64_t operands_size(const PositionGradients& wanted) const {
    return KeyOperands<T>::size(m_, sizes_, wanted) + QueryOperands<T>::size(n_, sizes_, wanted);
  }
  bool shares_operands() const { return operands_size(kAllGradients) <= kSharedLimit; }
  OperandPacking packing() const { return shares_operands() ? OperandPacking::kShared : OperandPacking::kPerUnit; }
  DeltaSource delta_source() const {
    static_assert(PositionSchedule::kOneGroup <= Tile::kKeys);
    return arguments_.keys_complete && m_ <= PositionSchedule::kOneGroup ? DeltaSource::kTile : DeltaSource::kOutput;
  }
  // The delta of a tile has no error that is common to its keys.
  bool subtracts_mean_keys() const {
    return Tile::kIsFloat && wanted_.query && arguments_.keys_complete && delta_source() == DeltaSource::kOutput;
  }
  PositionTileWork tile_work() const { return {wanted_, delta_source(), subtracts_mean_keys()}; }
  // With one key group, each query group has one unit, which completes and stores its gradient.
  static bool keeps_query_sums(const PositionSchedule& schedule) { return schedule.key_groups > 1; }

  void run_samples(std::int64_t first_sample, std::int64_t samples) const {
    const PositionSchedule schedule(samples, n_, m_, packing());
    const std::int64_t copies = samples * schedule.replicas;
    const std::int64_t query_sums = keeps_query_sums(schedule) ? samples * panels_size<P>(e_, n_) : 0;
    const Buffer<A> delta(samples * n_), grad_sum(samples * n_);
    const Buffer<A> grad_query(wanted_.query ? query_sums : 0);
    const Buffer<A> mean_keys(subtracts_mean_keys() ? query_sums : 0);
    const Buffer<A> grad_key(wanted_.key ? copies * m_ * padded_columns<P>(e_) : 0);
    const Buffer<A> grad_value(wanted_.value ? copies * m_ * padded_columns<P>(c_) : 0);
    const Buffer<P> operands(shares_operands() ? samples * operands_size(wanted_) : 0);
    const Shared shared{
        .first_sample = first_sample,
        .delta = delta.data(),
        .grad_query = grad_query.data(),
        .mean_keys = mean_keys.data(),
        .grad_sum = grad_sum.data(),
        .grad_key = grad_key.data(),
        .grad_value = grad_value.data(),
        .operands = operands.data()};
    if (shares_operands()) {
      const std::int64_t groups = schedule.key_groups + schedule.query_groups;
      parallel_units(samples * groups, 0, [&](std::int64_t index, Scratch&) {
        pack_group(schedule, shared, index / groups, index % groups);
      });
    }
    parallel_units(schedule.units(), unit_scratch(), [&](std::int64_t index, Scratch& scratch) {
      const Unit unit = schedule.unit(index);
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
    return KeyOperands<T>::in(shared.operands + sample * operands_size(wanted_), m_, sizes_, wanted_);
  }
  QueryOperands<T> shared_queries(const Shared& shared, std::int64_t sample) const {
    return QueryOperands<T>::in(
        shared.operands + sample * operands_size(wanted_) + KeyOperands<T>::size(m_, sizes_, wanted_), n_, sizes_,
        wanted_);
  }

  // Packs the operands of a group for all units. Key groups come first, then query groups.
  void pack_group(
      const PositionSchedule& schedule, const Shared& shared, std::int64_t sample, std::int64_t group) const {
    if (group < schedule.key_groups) {
      const KeyOperands<T> operands = shared_keys(shared, sample);
      for_each_key_tile(keys_of(schedule, group), [&](Range tile) {
        pack_keys(shared.first_sample + sample, tile, operands.from(tile.begin, sizes_));
      });
      return;
    }
    const QueryOperands<T> operands = shared_queries(shared, sample);
    for_each_query_tile(queries_of(schedule, group - schedule.key_groups), [&](Range tile) {
      pack_queries(shared.first_sample + sample, tile, operands.from(tile.begin, sizes_));
    });
  }

  void pack_keys(std::int64_t sample, Range tile, const KeyOperands<T>& target) const {
    target.pack(
        arguments_.key + sample * e_ * m_ + tile.begin, arguments_.value + sample * c_ * m_ + tile.begin, tile.size(),
        sizes_, wanted_);
  }

  void pack_queries(std::int64_t sample, Range tile, const QueryOperands<T>& target) const {
    target.pack(
        arguments_.query + sample * e_ * n_ + tile.begin, arguments_.grad_output + sample * c_ * n_ + tile.begin,
        tile.size(), sizes_, wanted_);
  }

  // The output before rounding, as far as it is known.
  V output_at(std::int64_t offset, std::int64_t count) const {
    const V output = read_vector(arguments_.output + offset, count);
    return arguments_.output_low == nullptr ? output : output + read_vector(arguments_.output_low + offset, count);
  }

  // delta = scale * (sum over channels of grad_output * output - grad_logsumexp), for a tile of queries
  void compute_delta(std::int64_t sample, Range tile, A* delta) const {
    if (arguments_.delta != nullptr) {
      const A* const given = arguments_.delta + sample * n_ + tile.begin;
      std::transform(given, given + tile.size(), delta, [&](A value) { return value * arguments_.scale; });
      return;
    }
    const V scale = broadcast<V>(arguments_.scale);
    const A* const grad_logsumexp =
        arguments_.grad_logsumexp == nullptr ? nullptr : arguments_.grad_logsumexp + sample * n_ + tile.begin;
    const auto minus_grad_logsumexp = [&](V sum, std::int64_t i, std::int64_t count) {
      return grad_logsumexp == nullptr ? sum : sum - read_vector(grad_logsumexp + i, count);
    };
    for (std::int64_t i = 0; i < tile.size(); i += kLane) {
      const std::int64_t count = std::min(kLane, tile.size() - i);
      std::int64_t offset = sample * c_ * n_ + tile.begin + i;
      V sum{};
      if (count == kLane) {
        for (std::int64_t c = 0; c < c_; ++c, offset += n_) {
          sum = fma(widen<kLane>(arguments_.grad_output + offset), output_at(offset, kLane), sum);
        }
        store(delta + i, minus_grad_logsumexp(sum, i, count) * scale);
      } else {
        for (std::int64_t c = 0; c < c_; ++c, offset += n_) {
          sum = fma(widen_partial<kLane>(arguments_.grad_output + offset, count), output_at(offset, count), sum);
        }
        store_partial(delta + i, minus_grad_logsumexp(sum, i, count) * scale, count);
      }
    }
  }

  std::int64_t largest_key_group() const {
    return std::min(round_up(m_, kKeyUnit), PositionSchedule::kGroup + kKeyUnit);
  }
  std::int64_t largest_key_tile() const { return std::min(Tile::kKeys, largest_key_group()); }
  std::int64_t largest_query_tile() const { return std::min(Tile::kQueries, padded_columns<P>(n_)); }

  std::size_t unit_scratch() const {
    const std::int64_t keys = largest_key_group();
    const std::int64_t queries = largest_query_tile();
    const std::size_t operands = shares_operands() ? 0
                                                   : scratch_bytes<P>(KeyOperands<T>::size(keys, sizes_, wanted_)) +
            scratch_bytes<P>(QueryOperands<T>::size(queries, sizes_, wanted_));
    return operands + Tile::scratch(sizes_, tile_work(), largest_key_tile(), queries);
  }

  Workspace take_workspace(Scratch& scratch) const {
    const std::int64_t keys = largest_key_group();
    const std::int64_t queries = largest_query_tile();
    Workspace w{};
    if (!shares_operands()) {
      w.keys = KeyOperands<T>::in(scratch.take<P>(KeyOperands<T>::size(keys, sizes_, wanted_)), keys, sizes_, wanted_);
      w.queries = QueryOperands<T>::in(
          scratch.take<P>(QueryOperands<T>::size(queries, sizes_, wanted_)), queries, sizes_, wanted_);
    }
    return w;
  }

  Range keys_of(const PositionSchedule& schedule, std::int64_t group) const {
    return part_of(m_, kKeyUnit, group, schedule.key_groups);
  }
  Range queries_of(const PositionSchedule& schedule, std::int64_t group) const {
    return part_of(n_, kLane, group, schedule.query_groups);
  }

  // Calls use(tile) for nearly equal tiles of a group, of at most `largest` positions.
  template <class Use>
  static void for_each_tile(Range group, std::int64_t unit, std::int64_t largest, const Use& use) {
    const std::int64_t tiles = ceil_div(group.size(), largest);
    for (std::int64_t i = 0; i < tiles; ++i) {
      const Range tile = part_of(group.size(), unit, i, tiles);
      use(Range{group.begin + tile.begin, group.begin + tile.end});
    }
  }
  template <class Use>
  static void for_each_key_tile(Range group, const Use& use) {
    for_each_tile(group, kKeyUnit, Tile::kKeys, use);
  }
  template <class Use>
  static void for_each_query_tile(Range group, const Use& use) {
    for_each_tile(group, kLane, Tile::kQueries, use);
  }

  void add_unit(const PositionSchedule& schedule, const Unit& unit, const Shared& shared, Scratch& scratch) const {
    const std::int64_t sample = shared.first_sample + unit.sample;
    const Range keys = keys_of(schedule, unit.key_group);
    const Range queries = queries_of(schedule, unit.query_group);
    Workspace w = take_workspace(scratch);
    const Tile tile(sizes_, arguments_.scale, tile_work(), largest_key_tile(), largest_query_tile(), scratch);
    if (shares_operands()) {
      w.keys = shared_keys(shared, unit.sample).from(keys.begin, sizes_);
    } else {
      for_each_key_tile(
          keys, [&](Range key_tile) { pack_keys(sample, key_tile, w.keys.from(key_tile.begin - keys.begin, sizes_)); });
    }
    const QueryOperands<T> own_queries = w.queries;
    const std::int64_t copy = unit.sample * schedule.replicas + unit.replica;
    A* const grad_key = shared.grad_key + copy * m_ * padded_columns<P>(e_);
    A* const grad_value = shared.grad_value + copy * m_ * padded_columns<P>(c_);
    const UnitOrder order = schedule.wait(unit);
    GemmMode key_mode = order.first_of_keys ? GemmMode::kStore : GemmMode::kAdd;
    for_each_query_tile(queries, [&](Range query_tile) {
      const std::int64_t query_count = query_tile.size();
      if (shares_operands()) {
        w.queries = shared_queries(shared, unit.sample).from(query_tile.begin, sizes_);
      } else {
        w.queries = own_queries;
        pack_queries(sample, query_tile, w.queries);
      }
      load_statistics(shared, unit.sample, query_tile, order, tile);
      GemmMode query_mode = GemmMode::kStore;
      for_each_key_tile(keys, [&](Range key_tile) {
        const KeyOperands<T> key_operands = w.keys.from(key_tile.begin - keys.begin, sizes_);
        tile.differentiate(key_operands, key_tile.size(), w.queries, query_count, query_mode);
        tile.add_key_gradients(
            key_tile.size(), w.queries, query_count, grad_value + key_tile.begin * padded_columns<P>(c_),
            grad_key + key_tile.begin * padded_columns<P>(e_), key_mode);
        if (wanted_.query) {
          tile.add_query_gradient(key_operands, key_tile.size(), query_count, query_mode);
        }
        query_mode = GemmMode::kAdd;
      });
      // First the sums of a key group, then those of the groups: dS has either sign, so the rounding of large partial
      // sums grows with the number of additions.
      if (wanted_.query && keeps_query_sums(schedule)) {
        const std::int64_t offset = unit.sample * panels_size<P>(e_, n_) + query_tile.begin * e_;
        const std::int64_t size = e_ * padded_columns<P>(query_count);
        add_to_shared(tile.grad_query, shared.grad_query + offset, size, order);
        if (subtracts_mean_keys()) {
          add_to_shared(tile.mean_keys, shared.mean_keys + offset, size, order);
          add_to_shared(tile.grad_sum, shared.grad_sum + unit.sample * n_ + query_tile.begin, query_count, order);
        }
      }
      key_mode = GemmMode::kAdd;
      if (wanted_.query && order.last_of_queries) {
        if (subtracts_mean_keys()) {
          tile.subtract_mean_keys(query_count);
        }
        arguments_.grad_query.from(sample * e_ * n_ + query_tile.begin).visit([&](auto* target) {
          store_panels(target, n_, tile.grad_query, e_, query_count);
        });
      }
    });
    if (order.last_of_keys && schedule.replicas == 1) {
      store_key_group(schedule, shared, unit.sample, unit.key_group);
    }
  }

  // Logsumexp, its rounding error and gradient, and delta of a tile of queries, padded. The first unit of a query group
  // computes delta for the others. grad_sum starts at what the sum of dS is known to be, with its sign changed.
  void load_statistics(
      const Shared& shared, std::int64_t sample, Range queries, const UnitOrder& order, const Tile& tile) const {
    A* const delta = shared.delta + sample * n_ + queries.begin;
    const std::int64_t first = (shared.first_sample + sample) * n_ + queries.begin;
    const std::int64_t count = queries.size();
    const std::int64_t columns = padded_columns<P>(count);
    // exp(energy - inf) = 0: padding has no weight.
    std::fill_n(tile.logsumexp, columns, std::numeric_limits<A>::infinity());
    std::copy_n(arguments_.logsumexp + first, count, tile.logsumexp);
    std::fill_n(tile.grad_logsumexp, columns, A(0));
    if (arguments_.grad_logsumexp != nullptr) {
      std::copy_n(arguments_.grad_logsumexp + first, count, tile.grad_logsumexp);
    }
    const bool uses_delta = wanted_.of_energies() && delta_source() == DeltaSource::kOutput;
    if (order.first_of_queries && uses_delta) {
      compute_delta(shared.first_sample + sample, queries, delta);
    }
    if (uses_delta) {
      std::fill_n(tile.delta, columns, A(0));
      std::copy_n(delta, count, tile.delta);
    }
    if (arguments_.delta != nullptr) {
      // Energies of -inf less a logsumexp of -inf would be NaN.
      std::replace(
          tile.logsumexp, tile.logsumexp + count, -std::numeric_limits<A>::infinity(),
          std::numeric_limits<A>::infinity());
    }
    std::fill_n(tile.logsumexp_low, columns, A(0));
    if (arguments_.logsumexp_low != nullptr) {
      std::copy_n(arguments_.logsumexp_low + first, count, tile.logsumexp_low);
    }
    for (std::int64_t i = 0; i < columns; ++i) {
      tile.grad_sum[i] = A(0) - (order.first_of_queries ? arguments_.scale * tile.grad_logsumexp[i] : A(0));
    }
  }

  // Adds a unit's sum to the shared sum of its query group, and leaves the result in both.
  static void add_to_shared(A* own, A* shared, std::int64_t size, const UnitOrder& order) {
    const bool first = order.first_of_queries;
    for (std::int64_t i = 0; i < size; ++i) {
      own[i] = shared[i] = first ? own[i] : own[i] + shared[i];
    }
  }

  // grad_key and grad_value of a key group: adds up the replicas' sums and rounds them to T.
  void store_key_group(
      const PositionSchedule& schedule, const Shared& shared, std::int64_t sample, std::int64_t group) const {
    const std::int64_t target = shared.first_sample + sample;
    for_each_key_tile(keys_of(schedule, group), [&](Range tile) {
      if (wanted_.key) {
        store_key_tile(schedule, arguments_.grad_key.from(target * e_ * m_), shared.grad_key, sample, tile, e_);
      }
      if (wanted_.value) {
        store_key_tile(schedule, arguments_.grad_value.from(target * c_ * m_), shared.grad_value, sample, tile, c_);
      }
    });
  }

  void store_key_tile(
      const PositionSchedule& schedule, const PositionResult<T>& target, A* sums, std::int64_t sample, Range tile,
      std::int64_t channels) const {
    const std::int64_t copy_size = m_ * padded_columns<P>(channels);
    A* const total = sums + sample * schedule.replicas * copy_size + tile.begin * padded_columns<P>(channels);
    for (std::int64_t replica = 1; replica < schedule.replicas; ++replica) {
      const A* const other = total + replica * copy_size;
      for (std::int64_t i = 0; i < tile.size() * padded_columns<P>(channels); ++i) {
        total[i] += other[i];
      }
    }
    target.from(tile.begin).visit([&](auto* gradient) {
      store_panels_transposed(gradient, m_, total, tile.size(), channels);
    });
  }

  PositionBackwardArguments<T> arguments_;
  PositionSizes sizes_;
  PositionGradients wanted_;
  std::int64_t e_, c_, n_, m_;  // E, C, N, M of the shapes above
};

}  // namespace segattn::cpu
