// The cut of position attention's backward pass into work units: no atomic sums, and a fixed order of every sum,
// whatever the number of threads.
//
// Keys and queries are cut into groups; unit (key group, query group) adds to the gradients of both. In step t key
// group g meets query group (g + t) mod steps. The units of one step have different groups, and the units of one group
// run one after another, so every sum has one order. A unit starts when the previous units of both its groups are done.
// There is no barrier between steps, and the memory for sums does not grow with the number of threads.
//
// With fewer than kParallelGroups key groups (ANN's 110 keys), the query groups are distributed over replicas, each
// with its own sums of grad_key and grad_value, which are added in order at the end.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "cpu/common/range.h"

namespace segattn::cpu {

// Whether each unit packs its operands or all operands are packed before the first unit.
enum class OperandPacking { kPerUnit, kShared };

// The cut of `samples` samples with n queries and m keys. It depends on these sizes alone.
class PositionSchedule {
 public:
  struct Unit {
    std::int64_t step;
    std::int64_t key_index;    // of (sample, replica, key group)
    std::int64_t query_index;  // of (sample, query group)
    std::int64_t sample, replica, key_group, query_group;
    bool idle;  // the key group meets no query group in this step; no unit waits for this one
  };

  // A unit that packs its operands needs a large key group.
  PositionSchedule(std::int64_t samples, std::int64_t n, std::int64_t m, OperandPacking packing)
      : samples(samples),
        key_groups(
            m <= kOneGroup ? 1
                           : groups_for(m, packing == OperandPacking::kShared ? kSmallestGroup : kSmallestKeyGroup)),
        query_groups(groups_for(n, kSmallestGroup)),
        replicas(
            packing == OperandPacking::kShared && key_groups * samples >= kEnoughGroups
                ? 1
                : std::clamp<std::int64_t>(ceil_div(kParallelGroups, key_groups * samples), 1, query_groups)),
        steps_(std::max(key_groups, ceil_div(query_groups, replicas))),
        keys_done_(new std::atomic<std::int64_t>[samples * replicas * key_groups]()),
        queries_done_(new std::atomic<std::int64_t>[samples * query_groups]()) {}

  std::int64_t units() const { return steps_ * units_per_step(); }

  // Units in the order in which they must start.
  Unit unit(std::int64_t index) const {
    Unit unit{};
    unit.step = index / units_per_step();
    unit.key_index = index % units_per_step();
    unit.key_group = unit.key_index % key_groups;
    unit.replica = unit.key_index / key_groups % replicas;
    unit.sample = unit.key_index / key_groups / replicas;
    const Range partners = part_of(query_groups, 1, unit.replica, replicas);
    unit.query_group = partners.begin + (unit.key_group + unit.step) % steps_;
    unit.query_index = unit.sample * query_groups + unit.query_group;
    unit.idle = unit.query_group >= partners.end;
    return unit;
  }

  // Whether a unit is the first or the last of its key group (and replica) and of its query group.
  struct UnitOrder {
    bool first_of_keys, last_of_keys, first_of_queries, last_of_queries;
  };

  // Waits for the previous units of the unit's key group and query group. The unit must not be idle.
  UnitOrder wait(const Unit& unit) const {
    const Range partners = part_of(query_groups, 1, unit.replica, replicas);
    const auto keys_meet = [&](std::int64_t step) { return (unit.key_group + step) % steps_ < partners.size(); };
    const std::int64_t local = unit.query_group - partners.begin;
    const auto queries_meet = [&](std::int64_t step) { return (local - step + steps_) % steps_ < key_groups; };
    const std::int64_t keys_before = step_before(unit.step, keys_meet);
    const std::int64_t queries_before = step_before(unit.step, queries_meet);
    wait_for(keys_done_[unit.key_index], keys_before + 1);
    wait_for(queries_done_[unit.query_index], queries_before + 1);
    return {
        keys_before < 0, step_after(unit.step, keys_meet) == steps_, queries_before < 0,
        step_after(unit.step, queries_meet) == steps_};
  }

  void finish(const Unit& unit) const {
    keys_done_[unit.key_index].store(unit.step + 1, std::memory_order_release);
    queries_done_[unit.query_index].store(unit.step + 1, std::memory_order_release);
  }

  const std::int64_t samples, key_groups, query_groups, replicas;

  // The target size of a group: packing then takes 1.6% of the time of the products.
  static constexpr std::int64_t kGroup = 600;
  // grad_output is packed twice per key group, so small feature maps are cut along the queries instead (N = 1024,
  // C = 512, one thread: 16.3 ms with key groups of 128, 14.4 ms with 256).
  static constexpr std::int64_t kSmallestKeyGroup = 256;
  static constexpr std::int64_t kSmallestGroup = 64;
  // Up to this many keys are one group and one tile, which then has the complete sums over keys.
  static constexpr std::int64_t kOneGroup = 128;
  static constexpr std::int64_t kParallelGroups = 8;
  // From this many key groups on, small feature maps use no replicas: fewer busy threads cost less than the sums.
  static constexpr std::int64_t kEnoughGroups = 4;

 private:
  static constexpr std::int64_t groups_for(std::int64_t extent, std::int64_t smallest) {
    return std::max(ceil_div(extent, kGroup), std::min(kParallelGroups, ceil_div(extent, smallest)));
  }

  std::int64_t units_per_step() const { return samples * replicas * key_groups; }

  // The last step before `step` (-1: none), the first step after it (steps_: none), for which `meet` is true.
  template <class Meet>
  static std::int64_t step_before(std::int64_t step, const Meet& meet) {
    do {
      --step;
    } while (step >= 0 && !meet(step));
    return step;
  }
  template <class Meet>
  std::int64_t step_after(std::int64_t step, const Meet& meet) const {
    do {
      ++step;
    } while (step < steps_ && !meet(step));
    return step;
  }

  static void wait_for(const std::atomic<std::int64_t>& done, std::int64_t least) {
    while (done.load(std::memory_order_acquire) < least) {
      std::this_thread::yield();
    }
  }

  const std::int64_t steps_;
  const std::unique_ptr<std::atomic<std::int64_t>[]> keys_done_, queries_done_;
};

}  // namespace segattn::cpu
